"""Scores latents with a run's reward, and stops a run whose reward gives it nothing to learn from."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass

import torch
from rich.console import Console
from torch import Tensor

from ..core import processes
from ..models.protocol import Backbone
from ..rewards.scorer import Scorer, Watch
from ..rewards.scores import Scores, joined
from ..tasks.protocol import Prompt


@dataclass(frozen=True)
class Pending:
    """A batch that is being scored.

    Args:
        samples: of all processes.
        futures: of this process's share, a micro-batch each: the scores of every term of the reward.
    """

    samples: int
    futures: Sequence[Future[list[Scores]]]

    def drop(self) -> None:
        """Cancels what has not started, and waits for the rest."""
        for future in self.futures:
            future.cancel()
        wait(self.futures)


class LatentScorer:
    """Decodes and scores final latents.

    Args:
        micro_batch: images that are decoded and scored at once.
        group: samples of a prompt.
        console: where failures of the reward are shown, each once.
    """

    def __init__(self, backbone: Backbone, scorer: Scorer, *, micro_batch: int, group: int, console: Console) -> None:
        self.backbone, self.scorer, self.console = backbone, scorer, console
        self.micro_batch, self.group = micro_batch, group
        self.background = ThreadPoolExecutor(scorer.parallel)  # of all batches: a reward may take one at a time
        self.watch = Watch()
        self.scored = 0  # images so far
        self.told: set[str] = set()  # failures that were shown

    def submit(self, latents: Tensor, prompts: Sequence[Prompt]) -> Pending:
        """Decodes final latents [P * G, C, H, W] and has them scored in the background, each process its share."""
        own = processes.mine(torch.arange(len(latents)))
        futures = processes.together(lambda: self._each(latents[own], [prompts[i] for i in own.tolist()]))
        return Pending(len(prompts), futures)

    def collect(self, pending: Pending) -> Scores:
        """The scores of what was submitted, in all processes. Raises UserError if there is nothing to learn from."""
        try:
            chunks = processes.together(lambda: [future.result() for future in pending.futures])
        except BaseException:
            pending.drop()
            raise
        chunks = [chunk for of_one in processes.gather_each(chunks) for chunk in of_one]
        scores = self.scorer.total([joined(term) for term in zip(*chunks, strict=True)], group_size=self.group)
        self.scored += pending.samples
        self.show_failures(scores)
        processes.together(lambda: self.watch(scores, self.group))  # all raise: one tells
        return scores

    def _each(self, latents: Tensor, prompts: Sequence[Prompt]) -> list[Future[list[Scores]]]:
        """The scores of every term of the reward, a micro-batch at a time, some of them while the next are decoded."""
        futures: list[Future[list[Scores]]] = []
        starts = range(0, len(latents), self.micro_batch)
        try:
            for start, part in zip(starts, latents.split(self.micro_batch), strict=True):
                of_part = prompts[start : start + len(part)]
                futures.append(self.background.submit(self.scorer.each, self.backbone.decode(part), of_part))
        except BaseException:
            Pending(len(latents), futures).drop()
            raise
        return futures

    def show_failures(self, scores: Scores) -> None:
        """Shows each thing that went wrong in scoring once."""
        for why in scores.failures:
            if why not in self.told:
                self.console.print(f"reward: {why}", style="yellow", markup=False)
                self.told.add(why)
