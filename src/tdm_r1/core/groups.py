"""Scores in groups: when a group's scores differ, and their standardised form. NumPy alone."""

from __future__ import annotations

import numpy as np

RELATIVE_SPREAD = 1e-6  # of a group's largest score: deviations below it are rounding


def spread(scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Standard deviation of each group's valid scores, and whether it is more than rounding; [P] each.

    Args:
        scores: [P, G], NaN where a score is missing. A group without valid scores has deviation 0.
    """
    scores = np.asarray(scores, dtype=np.float64)
    centred = _centred(scores)
    n = np.maximum((~np.isnan(scores)).sum(1), 1)
    std = np.sqrt(np.nansum(centred**2, axis=1) / n)
    largest = np.nan_to_num(np.abs(scores)).max(axis=1)
    return std, std > RELATIVE_SPREAD * largest


def standardized(scores: np.ndarray, *, min_valid: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Scores with mean 0 and deviation 1 inside each group, float64 [P, G], and whether each group has signal, [P].

    Args:
        scores: [P, G], NaN where a score is missing; it stays NaN. A group without signal is 0.
        min_valid: a group with fewer valid scores has no signal.
    """
    scores = np.asarray(scores, dtype=np.float64)
    std, differs = spread(scores)
    informative = differs & ((~np.isnan(scores)).sum(1) >= min_valid)
    scale = np.where(informative, std, np.inf)[:, None]
    return _centred(scores) / scale, informative


def _centred(scores: np.ndarray) -> np.ndarray:
    """Scores minus their group's mean; NaN stays NaN."""
    n = np.maximum((~np.isnan(scores)).sum(1, keepdims=True), 1)
    return scores - np.nansum(scores, axis=1, keepdims=True) / n
