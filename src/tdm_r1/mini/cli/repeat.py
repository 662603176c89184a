"""`tdm-r1 mini repeat`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tyro
from rich.console import Console
from tyro.conf import Positional


@dataclass
class Repeat:
    """Runs a recipe over seeds and files the figures in docs/results, as JSON and as a page.

    Seeds that an interrupted study had finished, with the same settings, are not run again.
    """

    recipe: Positional[str] = "mini"
    seeds: tuple[int, ...] = (0, 1, 2)
    label: str | None = None
    """Name in the results; 'demo' for the recipe mini, else the recipe's own."""
    out: Path | None = None
    """The JSON file; docs/results/TASK.json if not given."""
    output: Path = Path("runs")


def main(args: list[str]) -> int:
    command = tyro.cli(Repeat, args=args, prog="tdm-r1 mini repeat")
    from ..report import study

    label = command.label or ("demo" if command.recipe == "mini" else Path(command.recipe).stem)
    study(command.recipe, command.seeds, label, command.output, command.out, Console())
    return 0
