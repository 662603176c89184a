"""Makes the task that the settings name."""

from __future__ import annotations

from .protocol import Task
from .registry import TASKS
from .settings import TaskConfig


def load_task(config: TaskConfig) -> Task:
    """The task of a run. Raises ValueError on names and files that are not there."""
    return TASKS.load(config.name)(config)
