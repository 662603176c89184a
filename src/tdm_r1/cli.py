"""The command line: ``tdm-r1 COMMAND``; `_usage` lists the commands.

Heavy imports stand inside the commands, so that help and errors come at once.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import tyro
from tyro.conf import Positional

from .errors import UserError
from .recipes import recipe_names

if TYPE_CHECKING:
    from .config import TrainCommand


@dataclass
class Sample:
    """Samples pictures with the few-step sampler."""

    prompt: str
    """What to draw; several prompts are separated by |."""
    lora: str | None = None
    """A LoRA folder or hub id, such as runs/mini/lora; with @0.125 behind it where its publisher loads it at such a
    strength. With a mini model the default is its bundled 4-step student."""
    model: str | None = None
    """'mini', 'mini_signs', a hub id or a pipeline folder. This and what follows down to max_sequence_length: as in the
    run that wrote the LoRA, if its folder still lies there; else 'mini'."""
    images: int = 4
    """Pictures a prompt."""
    steps: int | None = None
    """Forward evaluations a picture; else 4."""
    shift: float | None = None
    """Shift of the time grid; else 3."""
    solver: Literal["euler", "dpm", "stochastic"] | None = None
    """As the LoRA was trained: the recipes for real models train with dpm; else euler."""
    resolution: int | None = None
    """Side of the pictures in px; else the model's own, though a LoRA may have been trained at another."""
    t5: bool | None = None
    """SD3: whether T5 reads prompts; else it does."""
    max_sequence_length: int | None = None
    """T5 tokens; else 256. A mini model knows its own."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of the weights; auto is bfloat16 on a GPU, float32 elsewhere."""
    offload: bool = False
    """Keep text encoders and autoencoder in main memory while nobody needs them."""
    seed: int = 0
    """Of the noise."""
    out: Path = Path("sample.png")
    """A PNG: one picture, or a grid of several."""


@dataclass
class Eval:
    """Compares LoRAs and the many-step base on a recipe's prompts, all from the same noise.

    Goes on where it was interrupted: every picture is a file, and so are the scores of every metric; delete the folder
    `scores` after changing what a reward of your own imports, or what a server serves. Writes results.json, table.md
    and grid.png.
    """

    recipe: Positional[str]
    """A recipe's name, a YAML file or a run's folder: its task, reward and sampler."""
    lora: tuple[str, ...] = ()
    """LoRAs to evaluate, by folder or hub id, with @0.125 behind one that its publisher loads at such a strength; a
    mini model's name is its bundled 4-step student, none is no LoRA."""
    base_steps: int = 20
    """Euler steps of the guided many-step base, which is evaluated first; 0 leaves it out."""
    guidance: tuple[float, ...] = (3.0,)
    """Guidance scales of the base."""
    metrics: tuple[str, ...] = ()
    """Rewards beside the recipe's own, such as aesthetic imagereward (`tdm-r1 rewards`)."""
    metrics_prompts: Path | None = None
    """Prompts that --metrics are measured on in place of the recipe's, one picture each: the paper's table has those
    of DrawBench. A file, or OWNER/NAME/FILE of a hub's dataset."""
    prompts: int | None = None
    """Instead of the recipe's number."""
    images_per_prompt: int | None = None
    """Instead of the recipe's number."""
    out: Path | None = None
    """The folder; evaluations/NAME if not given."""
    shard: str = "1/1"
    """Which share of the pictures this process makes: 1/4 to 4/4 in four of them."""


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


@dataclass
class ServeReward:
    """Serves a reward over HTTP, for training elsewhere or in another environment.

    POST /score takes JSON with images (base64 PNG or raw arrays), prompts and metadata. Listening on anything but
    loopback needs a token in the environment variable TDM_R1_TOKEN, on both sides.
    """

    reward: Positional[str]
    """A name (`tdm-r1 rewards`) or my_rewards.py:function."""
    host: str = "127.0.0.1"
    port: int = 8000
    timeout: float = 600.0
    """Seconds that the reward may take for a request; then it is stopped and started again."""


@dataclass
class ImportRelease:
    """Turns a checkpoint that the authors released (Z-Image: TDM-R1; SD3.5-Medium: TDM) into a LoRA for diffusers.

    Only tensors are unpickled; a file with anything else, or whose shapes do not fit, is refused. Not yet run on the
    real files: compare pictures, since shapes alone cannot show that the tensors have the assumed order.
    """

    checkpoint: Positional[Path]
    """tdmr1_zimage_ema.ckpt or tdm_sd3-5_lora.ckpt."""
    out: Path = Path("released_lora")
    """The LoRA's folder."""


