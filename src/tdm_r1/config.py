"""The configuration of a run: a pydantic schema, YAML recipes, dotted overrides. Unknown keys fail.

Each component's settings stand beside the component; this file composes them and checks what concerns several.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from .algorithms.tdm import SamplerConfig, TDMConfig
from .algorithms.tdm_r1 import BalanceConfig, SurrogateConfig
from .errors import UserError
from .recipes import recipe_names, recipe_text
from .rewards import ScoringConfig
from .settings import SHAPES_CHECKPOINT, STARTS_RUN, fixed_settings

CONFIG_FILE = "config.yaml"  # in a run's folder
TaskName = Literal["mini", "mini_signs", "prompts", "geneval"]
LORA_TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")


class LoraSettings(BaseModel):
    """The adapters that carry the roles."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    rank: int = Field(32, ge=1, description="Published.", json_schema_extra=SHAPES_CHECKPOINT)
    alpha: int = Field(
        64, ge=1, description="Published (the official Z-Image LoRA).", json_schema_extra=SHAPES_CHECKPOINT
    )
    targets: tuple[str, ...] = Field(
        LORA_TARGETS,
        description="Modules by the end of their names. Ours: attention.",
        json_schema_extra=SHAPES_CHECKPOINT,
    )


class ModelConfig(BaseModel):
    """Which weights play."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    path: str = Field(
        "mini", description="'mini', 'mini_signs', a hub id or a folder with a diffusers pipeline: student and teacher."
    )
    teacher: str | None = Field(None, description="Another pipeline as teacher, if the student's base differs.")
    student_lora: str | None = Field(
        None,
        description="A LoRA, by folder or hub id, that the generator starts from.",
        json_schema_extra=STARTS_RUN,
    )
    student_lora_scale: float | None = Field(
        None,
        gt=0,
        json_schema_extra=STARTS_RUN,
        description="Strength at which student_lora is meant to be loaded, where its publisher names one (TDM-SD3: "
        "0.125); needed for a file without adapter metadata.",
    )
    fake_lora: str | None = Field(
        None,
        description="A LoRA folder that the fake score starts from; else the model at `path`.",
        json_schema_extra=STARTS_RUN,
    )
    max_sequence_length: int = Field(256, ge=1, le=512, description="Tokens of a prompt; a mini model knows its own.")
    t5: bool = Field(
        True, description="SD3: load T5, by far the largest of its text encoders; without it CLIP alone reads prompts."
    )
    resolution: int | None = Field(None, ge=16, description="Side of the pictures in px; else the model's own.")
    dtype: Literal["float32", "bfloat16"] = Field("float32", description="Of the frozen backbone.")
    device: str = Field(
        "auto", description="auto, cpu or cuda; CUDA_VISIBLE_DEVICES says which GPU, to rewards in the process too."
    )
    roles: Literal["lora", "full"] = Field(
        "lora",
        description="Adapters on one backbone, or a copy for each role.",
        json_schema_extra=SHAPES_CHECKPOINT,
    )
    merge: bool = Field(
        False,
        description="Run roles that need no gradient as merged copies: faster for small models, costs memory; in "
        "float32 alone.",
    )
    gradient_checkpointing: bool = Field(
        False,
        description="Compute activations again in the backward rather than keep them: slower, far smaller.",
    )
    offload: bool = Field(
        False, description="Keep text encoders and autoencoder in main memory while nobody needs them."
    )
    decode_batch: int = Field(32, ge=1, description="Pictures that the autoencoder decodes at once.")
    vae_tiling: bool = Field(
        False, description="Decode pictures in overlapping tiles: less memory at high resolutions, faint seams."
    )
    lora: LoraSettings = LoraSettings()


class TaskConfig(BaseModel):
    """Where prompts come from."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: TaskName = Field(
        "mini",
        description="The mini world's shapes, its signs, a file of prompts, or prompts drawn from GenEval's families.",
    )
    prompts: Path | None = Field(
        None,
        description="A .txt (one a line), .jsonl, .csv or .tsv (prompt + metadata) file, or OWNER/NAME/FILE of a hub's "
        "dataset; for geneval, the official metadata to evaluate on.",
    )
    eval_prompts: Path | None = Field(
        None, description="A file of prompts to evaluate on, where task.prompts is trained on; else the same."
    )
    weights: dict[str, float] | None = Field(
        None, description="Share of each family in training; else equal (mini) or Flow-GRPO's (geneval)."
    )


