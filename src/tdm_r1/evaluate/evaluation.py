"""Evaluation: the same prompts and the same noise every time, for few-step and many-step samplers alike."""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from torch import Tensor

from ..core import flow, processes, solvers
from ..core.randomness import numpy_rng, torch_rng
from ..models.embedder import Embedder
from ..models.protocol import Backbone, Conditioning, Velocity, guided
from ..models.roles import Roles
from ..rewards.scorer import Scorer
from ..rewards.scores import Scores, joined
from ..tasks.protocol import Prompt, Task
from .measures import DIRECTION, measure

PARTS, SHUFFLES = 8, 2  # of the prompts, for `Evaluator.noise`


@dataclass(frozen=True)
class Sampling:
    """How a role is sampled. ``guidance`` 1 means none."""

    role: str
    steps: int
    shift: float
    solver: solvers.Solver = "euler"
    guidance: float = 1.0

    @property
    def network_evaluations(self) -> int:
        """Forward passes of the network an image (NFE)."""
        return self.steps * (1 if self.guidance == 1 else 2)


def _of_prompts(velocity: Velocity, c: Conditioning, x_t: Tensor, t: Tensor) -> Tensor:
    return velocity(x_t, t, c)


@dataclass(frozen=True)
class SolverNoise:
    """The noise that a stochastic solver adds to pictures, whatever batch they are sampled in."""

    seed: int
    numbers: Sequence[int]  # of the pictures
    shape: tuple[int, int, int]  # of a picture's latents

    def __call__(self, step: int) -> Tensor:
        """[B, C, h, w] for a step of the solver."""
        return torch.stack(
            [torch.randn(self.shape, generator=torch_rng(self.seed, i, f"solver step {step}")) for i in self.numbers]
        )


@torch.no_grad()  # sampling
def generate(
    backbone: Backbone,
    roles: Roles,
    sampling: Sampling,
    embed: Embedder,
    prompts: Sequence[str],
    x_1: Tensor,
    *,
    batch: int,
    seed: int,
    numbers: Sequence[int] | None = None,
    most: int | None = None,
) -> np.ndarray:
    """Images, uint8 [B, H, W, 3], of B prompts from noise ``x_1`` [B, C, h, w], ``batch`` at a time.

    Args:
        seed, numbers: the stochastic solver's noise depends on these alone: the seed, and each image's number; their
            order if None.
        most: images of the process that samples most; B if None.
    """
    numbers = range(len(x_1)) if numbers is None else numbers
    grid = flow.few_step_grid(sampling.steps, sampling.shift)
    chunks = []
    for part in processes.in_step(torch.arange(len(x_1)).split(batch), most or len(x_1), batch):
        rows = part.tolist()
        c = embed([prompts[i] for i in rows] or [""]).rows(torch.arange(len(rows)))
        x = x_1[part].to(c.device)
        with roles.use(sampling.role) as velocity:
            field_of = guided(velocity, embed([""]), sampling.guidance)
            noise = SolverNoise(seed, [numbers[i] for i in rows], backbone.latent_shape)
            final = solvers.sample(
                partial(_of_prompts, field_of, c), x, grid, solver=sampling.solver, noise=noise
            ).final
        if rows:
            chunks.append(backbone.decode(final))
    return np.concatenate(chunks)


def mean_of(scores: np.ndarray) -> float:
    """Mean of the scores that are not missing; NaN if all are."""
    known = scores[~np.isnan(scores)]
    return float(known.mean()) if len(known) else math.nan


@dataclass(frozen=True)
class Evaluation:
    """Metrics by name, and the pictures that they were measured on; ``others``: those of the other tasks, by name."""

    metrics: dict[str, float]
    scores: Scores
    images: np.ndarray
    prompts: list[Prompt]
    others: dict[str, np.ndarray] = field(default_factory=dict)


