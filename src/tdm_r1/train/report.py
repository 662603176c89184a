"""Where a run's metrics and evaluations go: its log, its pictures, the terminal, the trackers."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from rich.console import Console

from ..config.run import RunConfig
from ..evaluate import pictures
from ..evaluate.evaluation import Evaluation
from .folder import RunFolder
from .trackers import Trackers


class Reporter:
    """Writes metrics, images and a summary line after each iteration and each evaluation."""

    def __init__(self, config: RunConfig, files: RunFolder, console: Console) -> None:
        self.config, self.files, self.console = config, files, console
        self.trackers = Trackers(config, console)

    def log(self, counts: Mapping[str, float], metrics: Mapping[str, float]) -> None:
        """One row of the log; ``counts`` are ``iteration``, ``seconds`` and ``scored``."""
        self.files.log(dict(counts) | {k: _rounded(v) for k, v in metrics.items()})
        self.trackers.log(int(counts["iteration"]), metrics)

    def evaluation(self, counts: Mapping[str, float], result: Evaluation) -> None:
        """Logs, draws and prints an evaluation."""
        iteration = int(counts["iteration"])
        self.log(counts, {f"eval/{k}": v for k, v in result.metrics.items()})
        self._samples(iteration, result)
        curves = self.files.path / "curves.png"
        pictures.curves(self.files.history(), curves)
        self.trackers.image(iteration, "curves", curves)
        line = "  ".join(f"{k} {v:.3f}" for k, v in result.metrics.items() if "/" not in k)
        self.console.print(f"iteration {iteration}: {line}", highlight=False)

    def _samples(self, iteration: int, result: Evaluation) -> None:
        e = self.config.evaluation
        if e.grid_prompts:
            rows = np.arange(0, len(result.prompts), e.images_per_prompt)[: e.grid_prompts]
            captions = [result.prompts[i].text for i in rows]
            picture = pictures.grid([(f"iteration {iteration}", result.images[rows])], captions)
            path = self.files.path / "grids" / f"iteration_{iteration:06d}.png"
            pictures.save_png(picture, path)
            self.trackers.image(iteration, "samples", path)


def _rounded(value: float) -> float:
    """To six decimals; small numbers, such as learning rates, to four digits."""
    return round(value, 6) if abs(value) >= 1e-3 else float(f"{value:.4g}")
