"""`tdm-r1 eval`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro
from rich.console import Console
from tyro.conf import Positional

from ..config.load import load_recipe, run_of
from ..config.run import RunConfig
from ..errors import UserError
from ..evaluate.comparison import Comparison
from ..evaluate.evaluation import Sampling
from ..evaluate.folder import Model
from ..evaluate.table import shown, with_other_prompts
from ..models.registry import lora_path, with_strength
from ..models.specification import Role
from ..rewards.registry import GIVEN
from ..tasks.prompt_files import read_prompts


@dataclass
class Eval:
    """Compares LoRAs and the many-step base on a recipe's prompts, all from the same noise.

    An interrupted evaluation continues where it stopped: images and scores are saved as files. Delete the folder
    `scores` if you change a module that your reward imports, or a server's reward. Writes results.json, table.md and
    grid.png.
    """

    recipe: Positional[str]
    """A recipe's name, a YAML file or a run's folder: its task, reward and sampler."""
    lora: tuple[str, ...] = ()
    """LoRAs to evaluate, by folder or hub id. Append @0.125 if the publisher loads it at that scale. 'mini' or
    'mini_signs': the bundled 4-step student. 'none': no LoRA."""
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
    """Number of prompts; default: the recipe's."""
    images_per_prompt: int | None = None
    """Images per prompt; default: the recipe's."""
    out: Path | None = None
    """The folder; evaluations/NAME if not given."""
    shard: str = "1/1"
    """Which share of the pictures this process makes: 1/4 to 4/4 in four of them."""


def main(args: list[str]) -> int:
    command = tyro.cli(Eval, args=args, prog="tdm-r1 eval")
    console = Console()
    config = load_recipe(command.recipe)
    asked = {"evaluation.prompts": command.prompts, "evaluation.images_per_prompt": command.images_per_prompt}
    config = config.override({name: value for name, value in asked.items() if value is not None})
    models = models_of(config, command.lora, command.base_steps, command.guidance)
    if not models:
        raise UserError("nothing to evaluate: give --lora, or --base-steps above 0")
    for model in models:
        trained = run_of(model.lora) if model.lora else None
        if trained and trained.model.path != config.model.path:
            console.print(
                f"{model.name} was trained on {trained.model.path}, but is evaluated on {config.model.path}",
                style="yellow",
                markup=False,
            )
    comparisons = _comparisons(command, config, models, console)
    for comparison in comparisons:
        comparison.sample()
    if waiting := sum(len(c.missing(m)) for c in comparisons for m in models):
        console.print(
            f"This share is done. {waiting} pictures of other shares are missing; the last one writes the table."
        )
        return 0
    main, *elsewhere = comparisons
    result = main.result()
    for comparison in elsewhere:
        other = comparison.result()
        comparison.write(other)
        result = with_other_prompts(result, other, str(comparison.config.task.prompts))
    table = main.write(result)
    console.print(shown(result))
    console.print(f"Wrote {table}, results.json and grid.png beside it")
    return 0


def _comparisons(command: Eval, config: RunConfig, models: list[Model], console: Console) -> list[Comparison]:
    """The recipe's prompts, and those that the metrics have to themselves."""
    out, path = command.out or Path("evaluations") / config.name, command.metrics_prompts
    shard = parse_shard(command.shard)
    own = [config.reward]
    if config.reward.startswith(GIVEN):
        console.print(
            f"{config.reward} was given to the run in Python: it is left out here", style="yellow", markup=False
        )
        own = []
    if not path:
        return [Comparison(config, models, [*own, *command.metrics], out, shard=shard, console=console)]
    if not command.metrics:
        raise UserError(f"--metrics-prompts = {str(path)!r}: say with --metrics what is measured on them")
    other = _on_prompts(config, path)
    return [
        Comparison(config, models, own, out, shard=shard, console=console),
        Comparison(other, models, command.metrics, out / "metrics", shard=shard, console=console),
    ]


def _on_prompts(config: RunConfig, path: Path) -> RunConfig:
    """The run's settings for an evaluation on every prompt of ``path``, one picture each."""
    n = len(read_prompts(path, "--metrics-prompts"))
    task = {"task.name": "prompts", "task.prompts": path, "task.eval_prompts": None, "task.weights": None}
    return config.override(task | {"evaluation.prompts": n, "evaluation.images_per_prompt": 1})


def parse_shard(text: str) -> tuple[int, int]:
    """``2/4`` as (1, 4). Raises UserError on anything else."""
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        raise UserError(f"--shard = {text!r}: write NUMBER/OF, such as 1/4")
    return int(match[1]) - 1, int(match[2])


def models_of(config: RunConfig, loras: Sequence[str], base_steps: int, guidance: Sequence[float]) -> list[Model]:
    """The many-step base at each guidance, then each LoRA; "none" is the student as it is (a Turbo model)."""
    s = config.sampler
    few = Sampling(Role.GENERATOR, s.steps, s.shift, s.solver, s.guidance)
    base = [Model(f"base, guidance {g:g}", Sampling(Role.TEACHER, base_steps, s.shift, guidance=g)) for g in guidance]
    students = [_student(name, few) for name in loras]
    return [*(base if base_steps else []), *students]


def _student(name: str, few: Sampling) -> Model:
    if name == "none":
        return Model(name, few)
    lora, strength = with_strength(name)
    return Model(name, few, lora_path(lora), strength)
