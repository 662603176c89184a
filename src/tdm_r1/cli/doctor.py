"""`tdm-r1 doctor`."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from functools import partial
from typing import Annotated

import tyro
from rich.console import Console

from ..config.load import load_recipe
from ..config.recipes import recipe_names
from ..config.run import RunConfig

MARKS = {True: "[green]ok  [/]", None: "[yellow]note[/]", False: "[red]fix [/]"}


@dataclass
class Doctor:
    """Checks what a recipe needs before it is started.

    Device, memory, disk, models, prompts, every reward on a picture, one timed iteration. Exit status 0: it can start.
    """

    config: Annotated[RunConfig, tyro.conf.arg(name="")]
    iteration: bool = True
    """Load the model and time an iteration of one micro-batch (--no-iteration: do not)."""


def main(args: list[str]) -> int:
    if not args or args[0] in ("-h", "--help"):
        print(f"usage: tdm-r1 doctor RECIPE [--help] [overrides]\n\nrecipes: {', '.join(recipe_names())}")
        return 0 if args else 2
    parse = partial(tyro.cli, Doctor, args=args[1:], prog=f"tdm-r1 doctor {args[0]}")
    command: Doctor = parse(default=Doctor(load_recipe(args[0])))
    from rich.markup import escape

    from ..train.doctor import examine

    console, broken = Console(), 0
    for found in examine(command.config, iteration=command.iteration):
        console.print(f"{MARKS[found.ok]} {found.what}: {escape(found.text)}", highlight=False, soft_wrap=True)
        broken += found.ok is False
    if broken:
        console.print(f"\n{broken} to fix before this can run.")
        return 1
    given = shlex.join(a for a in args if a != "--no-iteration")
    console.print(f"\nReady. Start it with: tdm-r1 train {given}", markup=False, highlight=False, soft_wrap=True)
    return 0
