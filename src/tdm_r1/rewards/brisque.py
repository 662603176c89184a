"""BRISQUE (Mittal et al. 2012): a no-reference index of natural pictures, by the `brisque` package."""

from __future__ import annotations

from typing import Any

import numpy as np

from .scores import Scores


class Brisque:
    """Minus the index, so that more is better: about 0 (natural) down to -100 (distorted). Blind to the prompt.

    Its statistics are those of photographs. A picture without any texture has none, and no score.
    """

    def __init__(self) -> None:
        from brisque import BRISQUE

        self.index = BRISQUE(url=False)

    def __call__(self, images: np.ndarray, prompts: list[str], metadata: list[dict[str, Any]]) -> Scores:
        with np.errstate(all="ignore"):  # of pictures without texture, whose score is NaN
            return Scores(np.array([-float(self.index.score(image)) for image in images]))
