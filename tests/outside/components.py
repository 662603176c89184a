"""A backbone, a task, a reward and a tracker."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from torch import Tensor

from tdm_r1.config.run import RunConfig
from tdm_r1.models.sd3 import SD3Backbone
from tdm_r1.tasks.protocol import Prompt
from tdm_r1.tasks.settings import TaskConfig


class Negative(SD3Backbone):
    """Stable Diffusion 3 whose images are negatives."""

    def decode(self, latents: Tensor) -> np.ndarray:
        return 255 - super().decode(latents)


class Animals:
    """A task that measures how bright images are."""

    def __init__(self, config: TaskConfig) -> None:
        self.known = [Prompt(f"a {name}", {"name": name}) for name in config.settings["animals"]]

    def train_prompts(self, n: int, rng: np.random.Generator) -> list[Prompt]:
        return [self.known[i] for i in rng.integers(len(self.known), size=n)]

    def eval_prompts(self, n: int) -> list[Prompt]:
        return [self.known[i % len(self.known)] for i in range(n)]

    def metrics(self, images: np.ndarray, prompts: Sequence[Prompt], images_per_prompt: int) -> dict[str, float]:
        return {"brightness": float(images.mean()) / 255}


class LeftBrightness:
    """A reward: the brightness of the left half, for animals alone."""

    def __call__(self, images: np.ndarray, prompts: list[str], metadata: list[dict]) -> np.ndarray:
        assert all(prompt == f"a {m['name']}" for prompt, m in zip(prompts, metadata, strict=True))
        return images[:, :, :32].mean((1, 2, 3)) / 255


class Lines:
    """A tracker: one JSON line for each call."""

    def __init__(self, config: RunConfig) -> None:
        self.file = config.folder.parent / f"{config.name}.lines"

    def log(self, iteration: int, metrics: Mapping[str, float]) -> None:
        self._write({"iteration": iteration, "metrics": sorted(metrics)})

    def image(self, iteration: int, name: str, path: Path) -> None:
        self._write({"iteration": iteration, "image": name, "bytes": path.stat().st_size})

    def _write(self, row: dict) -> None:
        with self.file.open("a") as file:
            file.write(json.dumps(row) + "\n")
