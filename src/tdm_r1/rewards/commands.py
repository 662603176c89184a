"""What `tdm-r1 rewards`, `tdm-r1 score` and `tdm-r1 serve-reward` do."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError
from rich.console import Console
from rich.markup import escape
from rich.progress import track
from rich.table import Table

from ..errors import UserError
from ..tasks import Prompt, PromptFileTask
from .http import TOKEN, RewardServer
from .registry import BUILT_IN, Entry, load_reward
from .scorer import Scorer, ScoringConfig
from .scores import Scores, joined, same_size

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


def list_rewards(console: Console) -> None:
    """Prints what rewards there are, and whether each works here as things are installed."""
    table = Table(title="Rewards")
    table.add_column("name", no_wrap=True)
    for title in ("what it scores", "state here", "licence"):
        table.add_column(title, overflow="fold")
    for name, entry in BUILT_IN.items():
        table.add_row(name, entry.summary, escape(state_of(entry)), entry.licence)
    console.print(table)
    console.print("Also: your own as my_rewards.py:function, a scoring server's URL, and sums: 'ocr + 0.5*mini'.")


def state_of(entry: Entry) -> str:
    """Whether a reward works here: ready, or what is missing and how to get it."""
    if lacking := entry.lacking():
        return f"lacks {', '.join(lacking)}: pip install 'tdm-r1[{entry.extra}]'"
    if absent := [w for w in entry.weights if not is_cached(w)]:
        return f"installed; downloads {', '.join(absent)} on first use"
    return "ready"


def is_cached(repository: str) -> bool:
    """Whether anything of a hub repository lies in the local cache."""
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    folder = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=repository, repo_type="model") / "snapshots"
    return folder.is_dir() and any(folder.iterdir())


def score_folder(
    reward: str, images: Path, prompts: Path | None, out: Path | None, config: ScoringConfig, console: Console
) -> Scores:
    """Scores a folder's pictures, prints a summary, and writes one JSON line a picture to ``out``.

    Raises UserError or ValueError on a folder without pictures, or prompts that do not go with them.
    """
    files = picture_files(images)
    wanted = prompts_of(files, prompts)
    scorer = Scorer(reward, config)
    chunks = []
    try:
        step = config.chunk * max(config.workers, 1)  # a chunk for every worker
        batches = [slice(start, start + step) for start in range(0, len(files), step)]
        for batch in track(batches, "scoring", console=console, transient=True):
            pictures, texts = [_read(f) for f in files[batch]], wanted[batch]
            chunks += [scorer(np.stack(pictures[s]), texts[s]) for s in same_size(pictures)]
    finally:
        scorer.close()
    scores = joined(chunks)
    if out:
        from ..checkpoint import write_text  # torch comes with it

        lines = (_line(scores, i, file, p) for i, (file, p) in enumerate(zip(files, wanted, strict=True)))
        write_text(out, "".join(lines))
    _summary(scores, reward, console)
    return scores


def picture_files(folder: Path) -> list[Path]:
    """A folder's pictures by name; those of GenEval's layout (``00000/samples/0000.png``) too."""
    if not folder.is_dir():
        raise UserError(f"images = {str(folder)!r}: no such folder")
    files = sorted(f for f in folder.rglob("*") if f.suffix.lower() in PICTURES)
    if not files:
        raise UserError(f"images = {str(folder)!r} holds no pictures ({', '.join(PICTURES)})")
    return files


def prompts_of(files: Sequence[Path], path: Path | None) -> list[Prompt]:
    """The prompt of each picture: a line each in the order of names, or a row whose ``file`` is the picture's name."""
    if path is None:
        return [Prompt("") for _ in files]
    prompts = PromptFileTask(path).prompts
    if named := {p.metadata["file"]: p for p in prompts if "file" in p.metadata}:
        if absent := [f.name for f in files if f.name not in named]:
            raise UserError(f"prompts = {str(path)!r} has no row with file = {absent[0]!r}")
        return [named[f.name] for f in files]
    if len(prompts) != len(files):
        raise UserError(
            f"prompts = {str(path)!r} has {len(prompts)} prompts for {len(files)} pictures: give a line each, in the "
            "order of their names, or .jsonl rows with 'file' and 'prompt'"
        )
    return prompts


def _read(file: Path) -> np.ndarray:
    try:
        with Image.open(file) as image:
            return np.asarray(image.convert("RGB"))
    except (OSError, UnidentifiedImageError) as error:
        raise UserError(f"{str(file)!r} cannot be read as a picture: {error}") from error


def _line(scores: Scores, i: int, file: Path, prompt: Prompt) -> str:
    def number(column: np.ndarray) -> float | None:
        return None if np.isnan(column[i]) else float(column[i])

    parts = {name: number(column) for name, column in scores.parts.items()}
    row = {"file": file.name, "prompt": prompt.text, "score": number(scores.values)} | parts
    return json.dumps(row) + "\n"


def _summary(scores: Scores, name: str, console: Console) -> None:
    table = Table(title=f"{len(scores)} pictures")
    for title in ("", "mean", "deviation", "least", "most", "missing"):
        table.add_column(title, justify="right" if title else "left")
    for label, column in ({name: scores.values} | dict(scores.parts)).items():
        known = column[~np.isnan(column)]
        cells = [f"{f(known):.4g}" if len(known) else "" for f in (np.mean, np.std, np.min, np.max)]
        table.add_row(label, *cells, str(len(column) - len(known)))
    console.print(table)
    for why in scores.failures:
        console.print(why, style="yellow", markup=False)


def serve(name: str, host: str, port: int, console: Console) -> None:
    """Serves a reward until Ctrl-C."""
    server = RewardServer(name, load_reward(name), host=host, port=port, token=os.environ.get(TOKEN))
    console.print(f"Serving {name} at {server.url}: train with --reward {server.url}. Ctrl-C ends it.")
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        pass
    finally:
        server.server_close()
