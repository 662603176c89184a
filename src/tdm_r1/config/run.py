"""The settings of a run. Each component's settings stand beside the component; this file composes them.

Unknown keys fail, and so do settings that contradict each other.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, Field, ValidationError, field_validator, model_validator

from ..algorithms.baseline_settings import DGPOConfig, FlowGRPOConfig, NFTConfig
from ..algorithms.registry import ALGORITHMS, CHECKS
from ..algorithms.release_settings import ReleaseConfig
from ..algorithms.settings import BalanceConfig, BatchConfig, SamplerConfig, SurrogateConfig, TDMConfig
from ..errors import UserError
from ..models.settings import ModelConfig, check_model
from ..plugins import Registry
from ..rewards.settings import ScoringConfig, require_no_secret
from ..settings import SHAPES_CHECKPOINT, STARTS_RUN, Settings
from ..tasks.registry import TASKS, WITHOUT_METRICS
from ..tasks.settings import TaskConfig, check_task

CONFIG_FILE, LOG = "config.yaml", "metrics.jsonl"  # in a run's folder
TRACKERS = Registry("trackers", {})


class EvalConfig(Settings):
    """Evaluation during a run, always on the same prompts and noise."""

    every: int = Field(50, ge=0, description="Iterations between evaluations; 0 for the start and the end alone.")
    prompts: int = Field(150, ge=1)
    images_per_prompt: int = Field(4, ge=1, description="default: GenEval.")
    seed: int = Field(1234, ge=0, description="Seed of the evaluation noise; not used in training.")
    grid_prompts: int = Field(12, ge=0, description="Images in the sample grid.")
    also: tuple[str, ...] = Field(
        (), description="Other tasks whose metrics are reported as task/metric: what training on one does to another."
    )

    best: str = Field(
        "reward",
        description="The metric of evaluations (strict, mini/frechet, ...) whose best checkpoint is kept; default: "
        "ours.",
    )
    alarm_at: float = Field(
        3.0,
        gt=0,
        description="Multiples of its noise by which a held-out metric may get worse than at the start before it "
        "raises an alarm (docs/rewards.md); default: ours.",
    )
    on_alarm: Literal["warn", "stop", "back"] = Field(
        "warn",
        description="At an alarm: say so; end the run too; or end it and export the last evaluated checkpoint before "
        "the first alarm.",
    )

    @field_validator("also")
    @classmethod
    def _known(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for name in value:
            TASKS.check(name, "evaluation.also")
            if name in WITHOUT_METRICS:
                raise ValueError(f"evaluation.also = {name!r}: this task has no metrics of its own; leave it out")
        return value


class RunConfig(Settings):
    """A whole run."""

    algorithm: str = Field(
        "tdm_r1",
        description="tdm_r1, tdm_r1_release (the authors' training code), tdm; the baselines dgpo, flow_grpo, nft and "
        "tdm_direct_rl; or your own as package.module:Class.",
        json_schema_extra=SHAPES_CHECKPOINT,
    )
    algorithm_settings: dict[str, Any] = Field({}, description="Settings of an algorithm of your own.")
    name: str = Field("run", description="The run's folder inside `output`.")
    output: Path = Path("runs")
    seed: int = Field(0, ge=0, description="Seed of prompts, noise and adapter initialisation.")
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
        description="A name (`tdm-r1 rewards`), my_rewards.py:function, package.module:Name, a server's URL, or a sum: "
        "'ocr + 0.5*mini'.",
    )
    trackers: tuple[str, ...] = Field(
        (), description="Where metrics and images go beside the run's folder: your own as package.module:Class."
    )
    scoring: ScoringConfig = ScoringConfig()
    model: ModelConfig = ModelConfig()
    task: TaskConfig = TaskConfig()
    batch: BatchConfig = BatchConfig()
    sampler: SamplerConfig = SamplerConfig()
    tdm: TDMConfig = TDMConfig()
    surrogate: SurrogateConfig = SurrogateConfig()
    balance: BalanceConfig = BalanceConfig()
    release: ReleaseConfig = ReleaseConfig()
    dgpo: DGPOConfig = DGPOConfig()
    flow_grpo: FlowGRPOConfig = FlowGRPOConfig()
    nft: NFTConfig = NFTConfig()
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
                raise UserError(
                    f"unknown setting {name} = {value!r}: {'.'.join(parents)} is not a group of settings; see "
                    "`tdm-r1 train RECIPE --help`"
                )
            place[last] = value
        return validate(values)

    @field_validator("algorithm")
    @classmethod
    def _known_algorithm(cls, value: str) -> str:
        ALGORITHMS.check(value)
        return value

    @field_validator("name")
    @classmethod
    def _inside_output(cls, value: str) -> str:
        parts = Path(value).parts
        if not value.strip() or not parts or Path(value).is_absolute() or ".." in parts or "\0" in value:
            raise ValueError(
                f"name = {value!r}: the run's folder lies inside output; give a name, and --output for where"
            )
        return value

    @field_validator("reward")
    @classmethod
    def _without_secrets(cls, value: str) -> str:
        require_no_secret(value, "reward")
        return value

    @field_validator("trackers")
    @classmethod
    def _known_trackers(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for name in value:
            TRACKERS.check(name)
        return value

    @model_validator(mode="after")
    def _check(self) -> RunConfig:
        check_model(self.model)
        check_task(self.task)
        if self.distill_with and self.model.roles == "full":
            raise ValueError(
                f"distill_with = {self.distill_with!r} with model.roles = full: a LoRA starts adapters alone; set it "
                "to null"
            )
        if self.task.kl and not self.batch.kl_prompts:
            raise ValueError(
                f"task.kl = {self.task.kl!r} with batch.kl_prompts = 0: nothing is drawn from it; raise "
                "batch.kl_prompts, or set task.kl to null"
            )
        if self.algorithm in CHECKS:
            CHECKS[self.algorithm](self)
        return self


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
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "extra_forbidden":
        return f"unknown setting {where} = {first['input']!r}: see `tdm-r1 train RECIPE --help` for the known ones"
    if first["type"] == "value_error" and (not where or isinstance(first["input"], dict) or where in message):
        return message  # it names its fields
    return f"{where} = {first['input']!r}: {message}"


def dump(config: BaseModel) -> str:
    """A configuration as YAML that `load_recipe` reads back."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
