"""`tdm-r1 mini demo`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tyro
from rich.console import Console


@dataclass
class Demo:
    """Reinforces the bundled 4-step mini model on this machine and shows base, before and after."""

    recipe: str = "mini"
    """Which recipe; mini_full takes longer and goes further."""
    seed: int = 0
    """Seed of the run; results depend on it and on the processor's rounding."""
    output: Path = Path("runs")
    """Where runs go."""


def main(args: list[str]) -> int:
    command = tyro.cli(Demo, args=args, prog="tdm-r1 mini demo")
    from ..report import fresh_run, reinforce

    reinforce(fresh_run(command.recipe, command.seed, command.output, "demo"), Console())
    return 0
