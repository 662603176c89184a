"""`tdm-r1 score`."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from pathlib import Path

import tyro
from rich.console import Console
from tyro.conf import Positional

from ..rewards.settings import ScoringConfig


@dataclass
class Score:
    """Scores a folder of pictures with a reward; nothing is trained."""

    images: Positional[Path]
    """A folder of pictures; sub-folders count."""
    reward: str
    """As in training: a name (`tdm-r1 rewards`), my_rewards.py:function, a server's URL, or a weighted sum."""
    prompts: Path | None = None
    """A .txt with a line a picture in the order of their names (2.png before 10.png), or .jsonl rows with 'file'
    (or 'file_name'), 'prompt' and metadata."""
    out: Path | None = None
    """Write one JSON line a picture."""
    workers: int = 0
    """Worker processes; 0 scores in this one."""
    timeout: float = 60.0
    """Seconds that a worker or a server may take for a chunk."""
    chunk: int = 16
    """Pictures scored at once."""


def main(args: list[str]) -> int:
    command = tyro.cli(Score, args=args, prog="tdm-r1 score")
    from ..rewards.folder import score_folder

    config = ScoringConfig(workers=command.workers, timeout=command.timeout, chunk=command.chunk)
    scores = score_folder(command.reward, command.images, command.prompts, command.out, config, Console())
    if all(math.isnan(value) for value in scores.values):
        print("tdm-r1: no image has a score", file=sys.stderr)
        return 1
    return 0
