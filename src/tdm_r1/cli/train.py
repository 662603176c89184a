"""`tdm-r1 train` and `tdm-r1 distill`."""

from __future__ import annotations

import gc
import io
import os
from collections.abc import Callable
from contextlib import nullcontext, redirect_stderr
from dataclasses import dataclass
from functools import partial
from typing import Annotated

import tyro

from ..config.load import differences, load_recipe
from ..config.recipes import recipe_names
from ..config.run import CONFIG_FILE, RunConfig, dump
from ..errors import UserError


@dataclass
class Train:
    """Trains a recipe. Every setting can be overridden by its dotted name, such as --surrogate.draws 2."""

    config: Annotated[RunConfig, tyro.conf.arg(name="")]
    dry_run: bool = False
    """Print the resolved configuration and what it will need of a GPU, and stop; needs neither GPU nor hub."""
    start_from: Annotated[int | None, tyro.conf.arg(name="from")] = None
    """With --resume: go on from the checkpoint of this iteration instead of the last one; later ones are removed."""
    resume: bool = False
    """Go on from the run's last checkpoint, with the run's own settings but for those that are given here."""


def main(args: list[str], *, prog: str = "train") -> int:
    if not args or args[0] in ("-h", "--help"):
        print(f"usage: tdm-r1 {prog} RECIPE [--help] [overrides]\n\nrecipes: {', '.join(recipe_names())}")
        return 0 if args else 2
    parse = partial(_parse, args[1:], f"tdm-r1 {prog} {args[0]}")
    command = parse(default=Train(load_recipe(args[0])))
    if command.start_from is not None and not command.resume:
        raise UserError(f"--from = {command.start_from}: works only together with --resume; add --resume")
    if command.resume:
        command = _resumed(command, parse)
    if prog == "distill" and command.config.algorithm != "tdm":
        raise UserError(f"algorithm = {command.config.algorithm!r}: distill needs a recipe of tdm; use `tdm-r1 train`")
    if command.dry_run:
        _show(command.config)
        return 0
    from ..train.start import train

    train(command.config, resume=command.resume, start_from=command.start_from)
    return 0


def _is_first() -> bool:
    """Whether this is the one of the processes of a run that speaks."""
    return os.environ.get("RANK", "0") == "0"


def _parse(args: list[str], prog: str, default: Train) -> Train:
    """The command that the arguments make of ``default``; what is wrong with them is said once."""
    with nullcontext() if _is_first() else redirect_stderr(io.StringIO()):
        return tyro.cli(Train, args=args, prog=prog, default=default)


def _show(config: RunConfig) -> None:
    """Prints the configuration and what it needs."""
    gc.disable()  # a sixth of the time goes into searching what is imported and counted for garbage
    try:
        from ..train.estimate import needs

        print(dump(config) + "".join(f"# {line}\n" for line in needs(config).splitlines()), end="")
    finally:
        gc.enable()


def _resumed(command: Train, parse: Callable[..., Train]) -> Train:
    """The command with the settings that the run was started with, wherever the command line does not name others."""
    asked = command.config
    if not (asked.folder / CONFIG_FILE).is_file():
        return command
    own = load_recipe(str(asked.folder.resolve())).override({"output": asked.output, "name": asked.name})
    command = parse(default=Train(own))
    made_by_the_run = ("model.student_lora", "model.fake_lora") if asked.distill_with else ()
    for name, recipes, kept in differences(asked, command.config):
        if name not in made_by_the_run and _is_first():
            print(f"{asked.folder} keeps its own {name} = {kept!r} (the recipe's is {recipes!r})")
    return command
