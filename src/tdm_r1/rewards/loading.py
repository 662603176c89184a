"""A reward as a process of its own has it: loaded there, once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from .scores import Reward, Scores, attempt


class NotLoadedError(Exception):
    """A process has no reward to score with."""


class LoadedReward:
    """A reward that this process loads. Whatever goes wrong with that is told when it is first wanted: a process that
    does not start at all would be waited for.

    Args:
        load: how to (`registry.load_reward`).
        name: of the reward.
    """

    def __init__(self, load: Callable[[str], Reward], name: str) -> None:
        self.load, self.name = load, name
        self.reward: Reward | None = None
        self.error = ""
        self._told = False
        self._load()

    def ready(self) -> None:
        """Raises NotLoadedError if there is no reward; once that was told, loading is tried again first."""
        if self.reward is None and self._told:
            self._load()
        if self.reward is None:
            self._told = True
            raise NotLoadedError(self.error)

    def score(self, images: np.ndarray, prompts: list[str], metadata: list[dict[str, Any]]) -> Scores:
        self.ready()
        assert self.reward is not None
        return attempt(self.reward, images, prompts, metadata)

    def _load(self) -> None:
        try:
            self.reward = self.load(self.name)
        except (Exception, SystemExit) as error:
            self.error = f"{error or type(error).__name__}"
