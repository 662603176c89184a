"""Metrics of an iteration, read from the device once, and the seconds of its phases."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from ..core import processes


class Sums:
    """Weighted sums of numbers that are on a device. `read` waits for the device, once; `add` never does.

    Where there are several processes each adds what its own samples give, and `read` sums that.
    """

    def __init__(self) -> None:
        self._names: list[str] = []
        self._weights: list[float] = []
        self._values: list[Tensor] = []

    def add(self, name: str, value: Tensor, weight: float = 1.0) -> None:
        """Adds ``weight`` times a tensor of one number."""
        self._names.append(name)
        self._weights.append(weight)
        self._values.append(value.detach().float())

    def read(self) -> dict[str, float]:
        """The sum of every name."""
        found = dict.fromkeys(self._names, 0.0)
        values = torch.stack(self._values).tolist() if self._values else []
        for name, weight, value in zip(self._names, self._weights, values, strict=True):
            found[name] += weight * value
        return processes.sum_of_each(found)


def mean_of_each(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The mean of every metric over the rows that have it."""
    names = dict.fromkeys(name for row in rows for name in row)
    return {n: sum(row[n] for row in rows if n in row) / sum(n in row for row in rows) for n in names}


class Stopwatch:
    """Seconds of each phase of an iteration."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        start = self._now()
        yield
        self._seconds[phase] = self._seconds.get(phase, 0.0) + self._now() - start

    @staticmethod
    def _now() -> float:
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # else work is counted where the next phase waits for it
        return time.perf_counter()

    def read(self) -> dict[str, float]:
        """``seconds/PHASE`` by name."""
        return {f"seconds/{phase}": seconds for phase, seconds in self._seconds.items()}