def _standard_error(values: np.ndarray, prompts: int) -> float:
    """Of a metric over all prompts, from its values on equal parts of them; 0 where it is hardly ever known."""
    values = values[~np.isnan(values)]
    if len(values) < PARTS:
        return 0.0
    least = 1 / prompts if values.min() >= 0 and values.max() <= 1 else 0.0
    return max(float(values.std(ddof=1)) / math.sqrt(PARTS), least)


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
        self.images_per_prompt, self.batch, self.seed = images_per_prompt, batch, seed
        self.also = also or {}
        self.prompts = self._repeated(task.eval_prompts(prompts))
        self.others = {name: self._repeated(other.eval_prompts(prompts)) for name, other in self.also.items()}
        self.x_1 = torch.randn(
            (len(self.prompts), *backbone.latent_shape), generator=torch_rng(seed, 0, "evaluation noise")
        )

    def _repeated(self, prompts: list[Prompt]) -> list[Prompt]:
        return [p for p in prompts for _ in range(self.images_per_prompt)]

    def _sample(self, sampling: Sampling, prompts: list[Prompt]) -> np.ndarray:
        """Images of all prompts; each process samples its share."""
        own = processes.mine(torch.arange(len(prompts)))
        images = generate(
            self.backbone,
            self.roles,
            sampling,
            self.embed,
            [prompts[i].text for i in own.tolist()],
            self.x_1[own],
            batch=self.batch,
            seed=self.seed,
            numbers=own.tolist(),
            most=processes.most(len(prompts)),
        )
        return processes.gather(torch.from_numpy(images), len(prompts)).numpy()

    def _score(self, images: np.ndarray) -> Scores:
        """Scores of all images; each process scores its share."""
        own = processes.mine(torch.arange(len(images)))

        def score() -> Scores:
            parts = [rows.tolist() for rows in own.split(self.batch)]
            return joined([self.scorer(images[rows], [self.prompts[i] for i in rows]) for rows in parts])

        return joined(processes.gather_each(processes.together(score)))

    def _held_out(self, task: Task, images: np.ndarray, prompts: list[Prompt]) -> dict[str, float]:
        """A task's metrics, and measures of any pictures; the first process measures them for all."""

        def measured() -> dict[str, float]:
            n = self.images_per_prompt
            return {**task.metrics(images, prompts, n), **(measure(images, n) if task is self.task else {})}

        return processes.by_first(measured)

    @property
    def directions(self) -> dict[str, str]:
        """Which way each metric is better, of those that say so."""
        found = {**getattr(self.task, "directions", {}), **DIRECTION}
        for name, task in self.also.items():
            found |= {f"{name}/{metric}": way for metric, way in getattr(task, "directions", {}).items()}
        return found

    def noise(self, evaluation: Evaluation) -> dict[str, float]:
        """Standard errors of the metrics over prompts: their deviation over `PARTS` parts of the prompts, over the root
        of that number. That is right for means; for a distance between two sets it is a rough guide. A metric between 0
        and 1 is given at least one prompt's weight."""
        found = self._noise(self.task, evaluation.images, evaluation.prompts)
        for name, task in self.also.items():
            own = self._noise(task, evaluation.others[name], self.others[name])
            found |= {f"{name}/{metric}": value for metric, value in own.items()}
        return found

    def _noise(self, task: Task, images: np.ndarray, prompts: list[Prompt]) -> dict[str, float]:
        n, count = self.images_per_prompt, len(prompts) // self.images_per_prompt
        rng, found = numpy_rng(self.seed, 0, "parts of the prompts"), defaultdict(list)
        for _ in range(SHUFFLES if count >= PARTS else 0):
            for part in np.array_split(rng.permutation(count), PARTS):
                rows = (np.sort(part)[:, None] * n + np.arange(n)).ravel()
                for name, value in self._held_out(task, images[rows], [prompts[i] for i in rows]).items():
                    found[name].append(value)
        return {name: _standard_error(np.array(values), count) for name, values in found.items()}

    def __call__(self, sampling: Sampling) -> Evaluation:
        self.embed.learn(["", *(p.text for p in self.prompts)])  # not part of the seconds that follow
        start = time.perf_counter()
        images = self._sample(sampling, self.prompts)
        seconds = time.perf_counter() - start
        scores = self._score(images)
        metrics = {
            "reward": mean_of(scores.values),
            "reward_missing": float(np.isnan(scores.values).sum()),
            **{f"reward/{name}": mean_of(part) for name, part in scores.parts.items()},
            **self._held_out(self.task, images, self.prompts),
            "network_evaluations": float(sampling.network_evaluations),
            "images_per_second": len(images) / seconds,
        }
        others = {name: self._sample(sampling, prompts) for name, prompts in self.others.items()}
        for name, task in self.also.items():
            found = self._held_out(task, others[name], self.others[name])
            metrics |= {f"{name}/{metric}": value for metric, value in found.items()}
        metrics = {k: v for k, v in metrics.items() if not math.isnan(v)}
        return Evaluation(metrics, scores, images, self.prompts, others)
