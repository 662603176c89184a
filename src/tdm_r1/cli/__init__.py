"""The command line: ``tdm-r1 COMMAND``. Each command is a file, imported when it is called."""

from __future__ import annotations

import os
import sys
import time
from importlib import import_module

from ..errors import RAISED_ELSEWHERE, RAISED_HERE, UserError

COMMANDS = {  # name: (module, what help says of it)
    "train": ("tdm_r1.cli.train", "RECIPE: reinforce (or distil) a few-step model; settings by dotted name"),
    "doctor": ("tdm_r1.cli.doctor", "RECIPE: checks everything that a run needs, before it is started"),
    "distill": ("tdm_r1.cli.distill", "RECIPE: TDM distillation of a many-step model to few steps"),
    "sample": ("tdm_r1.cli.sample", "images from a model and a LoRA"),
    "eval": ("tdm_r1.cli.eval", "RECIPE: a table of LoRAs and the many-step base: reward and held-out metrics"),
    "rewards": ("tdm_r1.cli.rewards", "the rewards that are known by name, and which of them work here"),
    "score": ("tdm_r1.cli.score", "scores of a folder of images"),
    "serve-reward": ("tdm_r1.cli.serve_reward", "a reward behind HTTP, in an environment of its own"),
    "study": ("tdm_r1.mini.cli.study", "the paper's baselines and ablations side by side on a mini model"),
    "import-release": ("tdm_r1.cli.import_release", "the authors' checkpoints (Z-Image, SD3.5-Medium) as a LoRA"),
    "mini demo": ("tdm_r1.mini.cli.demo", "the main job on the bundled mini model: before/after table and picture"),
    "mini repeat": ("tdm_r1.mini.cli.repeat", "the same over seeds, filed in docs/results"),
    "mini pretrain": ("tdm_r1.mini.cli.pretrain", "make a mini base model from a seed"),
    "mini bundle": ("tdm_r1.mini.cli.bundle", "put a distilled run's LoRAs beside a pretrained mini model"),
    "mini path": ("tdm_r1.mini.cli.path", "print the folder of a bundled model"),
}


GRACE = 2.0  # seconds that a process leaves to the one that tells of their error: a launcher ends all at the first end


def main(argv: list[str] | None = None) -> int:
    """The entry point. Errors that a user can mend are one line on stderr and exit code 2."""
    args = list(sys.argv[1:] if argv is None else argv)
    _quiet_libraries()
    try:
        code = _dispatch(args)
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # the reader has closed the pipe, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python complains at its end
        return 141  # 128 + SIGPIPE, as of any program that is stopped so
    except (UserError, ValueError, FloatingPointError, OSError) as error:
        if who := _teller(error):
            print(f"{who}: {_one_line(error)}", file=sys.stderr)
        else:
            time.sleep(GRACE)
        return 2
    except SystemExit as end:  # of tyro, at arguments that are wrong
        if end.code and os.environ.get("RANK", "0") != "0":
            time.sleep(GRACE)
        raise
    except KeyboardInterrupt:
        print("tdm-r1: interrupted", file=sys.stderr)
        return 130


def _teller(error: Exception) -> str:
    """Who tells of an error; empty if this process is one of several and another tells."""
    rank, notes = os.environ.get("RANK", "0"), getattr(error, "__notes__", ())
    if rank == "0":
        return "" if RAISED_ELSEWHERE in notes else "tdm-r1"
    return f"tdm-r1, process {rank}" if RAISED_HERE in notes else ""


def _dispatch(args: list[str]) -> int:
    words = 2 if args[:1] == ["mini"] and args[1:2] not in ([], ["-h"], ["--help"]) else 1
    name, rest = " ".join(args[:words]), args[words:]
    if name in COMMANDS:
        return import_module(COMMANDS[name][0]).main(rest)
    if name in ("", "-h", "--help", "mini"):
        print(_usage())
        return 0
    raise UserError(f"unknown command {name!r}: known are {', '.join(COMMANDS)}")


def _usage() -> str:
    from ..config.recipes import recipe_names

    width = max(map(len, COMMANDS)) + 2
    lines = [f"  {name:<{width}}{summary}" for name, (_, summary) in COMMANDS.items()]
    recipes = f"recipes: {', '.join(recipe_names())}; or a YAML file; or a run's folder (with --resume)"
    return "\n".join(["usage: tdm-r1 COMMAND [--help]", "", *lines, "", recipes])


def _one_line(error: Exception) -> str:
    from pydantic import ValidationError

    if isinstance(error, ValidationError):
        from ..config.run import describe

        return describe(error)
    return " ".join(str(error).split())


def _quiet_libraries() -> None:
    """Keeps diffusers' and transformers' loading bars and advice off a terminal that shows our own progress.

    They read these variables when they are imported, which is before anybody could call them.
    """
    for name in ("TRANSFORMERS_VERBOSITY", "DIFFUSERS_VERBOSITY", "HF_HUB_VERBOSITY"):
        os.environ.setdefault(name, "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("PYDANTIC_ERRORS_INCLUDE_URL", "0")
