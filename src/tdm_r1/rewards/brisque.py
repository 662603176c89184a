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

        class Index(BRISQUE):
            """brisque 0.2 makes floats of arrays of one element, which numpy 2.4 refuses."""

            def scale_features(self, features: np.ndarray) -> np.ndarray:
                return super().scale_features([np.asarray(f).item() for f in features])

        self.index = Index(url=False)

    def __call__(self, images: np.ndarray, prompts: list[str], metadata: list[dict[str, Any]]) -> Scores:
        with np.errstate(all="ignore"):  # of pictures without texture, whose score is NaN
            return Scores(np.array([-float(self.index.score(image)) for image in images]))
