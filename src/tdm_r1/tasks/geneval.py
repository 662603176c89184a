"""GenEval as a task: the official metadata format, and a generator of prompts of its six families over COCO-80."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .geneval_protocol import CLASSES, COLORS, RELATIONS, TAGS, why_not
from .prompt_files import read_prompts
from .protocol import Prompt
from .settings import TaskConfig

DRAWS = 20  # for a prompt that the benchmark does not ask
MIRRORED = {"right of": "left of", "below": "above"}
NUMBERS = {2: "two", 3: "three", 4: "four"}
# Shares in training; default: Flow-GRPO's 7 : 5 : 3 : 1 : 1, which has no single objects.
SHARES = {"single_object": 0.0, "two_object": 1.0, "counting": 5.0, "colors": 1.0, "position": 7.0, "color_attr": 3.0}


class GenEvalTask:
    """Prompts of the six families, drawn for training; for evaluation those of a file, or drawn ones.

    What the file asks is not drawn for training, where it leaves something to draw: its scores are held out. (It has
    all single objects.)

    Args:
        shares: of the families in training, in any unit; Flow-GRPO's if None.
        path: GenEval's ``evaluation_metadata.jsonl``, or a file of its format.

    Raises ValueError on unknown families, on shares without a positive sum, and on rows that are not GenEval's.
    """

    known: Sequence[Prompt] = ()

    def __init__(self, shares: dict[str, float] | None = None, path: Path | None = None) -> None:
        shares = shares or SHARES
        if unknown := shares.keys() - SHARES.keys():
            raise ValueError(f"task.weights names {min(unknown)!r}: known families are {', '.join(SHARES)}")
        self.shares = np.array([shares.get(tag, 0.0) for tag in TAGS])
        if not self.shares.sum() > 0 or (self.shares < 0).any():
            raise ValueError(f"task.weights = {shares}: give non-negative weights with a positive sum")
        self.official = read_metadata(path) if path else None
        self.held_out = {_asked(p) for p in self.official or ()}

    def train_prompts(self, n: int, rng: np.random.Generator) -> list[Prompt]:
        tags = rng.choice(TAGS, size=n, p=self.shares / self.shares.sum())
        return [self._draw(str(tag), rng) for tag in tags]

    def _draw(self, tag: str, rng: np.random.Generator) -> Prompt:
        prompt = make_prompt(tag, rng)
        for _ in range(DRAWS if _asked(prompt) in self.held_out else 0):
            prompt = make_prompt(tag, rng)
            if _asked(prompt) not in self.held_out:
                break
        return prompt

    def eval_prompts(self, n: int) -> list[Prompt]:
        """The file's prompts, spread over the file where ``n`` is smaller, or ``n`` drawn ones, always the same."""
        if self.official:
            rows = np.linspace(0, len(self.official), min(n, len(self.official)), endpoint=False).astype(int)
            return [self.official[i] for i in rows]
        rng = np.random.default_rng(553)
        return [make_prompt(TAGS[i % len(TAGS)], rng) for i in range(n)]

    def metrics(self, images: np.ndarray, prompts: Sequence[Prompt], images_per_prompt: int) -> dict[str, float]:
        return {}


def make(config: TaskConfig) -> GenEvalTask:
    """The task of ``task.name = geneval``."""
    return GenEvalTask(config.weights, config.prompts)


def _asked(prompt: Prompt) -> tuple[str, frozenset[str]]:
    """What a prompt asks for, however it is worded, in whatever order and from whichever side it is seen."""
    parts, asked = prompt.metadata["include"], set()
    for part in parts:
        asked.add(json.dumps({key: value for key, value in part.items() if key != "position"}, sort_keys=True))
        if "position" in part:
            relation, anchor = part["position"]
            one, other = part["class"], parts[anchor]["class"]
            turned = relation in MIRRORED
            asked.add(f"{other} {MIRRORED[relation]} {one}" if turned else f"{one} {relation} {other}")
    return prompt.metadata["tag"], frozenset(asked)


def read_metadata(path: Path) -> list[Prompt]:
    """Prompts in GenEval's format. Raises ValueError naming the line and what is wrong with it."""
    return read_prompts(path, "task.prompts", why_not)


def make_prompt(tag: str, rng: np.random.Generator) -> Prompt:
    """Draws one prompt of a family, with its metadata."""
    first, second = (CLASSES[i] for i in rng.permutation(len(CLASSES))[:2])
    things = [c for c in CLASSES if c != "person"]  # persons have no colour to ask for
    thing, other = (things[i] for i in rng.permutation(len(things))[:2])
    color, other_color = (COLORS[i] for i in rng.permutation(len(COLORS))[:2])
    exclude: list[dict[str, Any]] = []
    match tag:
        case "single_object":
            text, include = with_article(first), [_part(first)]
        case "two_object":
            text, include = f"{with_article(first)} and {with_article(second)}", [_part(first), _part(second)]
        case "counting":
            count = int(rng.choice(list(NUMBERS)))
            text, include = f"{NUMBERS[count]} {plural(first)}", [_part(first, count=count)]
            exclude = [_part(first, count=count + 1)]
        case "colors":
            text, include = with_article(f"{color} {thing}"), [_part(thing, color=color)]
        case "position":
            relation = str(rng.choice(list(RELATIONS)))
            text = f"{with_article(first)} {relation} {with_article(second)}"
            include = [_part(second), _part(first, position=[relation, 0])]
        case "color_attr":
            text = f"{with_article(f'{color} {thing}')} and {with_article(f'{other_color} {other}')}"
            include = [_part(thing, color=color), _part(other, color=other_color)]
        case _:
            raise ValueError(f"unknown family {tag!r}: known are {', '.join(TAGS)}")
    metadata = {"tag": tag, "include": include} | ({"exclude": exclude} if exclude else {})
    return Prompt(f"a photo of {text}", metadata)


def _part(name: str, *, count: int = 1, **asked: Any) -> dict[str, Any]:
    return {"class": name, "count": count} | asked


def with_article(noun: str) -> str:
    """``an apple``, ``a bench``; also ``a scissors``."""
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


def plural(noun: str) -> str:
    """The plural of one of GenEval's classes."""
    irregular = {"person": "people", "mouse": "mice", "knife": "knives", "sheep": "sheep", "skis": "skis"}
    *before, last = noun.split(" ")
    if last in irregular:
        last = irregular[last]
    elif last.endswith(("s", "sh", "ch", "x")):
        last = last if last == "scissors" else f"{last}es"
    else:
        last = f"{last}s"
    return " ".join([*before, last])
