"""Rewards for shapes that no recipe was tuned on. `tdm-r1 study` runs the recipe on them unchanged."""

from __future__ import annotations

from typing import Any

import numpy as np

from . import detector


def size(images: np.ndarray, prompts: list[str], metadata: list[dict[str, Any]]) -> list[float]:
    """A smooth preference for large shapes, which no prompt forbids: their mean radius in px, 0 where there is none."""
    radii = [[d.radius for d in detector.detect(image) if d.is_object] for image in images]
    return [float(np.mean(r)) if r else 0.0 for r in radii]


def count(images: np.ndarray, prompts: list[str], metadata: list[dict[str, Any]]) -> list[float]:
    """Whether there are as many shapes as the prompt names, whatever they are: 1 less 0.5 for each too many or missing,
    at least 0."""
    asked = [sum(include["count"] for include in spec["include"]) for spec in metadata]
    found = [sum(d.is_object for d in detector.detect(image)) for image in images]
    return [max(1 - 0.5 * abs(n - m), 0.0) for n, m in zip(found, asked, strict=True)]
