"""Makes the task that the settings name."""

from __future__ import annotations

from pathlib import Path

from .protocol import Task
from .registry import TASKS
from .settings import TaskConfig


def load_kl_task(config: TaskConfig) -> Task:
    """The task that prompts without reward are drawn from. Raises ValueError on names and files that are not there."""
    if config.kl is None:
        return load_task(config)
    if Path(config.kl).suffix:
        return load_task(TaskConfig(name="prompts", prompts=Path(config.kl)))
    return load_task(TaskConfig(name=config.kl))


def load_task(config: TaskConfig) -> Task:
    """The task of a run. Raises ValueError on names and files that are not there."""
    return TASKS.load(config.name)(config)