class BatchConfig(BaseModel):
    """One iteration's samples."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    prompts: int = Field(8, ge=1, description="Prompts (groups) an iteration. Ours.")
    group: int = Field(24, ge=1, description="Samples a prompt that are scored, G. Published.")
    trained: int | None = Field(
        None, ge=1, description="Samples of a group in each update (extremes in the surrogate's); else all of them."
    )
    micro_batch: int = Field(128, ge=1, description="Samples that go through the network at once; changes no result.")


class EvalConfig(BaseModel):
    """Evaluation during a run, always on the same prompts and noise."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    every: int = Field(50, ge=0, description="Iterations between evaluations, 0 for the start and the end alone.")
    prompts: int = Field(150, ge=1)
    images_per_prompt: int = Field(4, ge=1, description="GenEval's 4.")
    seed: int = Field(1234, ge=0, description="Of the evaluation's noise; training never uses it.")
    grid_prompts: int = Field(12, ge=0, description="Pictures in the sample grid.")
    also: tuple[Literal["mini", "mini_signs"], ...] = Field(
        (), description="Other tasks whose metrics are reported as task/metric: what training on one does to another."
    )


class RunConfig(BaseModel):
    """A whole run."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    algorithm: Literal["tdm_r1", "tdm"] = Field("tdm_r1", json_schema_extra=SHAPES_CHECKPOINT)
    name: str = Field("run", description="The run's folder inside `output`.")
    output: Path = Path("runs")
    seed: int = Field(0, ge=0, description="Of prompts, noise and the adapters' start.")
    iterations: int = Field(100, ge=1)
    save_every: int = Field(25, ge=1, description="Iterations between checkpoints.")
    distill_with: str | None = Field(
        None,
        json_schema_extra=STARTS_RUN,
        description="A recipe of tdm that makes the few-step start first, in the run's folder; not needed where "
        "model.student_lora or a few-step model.path is the start.",
    )
    reward: str = Field(
        "mini",
        description="A name (`tdm-r1 rewards`), my_rewards.py:function, a server's URL, or a sum: 'ocr + 0.5*mini'.",
    )
    scoring: ScoringConfig = ScoringConfig()
    model: ModelConfig = ModelConfig()
    task: TaskConfig = TaskConfig()
    batch: BatchConfig = BatchConfig()
    sampler: SamplerConfig = SamplerConfig()
    tdm: TDMConfig = TDMConfig()
    surrogate: SurrogateConfig = SurrogateConfig()
    balance: BalanceConfig = BalanceConfig()
    evaluation: EvalConfig = EvalConfig()

    @property
    def folder(self) -> Path:
        """Where the run's files go."""
        return self.output / self.name

    def override(self, settings: dict[str, Any]) -> RunConfig:
        """A copy with settings changed by dotted name, ``{"surrogate.draws": 2}``. Raises UserError on bad ones."""
        values = self.model_dump()
        for name, value in settings.items():
            *parents, last = name.split(".")
            place: Any = values
            for parent in parents:
                place = place.get(parent) if isinstance(place, dict) else None
            if not isinstance(place, dict):
                raise UserError(f"unknown setting {name} = {value!r}: {'.'.join(parents)} is no group of settings")
            place[last] = value
        return validate(values)

    @model_validator(mode="after")
    def _check(self) -> RunConfig:
        if self.algorithm == "tdm_r1" and self.batch.group < 2:
            raise ValueError(f"batch.group = {self.batch.group}: TDM-R1 compares samples of a prompt, give >= 2")
        if self.batch.trained is not None and self.batch.trained > self.batch.group:
            raise ValueError(
                f"batch.trained = {self.batch.trained} is more than batch.group = {self.batch.group}: lower it"
            )
        self._check_samples()
        if self.surrogate.carried and self.model.roles == "full":
            raise ValueError(
                f"surrogate.carried = {self.surrogate.carried}: adapters carry; set it to 0 with model.roles = full"
            )
        loras = {
            "model.student_lora": self.model.student_lora,
            "model.fake_lora": self.model.fake_lora,
            "distill_with": self.distill_with,
        }
        if self.model.roles == "full" and (given := [f"{name} = {value!r}" for name, value in loras.items() if value]):
            raise ValueError(
                f"{given[0]} with model.roles = full: a LoRA starts adapters alone; merge it into the model at "
                "model.path and set this to null"
            )
        self._check_precision()
        if self.tdm.fake_scores == "two" and (self.sampler.steps < 2 or self.surrogate.reference == "fake"):
            raise ValueError(
                "tdm.fake_scores = two, one of them for x_0 alone: that needs sampler.steps >= 2 and a "
                f"surrogate.reference other than fake; they are {self.sampler.steps} and {self.surrogate.reference}. "
                "Change them, or set tdm.fake_scores to one"
            )
        prompts, name = self.task.prompts is not None, self.task.name
        if (name == "prompts" and not prompts) or (name in ("mini", "mini_signs") and prompts):
            raise ValueError(
                f"task.name = {name!r} with task.prompts = {self.task.prompts}: a file of prompts goes with "
                "task.name = prompts, which needs one, or geneval"
            )
        if self.task.weights is not None and name in ("mini_signs", "prompts"):
            raise ValueError(
                f"task.weights = {self.task.weights} with task.name = {name!r}, which has no families of prompts: set "
                "task.weights to null (--task.weights None)"
            )
        if self.task.eval_prompts is not None and name != "prompts":
            raise ValueError(f"task.eval_prompts goes with task.name = prompts, not with {name!r}")
        return self

    def _check_samples(self) -> None:
        """What an iteration's number of samples must allow."""
        b = self.batch
        if self.algorithm == "tdm_r1" and b.trained == 1:
            raise ValueError("batch.trained = 1: one sample of a group has nothing to be compared with; use 2 or more")
        if self.tdm.fake_scores == "two" and b.prompts * (b.trained or b.group) < 2:
            raise ValueError(
                "tdm.fake_scores = two with one sample an iteration: each fake score learns from half of them; raise "
                "batch.prompts or batch.group, or set tdm.fake_scores to one"
            )

    def _check_precision(self) -> None:
        """What is added to a copy of the backbone's weights is rounded as they are."""
        added = "model.merge" if self.model.merge else None
        if self.surrogate.carried and self.surrogate.weights == "full":
            added = "surrogate.carried with surrogate.weights = full"
        if added and self.model.dtype != "float32":
            raise ValueError(
                f"{added} adds to a copy of the backbone's weights, where small changes vanish in "
                f"{self.model.dtype}: set it off, or model.dtype to float32"
            )