@dataclass
class Demo:
    """Reinforces the bundled 4-step mini model on this machine and shows base, before and after."""

    recipe: str = "mini"
    """Which recipe; mini_full takes longer and goes further."""
    seed: int = 0
    """Seed of the run; results depend on it and on the processor's rounding."""
    output: Path = Path("runs")
    """Where runs go."""


@dataclass
class Study:
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


@dataclass
class Bundle:
    """Puts a distilled run's LoRAs beside a mini pipeline folder, so that TDM_R1_MINI can point to it."""

    run: Positional[Path]
    """The folder of a finished `tdm-r1 distill mini_distill` run."""
    model: Path = Path("runs/mini_pretrain/model")
    """The pipeline folder that `tdm-r1 mini pretrain` wrote."""


def main(argv: list[str] | None = None) -> int:
    """The entry point. Errors that a user can mend are one line on stderr and exit code 2."""
    args = list(sys.argv[1:] if argv is None else argv)
    _quiet_libraries()
    try:
        code = _dispatch(args)
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # who reads has seen enough, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python complains at its end
        return 141  # 128 + SIGPIPE, as of any program that is stopped so
    except (UserError, ValueError, FloatingPointError, OSError) as error:
        print(f"tdm-r1: {_one_line(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("tdm-r1: interrupted", file=sys.stderr)
        return 130


def _one_line(error: Exception) -> str:
    from pydantic import ValidationError

    if isinstance(error, ValidationError):
        from .config import describe

        return describe(error)
    return " ".join(str(error).split())


def _quiet_libraries() -> None:
    """Keeps diffusers' and transformers' loading bars and advice off a terminal that shows our own progress.

    They read these variables when they are imported, which is before anybody could call them.
    """
    for name in ("TRANSFORMERS_VERBOSITY", "DIFFUSERS_VERBOSITY"):
        os.environ.setdefault(name, "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


def _dispatch(args: list[str]) -> int:
    command = args[0] if args else "--help"
    if command == "mini":
        name = f"mini {args[1] if len(args) > 1 else '--help'}"
        rest = args[2:]
    else:
        name, rest = command, args[1:]
    commands: dict[str, Callable[[list[str]], int]] = {
        "train": _train,
        "distill": _distill,
        "sample": _sample,
        "eval": _eval,
        "rewards": _rewards,
        "score": _score,
        "serve-reward": _serve_reward,
        "import-release": _import_release,
        "mini demo": _demo,
        "mini study": _study,
        "mini pretrain": _pretrain,
        "mini bundle": _bundle,
        "mini path": _path,
    }
    if name in commands:
        return commands[name](rest)
    text = _usage()
    if command in ("-h", "--help") or name == "mini --help" or name == "mini -h":
        print(text)
        return 0
    raise UserError(f"unknown command {name!r}: known are {', '.join(commands)}")


def _usage() -> str:
    return f"""usage: tdm-r1 COMMAND [--help]

  train RECIPE     reinforce (or distil) a few-step model; settings by dotted name: --iterations 50
  distill RECIPE   TDM distillation of a many-step model to few steps
  sample           pictures from a model and a LoRA
  eval RECIPE      a table of LoRAs and the many-step base: reward, other rewards, held-out metrics
  rewards          the rewards that are known by name, and which of them work here
  score            scores of a folder of pictures
  serve-reward     a reward behind HTTP, in an environment of its own
  import-release   the authors' checkpoints (Z-Image, SD3.5-Medium) as a LoRA for diffusers
  mini demo        the main job on the bundled mini model, with a before/after table and picture
  mini study       the same over seeds, filed in docs/results
  mini pretrain    make a mini base model from a seed
  mini bundle RUN  put a distilled run's LoRAs beside a pretrained mini model
  mini path        print the folder of a bundled model

recipes: {", ".join(recipe_names())}; or a YAML file; or a run's folder (with --resume)"""


def _train(args: list[str], *, prog: str = "train") -> int:
    if not args or args[0] in ("-h", "--help"):
        print(f"usage: tdm-r1 {prog} RECIPE [--help] [overrides]\n\nrecipes: {', '.join(recipe_names())}")
        return 0 if args else 2
    from .config import TrainCommand, dump, load_recipe

    parse = partial(tyro.cli, TrainCommand, args=args[1:], prog=f"tdm-r1 {prog} {args[0]}")
    command = parse(default=TrainCommand(load_recipe(args[0])))
    if command.start_from is not None and not command.resume:
        raise UserError(f"--from = {command.start_from}: it goes with --resume")
    if command.resume:
        command = _resumed(command, parse)
    if prog == "distill" and command.config.algorithm != "tdm":
        raise UserError(f"algorithm = {command.config.algorithm!r}: distill wants a recipe of tdm; use `tdm-r1 train`")
    if command.dry_run:
        from .estimate import needs

        print(dump(command.config) + "".join(f"# {line}\n" for line in needs(command.config).splitlines()), end="")
        return 0
    from .trainer import train

    train(command.config, resume=command.resume, start_from=command.start_from)
    return 0


def _resumed(command: TrainCommand, parse: Callable[..., TrainCommand]) -> TrainCommand:
    """The command with the settings that the run was started with, wherever the command line does not name others."""
    from .config import CONFIG_FILE, TrainCommand, differences, load_recipe

    asked = command.config
    if not (asked.folder / CONFIG_FILE).is_file():
        return command
    own = load_recipe(str(asked.folder.resolve())).override({"output": asked.output, "name": asked.name})
    command = parse(default=TrainCommand(own))
    made_by_the_run = ("model.student_lora", "model.fake_lora") if asked.distill_with else ()
    for name, recipes, kept in differences(asked, command.config):
        if name not in made_by_the_run:
            print(f"{asked.folder} keeps its own {name} = {kept!r} (the recipe's is {recipes!r})")
    return command


def _distill(args: list[str]) -> int:
    return _train(args, prog="distill")


def _sample(args: list[str]) -> int:
    from .sampling import sample_command

    sample_command(tyro.cli(Sample, args=args, prog="tdm-r1 sample"))
    return 0


def _eval(args: list[str]) -> int:
    from .comparison import eval_command

    eval_command(tyro.cli(Eval, args=args, prog="tdm-r1 eval"))
    return 0


def _rewards(args: list[str]) -> int:
    if args:
        print("usage: tdm-r1 rewards\n\nLists the rewards that are known by name, and which of them work here.")
        return 0 if args[0] in ("-h", "--help") else 2
    from rich.console import Console

    from .rewards.commands import list_rewards

    list_rewards(Console())
    return 0


def _score(args: list[str]) -> int:
    command = tyro.cli(Score, args=args, prog="tdm-r1 score")
    from rich.console import Console

    from .rewards import ScoringConfig
    from .rewards.commands import score_folder

    config = ScoringConfig(workers=command.workers, timeout=command.timeout, chunk=command.chunk)
    scores = score_folder(command.reward, command.images, command.prompts, command.out, config, Console())
    if all(math.isnan(value) for value in scores.values):
        print("tdm-r1: no picture has a score", file=sys.stderr)
        return 1
    return 0


def _serve_reward(args: list[str]) -> int:
    command = tyro.cli(ServeReward, args=args, prog="tdm-r1 serve-reward")
    from rich.console import Console

    from .rewards.commands import serve

    serve(command.reward, command.host, command.port, command.timeout, Console())
    return 0


def _import_release(args: list[str]) -> int:
    command = tyro.cli(ImportRelease, args=args, prog="tdm-r1 import-release")
    from .release import convert_release

    print(f"Wrote {convert_release(command.checkpoint, command.out)}")
    return 0


def _demo(args: list[str]) -> int:
    command = tyro.cli(Demo, args=args, prog="tdm-r1 mini demo")
    from rich.console import Console

    from .mini.report import fresh_run, reinforce

    reinforce(fresh_run(command.recipe, command.seed, command.output, "demo"), Console())
    return 0


def _study(args: list[str]) -> int:
    command = tyro.cli(Study, args=args, prog="tdm-r1 mini study")
    from rich.console import Console

    from .mini.report import study

    label = command.label or ("demo" if command.recipe == "mini" else Path(command.recipe).stem)
    study(command.recipe, command.seeds, label, command.output, command.out, Console())
    return 0


def _pretrain(args: list[str]) -> int:
    from .mini.build import MiniConfig, build, preset

    name, rest = _mini_model(args)
    out = build(tyro.cli(MiniConfig, default=preset(name), args=rest, prog=f"tdm-r1 mini pretrain {name}"))
    print(f"Wrote {out}")
    return 0


def _bundle(args: list[str]) -> int:
    command = tyro.cli(Bundle, args=args, prog="tdm-r1 mini bundle")
    from .mini.build import bundle_student

    bundle_student(command.run, command.model)
    print(f"Wrote the 4-step LoRAs into {command.model}")
    return 0


def _path(args: list[str]) -> int:
    from .mini.bundle import bundle_path

    print(bundle_path(_mini_model(args)[0]))
    return 0


def _mini_model(args: list[str]) -> tuple[str, list[str]]:
    """The mini model that the first argument names, 'mini' if none does, and the other arguments."""
    from .mini.bundle import MODELS

    if not args or args[0].startswith("-"):
        return "mini", args
    if args[0] not in MODELS:
        raise UserError(f"unknown mini model {args[0]!r}: known are {', '.join(MODELS)}")
    return args[0], args[1:]


if __name__ == "__main__":
    sys.exit(main())
