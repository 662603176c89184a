"""Tasks: where prompts come from and what is measured that training never sees."""

from __future__ import annotations

import csv
import io
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
    """One prompt a line of a .txt file; .jsonl objects with ``prompt``, or .csv and .tsv rows with a column of that
    name (DrawBench's "Prompts" and PartiPrompts' "Prompt" too), any other keys as metadata.

    Args:
        path: a file, or OWNER/NAME/FILE in a dataset on the hub.
        setting: what names it, for errors.

    Raises ValueError naming ``setting`` or the line, and what is wrong with it.
    """
    file = path if path.is_file() else _from_hub(path, setting)
    try:
        text = file.read_text(encoding="utf-8-sig")  # spreadsheets and Notepad put a mark before it
    except UnicodeDecodeError as error:
        raise ValueError(f"{setting} = {str(path)!r} is no text in UTF-8 ({error.reason}): save it as UTF-8") from error
    if file.suffix in (".csv", ".tsv"):
        table = csv.DictReader(io.StringIO(text), delimiter="\t" if file.suffix == ".tsv" else ",")
        prompts = [_of_row(row, number, path) for number, row in enumerate(table, start=2)]
    else:
        lines = [(number, line) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]
        prompts = [_parse(line, number, path) for number, line in lines]
    if not prompts:
        raise ValueError(f"{setting} = {str(path)!r} holds no prompts")
    return prompts


def _from_hub(path: Path, setting: str) -> Path:
    where = ""
    if len(path.parts) > 2 and not path.is_absolute():
        from huggingface_hub import hf_hub_download  # serving a reward does without it
        from huggingface_hub.errors import HFValidationError

        dataset, file = "/".join(path.parts[:2]), "/".join(path.parts[2:])
        try:
            return Path(hf_hub_download(dataset, file, repo_type="dataset"))
        except (HFValidationError, OSError):
            where = f", and the hub gives no {file} of a dataset {dataset}"
    raise ValueError(
        f"{setting} = {str(path)!r}: no such file{where}; give a .txt, .jsonl, .csv or .tsv file of prompts"
    )


def _of_row(row: dict[str, Any], number: int, path: Path) -> Prompt:
    column = next((name for name in row if str(name).lower() in ("prompt", "prompts")), None)
    if column is None:
        raise ValueError(f"{path}: expected a column 'prompt', found {', '.join(map(str, row))}")
    text = row.pop(column)
    if not text:
        raise ValueError(f"{path}:{number}: its prompt is empty")
    if None in row:
        raise ValueError(f"{path}:{number}: more columns than the header has; quote a prompt that holds a comma")
    return Prompt(text, row)


def _parse(line: str, number: int, path: Path) -> Prompt:
    if path.suffix != ".jsonl":
        return Prompt(line.strip())
    try:
        row = json.loads(line)
        text = row.pop("prompt")
    except (json.JSONDecodeError, KeyError, AttributeError, TypeError) as error:
        raise ValueError(f"{path}:{number}: expected a JSON object with a 'prompt', got {line[:60]!r}") from error
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"{path}:{number}: prompt = {text!r} is no text")
    return Prompt(text, row)
