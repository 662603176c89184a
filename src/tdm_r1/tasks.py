"""Tasks: where prompts come from and what is measured that training never sees."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np


@dataclass(frozen=True)
class Prompt:
    """A prompt and whatever a reward needs to know of it (targets, counts, GenEval's ``include`` list)."""

    text: str
    metadata: dict[str, Any] = field(default_factory=dict)


class Task(Protocol):
    """Prompts to train on, a fixed list to evaluate on, and metrics of pictures beside the reward."""

    def train_prompts(self, n: int, rng: np.random.Generator) -> list[Prompt]: ...

    def eval_prompts(self, n: int) -> list[Prompt]: ...

    def metrics(self, images: np.ndarray, prompts: Sequence[Prompt], images_per_prompt: int) -> dict[str, float]: ...


class PromptFileTask:
    """Prompts from a file; those of ``held_out`` are evaluated on, if there is one. See `read_prompts`."""

    def __init__(self, path: Path, held_out: Path | None = None) -> None:
        self.prompts = read_prompts(path, "task.prompts")
        self.evaluated = read_prompts(held_out, "task.eval_prompts") if held_out else self.prompts

    def train_prompts(self, n: int, rng: np.random.Generator) -> list[Prompt]:
        return [self.prompts[i] for i in rng.integers(len(self.prompts), size=n)]

    def eval_prompts(self, n: int) -> list[Prompt]:
        return [self.evaluated[i % len(self.evaluated)] for i in range(n)]

    def metrics(self, images: np.ndarray, prompts: Sequence[Prompt], images_per_prompt: int) -> dict[str, float]:
        return {}


def read_prompts(path: Path, setting: str) -> list[Prompt]:
    """One prompt a line, or, in a .jsonl file, objects with ``prompt`` and any other keys as metadata.

    Raises ValueError naming ``setting`` or the line, and what is wrong with it.
    """
    if not path.is_file():
        raise ValueError(f"{setting} = {str(path)!r}: no such file; give a .txt or .jsonl file of prompts")
    lines = [line for line in path.read_text().splitlines() if line.strip()]
    if not lines:
        raise ValueError(f"{setting} = {str(path)!r} holds no prompts")
    return [_parse(line, number, path) for number, line in enumerate(lines, start=1)]


def _parse(line: str, number: int, path: Path) -> Prompt:
    if path.suffix != ".jsonl":
        return Prompt(line.strip())
    try:
        row = json.loads(line)
        return Prompt(row.pop("prompt"), row)
    except (json.JSONDecodeError, KeyError, AttributeError, TypeError) as error:
        raise ValueError(f"{path}:{number}: expected a JSON object with a 'prompt', got {line[:60]!r}") from error
