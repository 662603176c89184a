"""Scores a folder of images."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps
from rich.console import Console
from rich.progress import track
from rich.table import Table

from ..errors import UserError
from ..tasks.prompt_files import read_prompts
from ..tasks.protocol import Prompt
from .registry import BUILT_IN
from .scorer import Scorer, parse
from .scores import Scores, family_means, joined, missing, same_size
from .settings import ScoringConfig

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


def score_folder(
    reward: str, images: Path, prompts: Path | None, out: Path | None, config: ScoringConfig, console: Console
) -> Scores:
    """Scores a folder's pictures, prints a summary, and writes one JSON line a picture to ``out``: as they come to
    ``out.partial``, which stays behind where scoring is broken off. A picture that cannot be read has no score.

    Raises UserError or ValueError on a folder without pictures, prompts that do not go with them, or none where the
    reward needs some.
    """
    files = picture_files(images)
    wanted = prompts_of(images, files, prompts)
    if wanted is None:
        _require_blind(reward)
    scorer = Scorer(reward, config)
    if wanted is None:
        wanted = [Prompt("") for _ in files]
    else:
        scorer.check(wanted)
    chunks = []
    try:
        step = config.chunk * max(config.workers, 1)  # a chunk for every worker
        batches = [slice(start, start + step) for start in range(0, len(files), step)]
        with _lines(out) as write:
            for batch in track(batches, "scoring", console=console, transient=True):
                chunks.append(_score(scorer, files[batch], wanted[batch]))
                for i, (file, prompt) in enumerate(zip(files[batch], wanted[batch], strict=True)):
                    write(_line(chunks[-1], i, file.relative_to(images), prompt))
    finally:
        scorer.close()
    scores = joined(chunks)
    _summary(scores, reward, [str(p.metadata.get("tag", "")) for p in wanted], console)
    return scores


@contextmanager
def _lines(out: Path | None) -> Iterator[Callable[[str], object]]:
    """Yields what writes a line to ``out``, which appears whole or not at all."""
    if out is None:
        yield lambda line: None
        return
    if out.is_dir():
        raise UserError(f"--out = {str(out)!r} is a folder: name a file in it")
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f"{out.name}.partial")
    with partial.open("w", encoding="utf-8", buffering=1) as file:
        yield file.write
    os.replace(partial, out)


def _score(scorer: Scorer, files: Sequence[Path], prompts: Sequence[Prompt]) -> Scores:
    """Scores of pictures of any size."""
    read = [_read(file) for file in files]
    pictures = [np.empty(0) if isinstance(picture, str) else picture for picture in read]
    chunks = []
    for s in same_size(pictures):
        if pictures[s][0].size:
            chunks.append(scorer(np.stack(pictures[s]), prompts[s]))
        else:
            chunks += [missing(1, str(why)) for why in read[s]]
    return joined(chunks)


def picture_files(folder: Path) -> list[Path]:
    """A folder's pictures by name, 2.png before 10.png; those of GenEval's layout (``00000/samples/0000.png``) too."""
    if not folder.is_dir():
        raise UserError(f"images = {str(folder)!r}: no such folder")
    found = [f for f in folder.rglob("*") if f.suffix.lower() in PICTURES and not _is_overview(f)]
    found = [f for f in found if not any(_is_hidden(part) for part in f.relative_to(folder).parts)]
    files = sorted(found, key=lambda file: _natural(file.relative_to(folder).as_posix()))
    if not files:
        raise UserError(f"images = {str(folder)!r} holds no pictures ({', '.join(PICTURES)})")
    return files


def _is_overview(file: Path) -> bool:
    """Whether it is the grid of samples that GenEval's generator writes beside them."""
    return (file.parent / "metadata.jsonl").is_file() and (file.parent / "samples").is_dir()


def _is_hidden(name: str) -> bool:
    """Hidden files and folders, and what macOS puts beside pictures in archives and on foreign disks (``._0.png``)."""
    return name.startswith(".") or name == "__MACOSX"


def _natural(name: str) -> list[str | int]:
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)]


