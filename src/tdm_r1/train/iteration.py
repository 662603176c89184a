"""One iteration of a run, in two halves: samples are made and handed to the reward; what comes back is learned from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..algorithms.metrics import Stopwatch
from ..algorithms.protocol import Algorithm, Batch, Step
from ..config.run import RunConfig
from ..core.randomness import Normal, numpy_rng, torch_rng
from ..evaluate.evaluation import mean_of
from ..models.embedder import Embedder
from ..models.protocol import Conditioning
from ..tasks.protocol import Prompt, Task
from .scoring import LatentScorer, Pending


@dataclass
class Begun:
    """An iteration whose samples ``latents`` [B, C, H, W] have been made and are being scored (``pending``).

    Both are None for an algorithm that needs no scores: its iteration is complete then, and ``metrics`` has the result.
    """

    number: int
    prompts: Sequence[Prompt]
    step: Step
    latents: Tensor | None
    pending: Pending | None
    seconds: Stopwatch
    metrics: dict[str, float]

    def drop(self) -> None:
        """Cancels the scoring that has not started, and waits for the rest."""
        if self.pending is not None:
            self.pending.drop()

    @contextmanager
    def dropped_on_error(self) -> Iterator[None]:
        """Drops it if the block raises."""
        try:
            yield
        except BaseException:
            self.drop()
            raise


class Iterations:
    """Begins and ends iterations. Each depends on the seed, its number and the weights alone.

    Args:
        kl_task: of the prompts that KL alone is for, where there are any.
    """

    def __init__(
        self,
        config: RunConfig,
        task: Task,
        kl_task: Task | None,
        embed: Embedder,
        latent_shape: tuple[int, ...],
        algorithm: Algorithm,
        scoring: LatentScorer,
    ) -> None:
        self.config, self.task, self.kl_task = config, task, kl_task
        self.embed, self.latent_shape = embed, latent_shape
        self.algorithm, self.scoring = algorithm, scoring
        self.last: dict[str, Any] = {}  # the last batch that was learned from, to be looked at if the run diverges

    def begin(self, i: int) -> Begun:
        """Prompts, noise, and the algorithm up to where it needs scores, which are made in the background."""
        c = self.config
        prompts = self.task.train_prompts(c.batch.prompts, numpy_rng(c.seed, i, "prompts"))
        prompts = [p for p in prompts for _ in range(c.batch.group)]
        samples = self._samples(prompts, i, "initial noise")
        beside = self._without_reward(i) if self.kl_task else ()
        noise = torch_rng(c.seed, i, "algorithm")
        step, seconds = self.algorithm.step(Batch(*samples, c.batch.group, noise, *beside)), Stopwatch()
        try:
            latents = next(step)
        except StopIteration as finished:  # a distillation
            return Begun(i, prompts, step, None, None, seconds, finished.value)
        with seconds("score"):
            pending = self.scoring.submit(latents, prompts)
        return Begun(i, prompts, step, latents, pending, seconds, {})

    def finish(self, begun: Begun) -> dict[str, float]:
        """Waits for the scores and learns from them; metrics. Raises UserError if there is nothing to learn from."""
        if begun.pending is None or begun.latents is None:
            return begun.metrics
        with begun.seconds("score"):
            scores = self.scoring.collect(begun.pending)
        parts = {f"reward_parts/{name}": mean_of(part) for name, part in scores.parts.items()}
        texts, given = [p.text for p in begun.prompts], scores.values.tolist()
        self.last = {"iteration": begun.number, "prompts": texts, "latents": begun.latents, "scores": given}
        try:
            begun.step.send(torch.from_numpy(scores.values))
        except StopIteration as finished:
            return finished.value | parts | begun.seconds.read()
        raise TypeError(f"the step of {self.config.algorithm} yields twice: it may once")

    def _without_reward(self, i: int) -> tuple[Conditioning, Tensor]:
        """Conditioning and noise of the samples that KL alone is for."""
        assert self.kl_task is not None
        prompts = self.kl_task.train_prompts(self.config.batch.kl_prompts, numpy_rng(self.config.seed, i, "KL prompts"))
        return self._samples(prompts, i, "initial noise without reward")

    def _samples(self, prompts: Sequence[Prompt], i: int, purpose: str) -> tuple[Conditioning, Tensor]:
        """Conditioning of prompts, and a sample's noise for each, [B, C, H, W]."""
        conditioning = self.embed([p.text for p in prompts])
        noise = Normal.drawn(torch_rng(self.config.seed, i, purpose), self.latent_shape)
        return conditioning, noise.first(len(prompts)).to(conditioning.device)
