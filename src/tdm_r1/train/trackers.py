"""Where metrics and images go beside the run's folder.

A tracker is a class of two methods, made with the run's settings. Name it in ``trackers`` as package.module:Class.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from ..config.run import TRACKERS, RunConfig


class Tracker(Protocol):
    """Values are finite; ``iteration`` rises, but for a run that is resumed from an earlier checkpoint."""

    def log(self, iteration: int, metrics: Mapping[str, float]) -> None:
        """Metrics of an iteration, or of an evaluation after it (``eval/NAME``)."""

    def image(self, iteration: int, name: str, path: Path) -> None:
        """A PNG that the run has written."""


class Trackers:
    """All trackers of a run."""

    def __init__(self, config: RunConfig) -> None:
        self._trackers: list[Tracker] = [TRACKERS.load(name)(config) for name in config.trackers]

    def log(self, iteration: int, metrics: Mapping[str, float]) -> None:
        finite = {name: value for name, value in metrics.items() if math.isfinite(value)}
        for tracker in self._trackers:
            tracker.log(iteration, finite)

    def image(self, iteration: int, name: str, path: Path) -> None:
        for tracker in self._trackers:
            tracker.image(iteration, name, path)
