"""Advantages inside a group: the samples of one prompt."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class GroupAdvantages:
    """``advantage`` [P, G], zero where a sample or its whole group is skipped; ``used`` [P, G]."""

    advantage: Tensor
    used: Tensor
    skipped_groups: int


def group_advantages(
    rewards: Tensor, *, keep: int | None = None, min_valid: int = 2, eps: float = 1e-6
) -> GroupAdvantages:
    """A_i = (r_i - mean) / std inside each group (paper, section 3), over the scores that are not missing.

    Args:
        rewards: [P, G], NaN where a score is missing.
        keep: use this many samples of each group alone, half from its top and half from its bottom, centred again:
            large groups are cheap to score, and their extremes carry most of the signal. None uses all.
        min_valid: groups with fewer valid scores are skipped.
        eps: groups whose standard deviation is below this carry no signal and are skipped.
    """
    valid = ~rewards.isnan()
    n = valid.sum(1, keepdim=True)
    r = torch.where(valid, rewards, 0.0)
    mean = r.sum(1, keepdim=True) / n.clamp_min(1)
    centred = torch.where(valid, r - mean, 0.0)
    std = (centred.square().sum(1, keepdim=True) / n.clamp_min(1)).sqrt()
    informative = (n >= min_valid) & (std > eps)
    used = valid & informative
    advantage = torch.where(used, centred / std.clamp_min(eps), 0.0)
    if keep is not None and keep < rewards.shape[1]:
        used = used & _extremes(torch.where(used, advantage, torch.nan), keep)
        mean = torch.where(used, advantage, 0.0).sum(1, keepdim=True) / used.sum(1, keepdim=True).clamp_min(1)
        advantage = torch.where(used, advantage - mean, 0.0)
    return GroupAdvantages(advantage, used, int((~informative).sum()))


def _extremes(advantage: Tensor, keep: int) -> Tensor:
    """Which samples [P, G] are among the ``keep`` outermost of their group; NaN ones never are."""
    n = (~advantage.isnan()).sum(1, keepdim=True)
    rank = advantage.argsort(dim=1, stable=True).argsort(dim=1)  # NaN sorts last
    return (rank < n) & ((rank < keep // 2) | (rank >= n - (keep - keep // 2)))
