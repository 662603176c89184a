"""What `tdm-r1 rewards`, `tdm-r1 score` and `tdm-r1 serve-reward` do."""

from __future__ import annotations

import json
import os
from collections import Counter
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
from .scorer import Scorer, ScoringConfig, parse
from .scores import Scores, joined, same_size
from .workers import Workers

SERVED_AT_ONCE = 1024  # pictures that a served reward gets in one call; a client sends them in chunks of its own
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
    if unset := [name for name in entry.environment if name not in os.environ]:
        return f"installed; set {', '.join(unset)}"
    if absent := [w for w in entry.weights if not is_cached(w)]:
        return f"installed; downloads {', '.join(absent)} on first use"
    return "ready"


def is_cached(weights: str) -> bool:
    """Whether ``OWNER/NAME:FILE``, or weights of any name of a hub repository, lie in the local cache."""
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    repository, _, file = weights.partition(":")
    folder = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=repository, repo_type="model") / "snapshots"
    names = [file] if file else ["*.safetensors", "*.bin", "*.pt", "*.pth"]
    return any(any(folder.glob(f"*/{name}")) for name in names)


def score_folder(
    reward: str, images: Path, prompts: Path | None, out: Path | None, config: ScoringConfig, console: Console
) -> Scores:
    """Scores a folder's pictures, prints a summary, and writes one JSON line a picture to ``out``.

    Raises UserError or ValueError on a folder without pictures, prompts that do not go with them, or none where the
    reward wants some.
    """
    files = picture_files(images)
    wanted = prompts_of(images, files, prompts)
    if wanted is None:
        _require_blind(reward)
    wanted = wanted or [Prompt("") for _ in files]
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

        lines = (
            _line(scores, i, file.relative_to(images), p) for i, (file, p) in enumerate(zip(files, wanted, strict=True))
        )
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


def prompts_of(folder: Path, files: Sequence[Path], path: Path | None) -> list[Prompt] | None:
    """The prompt of each picture: a line each in the order of names, or a row whose ``file`` is the picture's path in
    the folder (its name alone will do where no other picture has it). Without a file of prompts those that lie beside
    the pictures in GenEval's layout, or None."""
    if path is None:
        return _geneval_prompts(files)
    prompts = PromptFileTask(path).prompts
    if any("file" in p.metadata for p in prompts):
        return _prompts_by_file(folder, files, prompts, path)
    if len(prompts) != len(files):
        raise UserError(
            f"prompts = {str(path)!r} has {len(prompts)} prompts for {len(files)} pictures: give a line each, in the "
            "order of their names, or .jsonl rows with 'file' and 'prompt'"
        )
    return prompts


def _prompts_by_file(folder: Path, files: Sequence[Path], prompts: Sequence[Prompt], path: Path) -> list[Prompt]:
    named: dict[str, Prompt] = {}
    for p in prompts:
        name = p.metadata.get("file")
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
    prompts = {sheet: PromptFileTask(sheet).prompts[0] for sheet in dict.fromkeys(sheets)}
    return [prompts[sheet] for sheet in sheets]


def _require_blind(reward: str) -> None:
    seeing = [t.name for t in parse(reward) if t.name in BUILT_IN and not BUILT_IN[t.name].blind]
    if seeing:
        raise UserError(f"reward = {seeing[0]!r} looks at prompts: give --prompts, a file with one for each picture")


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
    row = {"file": file.as_posix(), "prompt": prompt.text, "score": number(scores.values), "parts": parts}
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


def serve(name: str, host: str, port: int, timeout: float, console: Console) -> None:
    """Serves a reward until Ctrl-C. It scores in a process of its own: one that hangs or dies is started again."""
    reward = Workers(name, load_reward, processes=1, timeout=timeout, chunk=SERVED_AT_ONCE)
    try:
        server = RewardServer(name, reward, host=host, port=port, token=os.environ.get(TOKEN))
        reward.start()
        console.print(f"Serving {name} at {server.url}: train with --reward {server.url}. Ctrl-C ends it.")
        server.serve_forever()
    except KeyboardInterrupt:
        console.print("Stopped.")
    finally:
        reward.close()
