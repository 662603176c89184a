"""Evaluation: the same prompts and the same noise every time, for few-step and many-step samplers alike."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from torch import Tensor

from . import flow, solvers
from .backbones import Backbone, Conditioning, Velocity, guided
from .randomness import torch_rng
from .rewards import Scorer, Scores
from .rewards.scores import joined
from .roles import Role, Roles
from .solvers import Solver
from .tasks import Prompt, Task


@dataclass(frozen=True)
class Sampling:
    """How a role is sampled. ``guidance`` 1 means none."""

    role: Role
    steps: int
    shift: float
    solver: Solver = "euler"
    guidance: float = 1.0

    @property
    def network_evaluations(self) -> int:
        """Forward passes of the network an image (NFE)."""
        return self.steps * (1 if self.guidance == 1 else 2)


@dataclass
class Embedder:
    """Text embeddings, computed once per distinct prompt."""

    backbone: Backbone
    cache: dict[str, Conditioning] = field(default_factory=dict)

    def __call__(self, prompts: Sequence[str]) -> Conditioning:
        for prompt in dict.fromkeys(prompts):
            if prompt not in self.cache:  # one by one: in a batch the last bits would depend on the company
                self.cache[prompt] = self.backbone.encode([prompt])
        found = [self.cache[p] for p in prompts]
        return Conditioning.join(found)


def _of_prompts(velocity: Velocity, c: Conditioning, x_t: Tensor, t: Tensor) -> Tensor:
    return velocity(x_t, t, c)


@torch.no_grad()  # sampling
def generate(
    backbone: Backbone,
    roles: Roles,
    sampling: Sampling,
    c: Conditioning,
    empty: Conditioning,
    x_1: Tensor,
    *,
    batch: int,
) -> np.ndarray:
    """Pictures, uint8 [B, H, W, 3], from noise ``x_1`` [B, C, h, w]."""
    grid = flow.few_step_grid(sampling.steps, sampling.shift)
    chunks = []
    with roles.use(sampling.role) as velocity:
        field_of = guided(velocity, empty, sampling.guidance)
        for rows in torch.arange(len(x_1)).split(batch):
            part = c.rows(rows)
            noise = torch_rng(0, int(rows[0]), "stochastic sampler")
            part_velocity = partial(_of_prompts, field_of, part)
            final = solvers.sample(part_velocity, x_1[rows], grid, solver=sampling.solver, noise=noise).final
            chunks.append(backbone.decode(final))
    return np.concatenate(chunks)


def mean_of(scores: np.ndarray) -> float:
    """Mean of the scores that are not missing; NaN if all are."""
    known = scores[~np.isnan(scores)]
    return float(known.mean()) if len(known) else math.nan


@dataclass(frozen=True)
class Evaluation:
    """Metrics by name, and the pictures that they were measured on."""

    metrics: dict[str, float]
    scores: Scores
    images: np.ndarray
    prompts: list[Prompt]


class Evaluator:
    """Samples a role on the task's fixed prompts and fixed noise, and measures reward and held-out metrics.

    Args:
        also: other tasks by name, sampled on their own prompts; their metrics are reported as ``name/metric``.
    """

    def __init__(
        self,
        backbone: Backbone,
        roles: Roles,
        embed: Embedder,
        task: Task,
        scorer: Scorer,
        *,
        prompts: int,
        images_per_prompt: int,
        seed: int,
        batch: int,
        also: Mapping[str, Task] | None = None,
    ) -> None:
        self.backbone, self.roles, self.embed, self.task, self.scorer = backbone, roles, embed, task, scorer
        self.images_per_prompt, self.batch = images_per_prompt, batch
        self.also = also or {}
        self.prompts = self._repeated(task.eval_prompts(prompts))
        self.others = {name: self._repeated(other.eval_prompts(prompts)) for name, other in self.also.items()}
        self.x_1 = torch.randn(
            (len(self.prompts), *backbone.latent_shape), generator=torch_rng(seed, 0, "evaluation noise")
        )

    def _repeated(self, prompts: list[Prompt]) -> list[Prompt]:
        return [p for p in prompts for _ in range(self.images_per_prompt)]

    def _sample(self, sampling: Sampling, prompts: list[Prompt]) -> np.ndarray:
        c, empty = self.embed([p.text for p in prompts]), self.embed([""])
        return generate(self.backbone, self.roles, sampling, c, empty, self.x_1.to(c.embeds.device), batch=self.batch)

    def __call__(self, sampling: Sampling) -> Evaluation:
        self.embed([p.text for p in self.prompts])  # not part of the seconds that follow
        start = time.perf_counter()
        images = self._sample(sampling, self.prompts)
        seconds = time.perf_counter() - start
        rows = [slice(start, start + self.batch) for start in range(0, len(images), self.batch)]
        scores = joined([self.scorer(images[r], self.prompts[r]) for r in rows])
        metrics = {
            "reward": mean_of(scores.values),
            "reward_missing": float(np.isnan(scores.values).sum()),
            **{f"reward/{name}": mean_of(part) for name, part in scores.parts.items()},
            **self.task.metrics(images, self.prompts, self.images_per_prompt),
            "network_evaluations": float(sampling.network_evaluations),
            "images_per_second": len(images) / seconds,
        }
        for name, task in self.also.items():
            prompts = self.others[name]
            found = task.metrics(self._sample(sampling, prompts), prompts, self.images_per_prompt)
            metrics |= {f"{name}/{metric}": value for metric, value in found.items()}
        return Evaluation({k: v for k, v in metrics.items() if not math.isnan(v)}, scores, images, self.prompts)
