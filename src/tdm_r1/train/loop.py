"""What a training loop needs around it: a progress bar, Ctrl-C handling, the peak of GPU memory."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

Show = Callable[[int, Mapping[str, float]], None]
"""``show(iterations, metrics)``"""


@contextmanager
def progress(name: str, *, total: int, done: int, console: Console) -> Iterator[Show]:
    """A progress bar with ETA; yields what updates it."""
    columns = (
        TextColumn(name),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("ETA"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[shown]}"),
    )
    with Progress(*columns, console=console) as bars:
        bar = bars.add_task("", total=total, completed=done, shown="")

        def show(iterations: int, metrics: Mapping[str, float]) -> None:
            metric = "reward/mean" if "reward/mean" in metrics else next(iter(metrics), None)
            shown = f"{metric} {metrics[metric]:.3f}" if metric else ""  # one: more would cut the ETA off
            bars.update(bar, completed=iterations, shown=shown)

        yield show


@contextmanager
def peak_memory(device: torch.device) -> Iterator[dict[str, float]]:
    """Yields a dict that holds the most memory of a GPU that tensors took inside, in GiB; nothing on a CPU."""
    found: dict[str, float] = {}
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    yield found
    if device.type == "cuda":
        found["memory/peak_gib"] = torch.cuda.max_memory_allocated(device) / 2**30


@contextmanager
def interrupts() -> Iterator[Any]:
    """Turns the first Ctrl-C (or SIGTERM) into a flag; a second one interrupts at once."""
    seen: list[int] = []

    def handle(number: int, frame: Any) -> None:
        if seen:
            raise KeyboardInterrupt
        seen.append(number)

    try:
        before = {s: signal.signal(s, handle) for s in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not in the main thread (a notebook's worker, a test): nothing to catch there
        before = {}
    try:
        yield lambda: bool(seen)
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)
