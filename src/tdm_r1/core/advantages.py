"""Advantages inside a group: the samples of one prompt."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from .groups import spread, standardized


@dataclass(frozen=True)
class GroupAdvantages:
    """``advantage`` [P, G], zero where a sample or its whole group is skipped; ``used`` [P, G]."""

    advantage: Tensor
    used: Tensor
    skipped_groups: int

    def metrics(self, rewards: Tensor) -> dict[str, float]:
        """Of the rewards [P * G] that these are the advantages of."""
        of_groups = rewards.reshape(self.used.shape).double().cpu().numpy()
        return {
            "reward/mean": float(rewards.nanmean()),
            "reward/group_std": float(spread(of_groups)[0].mean()),
            "reward/missing": float(rewards.isnan().sum()),
            "reward/skipped_groups": float(self.skipped_groups),
        }


def group_advantages(
    rewards: Tensor,
    *,
    keep: int | None = None,
    min_valid: int = 2,
    deviation: Literal["group", "batch"] = "group",
    clip: float | None = None,
) -> GroupAdvantages:
    """A_i = (r_i - mean) / std inside each group (paper, section 3), over the scores that are not missing.

    Means and deviations are taken in float64: in float32 a group of equal scores of 20 has a spread of rounding.

    Args:
        rewards: [P, G], NaN where a score is missing.
        keep: use this many samples of each group alone, half from its top and half from its bottom, as if they were
            the group: large groups are cheap to score, and their extremes carry most of the signal. None uses all.
        min_valid: groups with fewer valid scores are skipped, as are groups without a difference (`groups.spread`).
        deviation: divide by the group's standard deviation, or by that of all valid scores of the batch (the authors'
            release, Flow-GRPO): then a group's weight grows with its spread.
        clip: bound of |A_i|; None for none.
    """
    scores = rewards.detach().double().cpu().numpy()
    if keep is not None and keep < scores.shape[1]:
        scores = _extremes(scores, keep)
    found, has_signal = standardized(scores, min_valid=min_valid)
    if deviation == "batch" and has_signal.any():
        found = found * (spread(scores)[0][:, None] / np.nanstd(scores))
    if clip is not None:
        found = found.clip(-clip, clip)
    advantage = torch.from_numpy(found).to(rewards.device, torch.promote_types(torch.float32, rewards.dtype))
    informative = torch.from_numpy(has_signal).to(rewards.device)
    used = ~advantage.isnan() & informative[:, None]
    return GroupAdvantages(torch.where(used, advantage, 0.0), used, int((~informative).sum()))


def _extremes(scores: np.ndarray, keep: int) -> np.ndarray:
    """The scores [P, G] with NaN in place of all but the ``keep`` outermost of each group."""
    n = (~np.isnan(scores)).sum(1, keepdims=True)
    rank = scores.argsort(axis=1, kind="stable").argsort(axis=1)  # NaN sorts last
    outer = (rank < keep // 2) | (rank >= n - (keep - keep // 2))
    return np.where(outer & (rank < n), scores, np.nan)
