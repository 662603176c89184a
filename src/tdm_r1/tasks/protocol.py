"""What a task is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np


@dataclass(frozen=True)
class Prompt:
    """A prompt and whatever a reward needs beside its text (targets, counts, GenEval's ``include`` list)."""

    text: str
    metadata: dict[str, Any] = field(default_factory=dict)


class Task(Protocol):
    """Prompts to train on, a fixed list to evaluate on, and metrics of images beside the reward.

    A task is made by a function or class that takes its settings (`settings.TaskConfig`); name it in
    `registry.TASKS` or as package.module:Name. ``known`` are the prompts that training draws from, where there is such
    a list: rewards are asked before training whether they can score them. A task may have ``directions``, "up" or
    "down" by the name of a metric: those raise alarms when they get worse (`evaluation.alarm_at`).
    """

    known: Sequence[Prompt]

    def train_prompts(self, n: int, rng: np.random.Generator) -> list[Prompt]: ...

    def eval_prompts(self, n: int) -> list[Prompt]: ...

    def metrics(self, images: np.ndarray, prompts: Sequence[Prompt], images_per_prompt: int) -> dict[str, float]: ...
