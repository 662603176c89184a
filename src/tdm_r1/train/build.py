"""Builds what a run consists of from its settings."""

from __future__ import annotations

import torch

from ..algorithms.protocol import Algorithm
from ..algorithms.registry import ALGORITHMS
from ..config.run import TRACKERS, RunConfig
from ..errors import UserError
from ..models.create import create_roles
from ..models.load import adapter_settings, resolve_device, resolve_model
from ..models.lora_files import load_lora
from ..models.pipeline import PipelineBackbone
from ..models.roles import Roles
from ..rewards.scorer import Scorer
from ..rewards.scores import Reward
from ..tasks.load import load_task
from ..tasks.protocol import Task
from ..tasks.settings import TaskConfig


def algorithm_of(config: RunConfig) -> type[Algorithm]:
    """The algorithm's class. Raises ValueError if it is not there or cannot run with these settings."""
    found: type[Algorithm] = ALGORITHMS.load(config.algorithm)
    found.check(config)
    return found


def task_and_scorer(config: RunConfig, reward: Reward | None = None) -> tuple[Task, Scorer]:
    """Task and reward of a run, after everything was checked that can be without the model's weights.

    Raises ValueError or UserError on names, files and settings that do not fit.
    """
    algorithm_of(config)
    for name in config.trackers:
        TRACKERS.load(name)
    for name in config.evaluation.also:
        load_task(TaskConfig(name=name))
    task = load_task(config.task)
    scorer = Scorer(config.reward, config.scoring, reward=reward)
    names = [term.name for term in scorer.terms]
    for name in config.scoring.environments:
        if name not in names:
            raise UserError(f"scoring.environments has {name!r}: the reward is made of {', '.join(names)}; name one")
    scorer.check([*task.known, *task.eval_prompts(config.evaluation.prompts)])
    return task, scorer


def build_roles(config: RunConfig, student: PipelineBackbone, teacher: PipelineBackbone | None) -> Roles:
    """The roles that the algorithm declares, as they are before anything is loaded into them.

    Args:
        teacher: another backbone, where the teacher's base weights are not the student's.
    """
    torch.manual_seed(config.seed)  # peft initialises adapters from the global generator
    specs = algorithm_of(config).declare_roles(config)
    device = torch.device(resolve_device(config.model.device))
    return create_roles(
        specs,
        student,
        adapter_settings(config.model),
        teacher=teacher,
        merge=config.model.merge,
        precise=config.model.lora.precision == "float32",
        shard=device if config.model.shard else None,
    )


def load_starts(config: RunConfig, roles: Roles) -> None:
    """Loads the LoRAs that the settings name into the roles that start from them."""
    checkpoints, adapters = resolve_model(config.model), adapter_settings(config.model)
    starts = {
        "student_lora": (checkpoints.student_lora, config.model.student_lora_scale),
        "fake_lora": (checkpoints.fake_lora, None),
        "surrogate_lora": (config.model.surrogate_lora, None),
    }
    for setting, (lora, strength) in starts.items():
        if lora:
            targets = [spec.name for spec in roles.specs if spec.starts_from == setting]
            load_lora(roles, targets, lora, adapters, strength=strength)
    for spec in roles.specs:
        if spec.average:
            roles.copy(spec.name, spec.average.of)
