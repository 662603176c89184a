"""`tdm-r1 study`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro
from rich.console import Console
from tyro.conf import Positional

from ...errors import UserError


@dataclass
class StudyCommand:
    """Compares TDM-R1 with the paper's baselines and ablations on a mini model, on equal numbers of scored images.

    Rows that are finished with the same settings are kept, so that the same command goes on where it was stopped. It
    takes hours on two CPU cores: see --only.
    """

    world: Positional[Literal["mini", "mini_signs"]] = "mini"
    only: tuple[str, ...] = ()
    """Rows to run, by name; all of the page's first part if none is given. --list prints them."""
    seeds: tuple[int, ...] = (0, 1)
    scored: int = 7680
    """Images that each method has scored."""
    prompts: int = 300
    """Prompts of an evaluation, with four images each."""
    results: Path = Path("docs/results/study")
    """Where records, page, curves and grid go."""
    runs: Path = Path("runs/study")
    list: bool = False
    """Print the rows and stop."""


def main(args: list[str]) -> int:
    command = tyro.cli(StudyCommand, args=args, prog="tdm-r1 study")
    from ..study_search import ALL

    if command.list:
        width = max(len(row.name) for row in ALL) + 2
        for row in ALL:
            print(f"{row.name:<{width}}{row.what}")
        return 0
    names = {row.name for row in ALL}
    if unknown := [name for name in command.only if name not in names]:
        raise UserError(f"--only = {unknown[0]!r}: no such row; --list prints them")
    rows = [r for r in ALL if (r.name in command.only if command.only else r.group == "methods")]
    if command.world != "mini" and (wrong := [row.name for row in rows if row.group == "rewards"]):
        raise UserError(f"--only = {wrong[0]!r} with {command.world}: these rewards read shapes; use the world mini")
    from ..study import Study, run_study

    study = Study(command.world, command.scored, command.prompts, rows, command.seeds, command.results, command.runs)
    run_study(study, Console())
    return 0
