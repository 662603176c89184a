"""Files of prompts, and the task that draws from one."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .protocol import Prompt
from .settings import TaskConfig


class PromptFileTask:
    """Prompts from a file; those of ``held_out`` are evaluated on, if there is one. See `read_prompts`."""

    def __init__(self, path: Path, held_out: Path | None = None) -> None:
        self.known = read_prompts(path, "task.prompts")
        self.evaluated = read_prompts(held_out, "task.eval_prompts") if held_out else self.known

    def train_prompts(self, n: int, rng: np.random.Generator) -> list[Prompt]:
        return [self.known[i] for i in rng.integers(len(self.known), size=n)]

    def eval_prompts(self, n: int) -> list[Prompt]:
        return [self.evaluated[i % len(self.evaluated)] for i in range(n)]

    def metrics(self, images: np.ndarray, prompts: Sequence[Prompt], images_per_prompt: int) -> dict[str, float]:
        return {}


def make(config: TaskConfig) -> PromptFileTask:
    """The task of ``task.name = prompts``."""
    assert config.prompts is not None  # `check_task` sees to it
    return PromptFileTask(config.prompts, config.eval_prompts)


def read_prompts(
    path: Path, setting: str, why_not: Callable[[dict[str, Any]], str] = lambda metadata: ""
) -> list[Prompt]:
    """Prompts of a file, by its ending:

    - .txt: one a line;
    - .jsonl: an object a line with ``prompt``, any other keys as metadata;
    - .json: a list of texts or of such objects;
    - .csv: rows with a column ``prompt`` (or DrawBench's "Prompts"), the others as metadata;
    - .tsv: the same without quoting, as PartiPrompts has it.

    Args:
        path: a file, or OWNER/NAME/FILE in a dataset on the hub.
        setting: what names it, for errors.
        why_not: says what is wrong with a row's metadata; nothing if it is all right.

    Raises ValueError naming ``setting`` or the line, and what is wrong with it.
    """
    file = path if path.is_file() else _from_hub(path, setting)
    try:
        text = file.read_text(encoding="utf-8-sig")  # spreadsheets and Notepad put a mark before it
    except UnicodeDecodeError as error:
        raise ValueError(f"{setting} = {str(path)!r} is no text in UTF-8 ({error.reason}): save it as UTF-8") from error
    if file.suffix not in READERS:
        raise ValueError(f"{setting} = {str(path)!r}: give a file of one of the kinds {', '.join(READERS)}")
    prompts = []
    for place, prompt in READERS[file.suffix](text, path):
        if why := why_not(prompt.metadata):
            raise ValueError(f"{place}: {why}")
        prompts.append(prompt)
    if not prompts:
        raise ValueError(f"{setting} = {str(path)!r} contains no prompts; add at least one")
    return prompts


Placed = Iterator[tuple[str, Prompt]]  # where it stands in the file, for errors; and the prompt


def _text(text: str, path: Path) -> Placed:
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield f"{path}:{number}", Prompt(line.strip())


def _json_lines(text: str, path: Path) -> Placed:
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            place = f"{path}:{number}"
            yield place, _of_object(_json(line, place), place)


def _json_list(text: str, path: Path) -> Placed:
    rows = _json(text, str(path))
    if not isinstance(rows, list):
        raise ValueError(f"{path}: expected a list of prompts, found a JSON {type(rows).__name__}")
    for number, row in enumerate(rows, start=1):
        place = f"{path}, entry {number}"
        yield place, _of_object({"prompt": row} if isinstance(row, str) else row, place)


def _table(text: str, path: Path) -> Placed:
    lines = io.StringIO(text)
    table = (
        csv.DictReader(lines, delimiter="\t", quoting=csv.QUOTE_NONE)
        if path.suffix == ".tsv"
        else csv.DictReader(lines, skipinitialspace=True)
    )
    table.fieldnames = [str(name).strip() for name in table.fieldnames or ()]
    for row in table:
        place = f"{path}:{table.line_num}"
        yield place, _of_row(row, place, path)


READERS: dict[str, Callable[[str, Path], Placed]] = {
    ".txt": _text,
    ".jsonl": _json_lines,
    ".json": _json_list,
    ".csv": _table,
    ".tsv": _table,
}


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
    raise ValueError(f"{setting} = {str(path)!r}: no such file{where}; give a file of prompts ({', '.join(READERS)})")


def _of_row(row: dict[str, Any], place: str, path: Path) -> Prompt:
    column = next((name for name in row if str(name).lower() in ("prompt", "prompts")), None)
    if column is None:
        raise ValueError(f"{path}: expected a column 'prompt', found {', '.join(map(str, row))}")
    text = row.pop(column)
    if not text:
        raise ValueError(f"{place}: its prompt is empty; fill it or delete the row")
    if None in row:
        raise ValueError(f"{place}: more columns than the header has; quote a prompt that holds a comma")
    return Prompt(text, row)


def _json(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{place}: this is no JSON ({error}): {text[:60]!r}") from error


def _of_object(row: Any, place: str) -> Prompt:
    if not isinstance(row, dict) or "prompt" not in row:
        raise ValueError(f"{place}: expected a JSON object with a 'prompt', got {json.dumps(row)[:60]}")
    text = row.pop("prompt")
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"{place}: prompt = {text!r} is no text")
    return Prompt(text, row)
