"""Alarms: held-out metrics that have become worse than at the run's start by more than chance.

A reward that rises while they fall is being exploited.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ..files import write_text

FILE = "alarms.json"
SHARE = 0.25  # of the start's figure: metrics without a better side (sharpness, saturation) may move by it; ours


@dataclass(frozen=True)
class Alarm:
    """A metric that is worse by ``times`` its noise."""

    name: str
    start: float
    now: float
    times: float

    def __str__(self) -> str:
        return f"{self.name} {self.now:.3g} (at the start {self.start:.3g}, {self.times:.1f} times its noise)"


class Alarms:
    """What is held against the start's figures.

    Args:
        directions: of the metrics, "up", "down" or "same"; others raise no alarm.
        start, noise: the start's figures, and how far each varies over prompts.
        at: multiples of the noise that are allowed.
    """

    def __init__(
        self, directions: Mapping[str, str], start: Mapping[str, float], noise: Mapping[str, float], *, at: float
    ) -> None:
        self.directions, self.start, self.noise, self.at = directions, dict(start), dict(noise), at

    def __call__(self, metrics: Mapping[str, float]) -> list[Alarm]:
        """The metrics that are worse than the start's by more than is allowed, worst first."""
        found = []
        for name, direction in self.directions.items():
            start, now, noise = (values.get(name, math.nan) for values in (self.start, metrics, self.noise))
            worse = {"up": start - now, "down": now - start, "same": abs(now - start) - SHARE * abs(start)}[direction]
            if worse > self.at * noise:
                found.append(Alarm(name, start, now, worse / noise if noise else math.inf))
        return sorted(found, key=lambda alarm: -alarm.times)

    def save(self, folder: Path) -> None:
        write_text(folder / FILE, json.dumps({"start": self.start, "noise": self.noise}, indent=1))

    @classmethod
    def load(cls, folder: Path, directions: Mapping[str, str], *, at: float) -> Alarms:
        """Those of a run's folder; without figures, and so without alarms, if it has none."""
        path = folder / FILE
        known = json.loads(path.read_text()) if path.exists() else {"start": {}, "noise": {}}
        return cls(directions, known["start"], known["noise"], at=at)