@dataclass
class TrainCommand:
    """Trains a recipe. Every setting can be overridden by its dotted name, such as --surrogate.draws 2."""

    config: Annotated[RunConfig, tyro.conf.arg(name="")]
    dry_run: bool = False
    """Print the resolved configuration and what it will need of a GPU, and stop; needs neither GPU nor hub."""
    start_from: Annotated[int | None, tyro.conf.arg(name="from")] = None
    """With --resume: go on from the checkpoint of this iteration instead of the last one; later ones are removed."""
    resume: bool = False
    """Go on from the run's last checkpoint, with the run's own settings but for those that are given here."""


def load_recipe(name: str) -> RunConfig:
    """A recipe by name, by path, or a run's own configuration by its folder.

    A recipe may say ``extends: OTHER`` and give its differences alone. A run's configuration means the folder that it
    lies in, wherever that was copied.

    Raises UserError naming the field, the value and the fix.
    """
    values = _recipe_values(name)
    if not _is_folder(name):
        return validate(values)
    folder = Path(name) if Path(name).name not in ("", "..") else Path(name).resolve()
    try:
        config = validate(values).override({"output": folder.parent, "name": folder.name})
    except UserError as error:
        raise UserError(f"{folder / CONFIG_FILE}: {error}") from error
    return config.override(_own_distillation(config)) if config.distill_with else config


