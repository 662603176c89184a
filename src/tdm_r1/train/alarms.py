"""Alarms: held-out metrics that have become worse than at the run's start by more than chance.

A reward that rises while they fall is being exploited.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from ..config.run import RunConfig
from ..errors import UserError
from ..evaluate.measures import Direction
from ..files import write_text

FILE = "alarms.json"
SHARE = 0.25  # of the start's figure: metrics without a better side (sharpness, saturation) may move by it; ours


@dataclass(frozen=True)
class Alarm:
    """A metric that is worse by ``times`` its noise; ``now`` is NaN where it can no longer be measured."""

    name: str
    start: float
    now: float
    times: float

    def __str__(self) -> str:
        return f"{self.name} {self.now:.3g} (at the start {self.start:.3g}, {self.times:.1f} times its noise)"


class Alarms:
    """What is held against the start's figures.

    Args:
        directions: of the metrics (`evaluate.measures.Direction`); others raise no alarm.
        start, noise: the start's figures, and their standard errors; a metric without noise raises no alarm.
        at: multiples of the noise that are allowed.

    Raises UserError on a direction that is none.
    """

    def __init__(
        self, directions: Mapping[str, str], start: Mapping[str, float], noise: Mapping[str, float], *, at: float
    ) -> None:
        self.directions, self.start, self.noise, self.at = directions, dict(start), dict(noise), at
        for name, direction in directions.items():
            if direction not in get_args(Direction):
                raise UserError(
                    f"the task's direction of {name} is {direction!r}: known are {', '.join(get_args(Direction))}"
                )

    def __call__(self, metrics: Mapping[str, float]) -> list[Alarm]:
        """The metrics that are worse than the start's by more than is allowed, worst first."""
        found = []
        for name, direction in self.directions.items():
            start, noise, now = self.start.get(name, math.nan), self.noise.get(name, 0.0), metrics.get(name, math.nan)
            if math.isnan(start) or not noise > 0:
                continue
            worse = {"up": start - now, "down": now - start, "same": abs(now - start) - SHARE * abs(start)}[direction]
            if math.isnan(worse):  # nothing is left to measure it on
                worse = math.inf
            if worse > self.at * noise:
                found.append(Alarm(name, start, now, worse / noise))
        return sorted(found, key=lambda alarm: -alarm.times)

    def save(self, folder: Path, config: RunConfig) -> None:
        kept = {"evaluation": _measured_with(config), "start": self.start, "noise": self.noise}
        write_text(folder / FILE, json.dumps(kept, indent=1))

    @classmethod
    def load(cls, folder: Path, config: RunConfig, directions: Mapping[str, str]) -> Alarms:
        """Those of a run's folder; without figures, and so alarms, if it has none or is now evaluated otherwise."""
        path, at = folder / FILE, config.evaluation.alarm_at
        known = json.loads(path.read_text()) if path.exists() else {}
        if known.get("evaluation") != _measured_with(config):
            known = {}
        return cls(directions, known.get("start", {}), known.get("noise", {}), at=at)


def _measured_with(config: RunConfig) -> dict[str, Any]:
    """The settings on which the figures depend beside the model."""
    e = config.evaluation.model_dump(mode="json", include={"prompts", "images_per_prompt", "seed"})
    return e | {"sampler": config.sampler.model_dump(mode="json"), "task": config.task.model_dump(mode="json")}
