"""Where metrics and images go beside the run's folder.

A tracker is a class of two methods, made with the run's settings. Name it in ``trackers`` as package.module:Class.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

from rich.console import Console

from ..config.run import TRACKERS, RunConfig


class Tracker(Protocol):
    """Values are finite; ``iteration`` rises, but for a run that is resumed from an earlier checkpoint."""

    def log(self, iteration: int, metrics: Mapping[str, float]) -> None:
        """Metrics of an iteration, or of an evaluation after it (``eval/NAME``)."""

    def image(self, iteration: int, name: str, path: Path) -> None:
        """A PNG that the run has written."""


class Trackers:
    """All trackers of a run. One that raises costs its own record, not the run; its error is shown once."""

    def __init__(self, config: RunConfig, console: Console) -> None:
        self._trackers: dict[str, Tracker] = {name: TRACKERS.load(name)(config) for name in config.trackers}
        self._console = console
        self._failed: set[str] = set()

    def log(self, iteration: int, metrics: Mapping[str, float]) -> None:
        finite = {name: value for name, value in metrics.items() if math.isfinite(value)}
        self._each(lambda tracker: tracker.log(iteration, finite))

    def image(self, iteration: int, name: str, path: Path) -> None:
        self._each(lambda tracker: tracker.image(iteration, name, path))

    def _each(self, call: Callable[[Tracker], None]) -> None:
        for name, tracker in self._trackers.items():
            try:
                call(tracker)
            except Exception as error:  # foreign code, often over a network
                if name not in self._failed:
                    self._console.print(
                        f"tracker {name}: {type(error).__name__}: {error}", style="yellow", markup=False
                    )
                self._failed.add(name)
