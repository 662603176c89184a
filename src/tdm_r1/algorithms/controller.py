"""A slow, bounded controller of one positive number. Free of torch."""

from __future__ import annotations

import math
from collections.abc import Mapping


class Controller:
    """``value`` starts at ``start``, moves by at most ``rate`` an update in log scale, and stays within ``bounds``."""

    def __init__(self, start: float, rate: float, bounds: tuple[float, float]) -> None:
        self.start = self.value = start
        self.rate, self.bounds = rate, bounds

    def update(self, error: float) -> None:
        """Moves by ``rate`` times ``error``, of which no more than 1 either way counts."""
        low, high = self.bounds
        self.value = max(low, min(high, self.value * math.exp(self.rate * max(-1.0, min(1.0, error)))))

    def state(self) -> dict[str, float]:
        return {"scale": self.value, "start": self.start}

    def load_state(self, state: Mapping[str, float]) -> None:
        """Goes on with the value, unless it now starts elsewhere."""
        if state["start"] == self.start:
            self.value = state["scale"]