def prompts_of(folder: Path, files: Sequence[Path], path: Path | None) -> list[Prompt] | None:
    """The prompt of each picture: a line each in the order of names, or a row whose ``file`` or ``file_name`` is the
    picture's path in the folder (its name alone will do where no other picture has it). Without a file of prompts those
    that lie beside the pictures in GenEval's layout, or None."""
    if path is None:
        return _geneval_prompts(files)
    prompts = read_prompts(path, "--prompts")
    if any(_file_of(p) is not None for p in prompts):
        return _prompts_by_file(folder, files, prompts, path)
    if len(prompts) != len(files):
        raise UserError(
            f"prompts = {str(path)!r} has {len(prompts)} prompts for {len(files)} pictures: give a line each, in the "
            "order of their names, or .jsonl rows with 'file' and 'prompt'"
        )
    return prompts


def _file_of(prompt: Prompt) -> str | None:
    """The picture that a row names: ``file``, or ``file_name`` as in an image folder of Hugging Face datasets."""
    found = prompt.metadata.get("file", prompt.metadata.get("file_name"))
    return None if found is None else str(found)


def _prompts_by_file(folder: Path, files: Sequence[Path], prompts: Sequence[Prompt], path: Path) -> list[Prompt]:
    named: dict[str, Prompt] = {}
    for p in prompts:
        name = _file_of(p)
        if name is None or name in named:
            what = f"two rows with file = {name!r}" if name else f"a row without file, of the prompt {p.text!r}"
            raise UserError(f"prompts = {str(path)!r} has {what}: give one row for each picture")
        named[name] = p
    alike = Counter(f.name for f in files)
    found = []
    for f in files:
        inside = f.relative_to(folder).as_posix()
        prompt = named.get(inside) or (named.get(f.name) if alike[f.name] == 1 else None)
        if prompt is None:
            raise UserError(f"prompts = {str(path)!r} has no row with file = {inside!r}")
        found.append(prompt)
    return found


def _geneval_prompts(files: Sequence[Path]) -> list[Prompt] | None:
    """``00000/metadata.jsonl`` for the pictures in ``00000/samples``, where every picture has one."""
    sheets = [f.parent.parent / "metadata.jsonl" for f in files]
    if not all(sheet.is_file() for sheet in sheets):
        return None
    prompts = {sheet: read_prompts(sheet, "metadata.jsonl")[0] for sheet in dict.fromkeys(sheets)}
    return [prompts[sheet] for sheet in sheets]


def _require_blind(reward: str) -> None:
    seeing = [t.name for t in parse(reward) if t.name in BUILT_IN and not BUILT_IN[t.name].blind]
    if seeing:
        raise UserError(f"reward = {seeing[0]!r} looks at prompts: give --prompts, a file with one for each picture")


def _read(file: Path) -> np.ndarray | str:
    """A picture, or why there is none."""
    try:
        with Image.open(file) as image:
            return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))  # upright, as viewers show it
    except Exception as error:  # decoders of damaged files raise SyntaxError, struct.error and others
        return f"{str(file)!r} cannot be read as a picture: {error}"


def _line(scores: Scores, i: int, file: Path, prompt: Prompt) -> str:
    def number(column: np.ndarray) -> float | None:
        return None if np.isnan(column[i]) else float(column[i])

    parts = {name: number(column) for name, column in scores.parts.items()}
    row = {"file": file.as_posix(), "prompt": prompt.text, "score": number(scores.values), "parts": parts}
    return json.dumps(row) + "\n"


def _summary(scores: Scores, name: str, tags: list[str], console: Console) -> None:
    """A table; where prompts come in families (GenEval's tags) with each one's mean and the mean of these, which is the
    benchmark's figure."""
    families = [tag for tag in dict.fromkeys(tags) if tag]
    table = Table(title=f"{len(scores)} pictures")
    for title in ("", "mean", "deviation", "least", "most", "missing"):
        table.add_column(title, justify="right" if title else "left")
    for label, column in ({name: scores.values} | dict(scores.parts)).items():
        _add(table, label, column)
        for tag in families:
            _add(table, f"  {tag}", column[np.array(tags) == tag])
        if means := [mean for mean in family_means(column, tags).values() if not np.isnan(mean)]:
            table.add_row(f"  mean of {len(means)} families", f"{np.mean(means):.4g}")
    console.print(table)
    for why in scores.failures:
        console.print(why, style="yellow", markup=False)


def _add(table: Table, label: str, column: np.ndarray) -> None:
    known = column[~np.isnan(column)]
    cells = [f"{f(known):.4g}" if len(known) else "" for f in (np.mean, np.std, np.min, np.max)]
    table.add_row(label, *cells, str(len(column) - len(known)))
