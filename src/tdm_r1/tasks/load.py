"""Makes the task that the settings name."""

from __future__ import annotations

from pathlib import Path

from ..plugins import is_outside
from .protocol import Task
from .registry import TASKS
from .settings import TaskConfig


def load_kl_task(config: TaskConfig) -> Task:
    """The task that prompts without reward are drawn from. Raises ValueError on names and files that are not there."""
    kl = config.kl
    if kl is None:
        return load_task(config)
    if kl in TASKS.entries or is_outside(kl):
        return load_task(TaskConfig(name=kl))
    if not Path(kl).suffix:
        raise ValueError(f"task.kl = {kl!r} is neither a task ({', '.join(TASKS.entries)}) nor a file of prompts")
    return load_task(TaskConfig(name="prompts", prompts=Path(kl)))


def load_task(config: TaskConfig) -> Task:
    """The task of a run. Raises ValueError on names and files that are not there."""
    return TASKS.load(config.name)(config)