def _own_distillation(config: RunConfig) -> dict[str, str]:
    """The LoRAs that a run distilled for its start, where its folder lies now."""
    found = {}
    for name in ("student_lora", "fake_lora"):
        lora = Path(getattr(config.model, name) or "")
        here = config.folder / "distill" / lora.name
        if lora.parent.name == "distill" and here.is_dir():
            found[f"model.{name}"] = str(here)
    return found


def run_of(lora: str | Path) -> RunConfig | None:
    """The settings of the run that wrote a LoRA's folder, where they lie beside it and can be read."""
    folder = str(Path(lora).parent.resolve())  # in full: runs are often called as their recipes
    try:
        return load_recipe(folder) if _is_folder(folder) else None
    except UserError:
        return None  # of another version


def _is_folder(name: str) -> bool:
    return name not in recipe_names() and (Path(name) / CONFIG_FILE).is_file()


def differences(old: RunConfig, new: RunConfig) -> list[tuple[str, Any, Any]]:
    """(dotted name, old value, new value) of each setting that is not the same; where the folder is does not count."""
    a, b = (_flat(config.model_dump(mode="json", exclude={"output", "name"})) for config in (old, new))
    return [(name, a.get(name), b.get(name)) for name in a | b if a.get(name) != b.get(name)]


def require_same_run(before: RunConfig, now: RunConfig) -> None:
    """Raises UserError if a resumed run changes what it cannot: which weights its checkpoint holds, or its start."""
    shaping, starting = (fixed_settings(RunConfig, mark) for mark in (SHAPES_CHECKPOINT, STARTS_RUN))
    for name, old, new in differences(before, now):
        if name in shaping:
            raise UserError(
                f"{name} = {new!r}: the run was started with {old!r}, and its checkpoints hold weights for that; leave "
                f"{name} as it was, or start a new run with --model.student-lora {now.folder / 'lora'}"
            )
        if name in starting and not _same_path(old, new):
            raise UserError(
                f"{name} = {new!r}: the run was started with {old!r}, and a start is not made again on --resume; leave "
                f"{name} as it was, or start a new run"
            )


def _same_path(one: Any, other: Any) -> bool:
    return isinstance(one, str) and isinstance(other, str) and Path(one).resolve() == Path(other).resolve()


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def _recipe_values(name: str, seen: tuple[str, ...] = ()) -> Any:
    if name in seen:
        raise UserError(f"extends = {name!r}: recipe {name!r} extends itself; name another one")
    path = Path(name)
    if name in recipe_names():
        text = recipe_text(name)
    elif _is_folder(name):
        text = (path / CONFIG_FILE).read_text(encoding="utf-8")
    elif path.suffix in (".yaml", ".yml") and path.is_file():
        text = path.read_text(encoding="utf-8")
    else:
        raise UserError(
            f"recipe {name!r} is neither a run's folder, nor a YAML file, nor one of: {', '.join(recipe_names())}"
        )
    try:
        values = yaml.safe_load(text) or {}
    except yaml.YAMLError as error:
        raise UserError(f"recipe {name!r} is not valid YAML: {' '.join(str(error).split())}") from error
    if isinstance(values, dict) and "extends" in values:
        base = values.pop("extends")
        return _merged(_recipe_values(str(base), (*seen, name)), values)
    return values


def _merged(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """``base`` with ``changes`` in place of its own; groups of settings are merged key by key."""
    merged = dict(base)
    for key, value in changes.items():
        old = merged.get(key)
        merged[key] = _merged(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged


def validate(values: Any) -> RunConfig:
    """A RunConfig from plain values. Raises UserError in one line."""
    try:
        return RunConfig.model_validate(values)
    except ValidationError as error:
        raise UserError(describe(error)) from error


def describe(error: ValidationError) -> str:
    """One line for the first of pydantic's complaints: field, value, fix."""
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        return f"unknown setting {where} = {first['input']!r}: see `tdm-r1 train RECIPE --help` for the known ones"
    if first["type"] == "value_error" and (not where or isinstance(first["input"], dict)):  # it names its fields
        return first["msg"].removeprefix("Value error, ")
    return f"{where} = {first['input']!r}: {first['msg'].removeprefix('Value error, ')}"


def dump(config: BaseModel) -> str:
    """A configuration as YAML that `load_recipe` reads back."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
