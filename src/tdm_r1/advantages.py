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


def group_advantages(rewards: Tensor, *, min_valid: int = 2, eps: float = 1e-6) -> GroupAdvantages:
    """A_i = (r_i - mean) / std inside each group (paper, section 3), over the scores that are not missing.

    Args:
        rewards: [P, G], NaN where a score is missing.
        min_valid: groups with fewer valid scores are skipped.
        eps: groups whose standard deviation is below this carry no signal and are skipped.
    """
    valid = ~rewards.isnan()
    n = valid.sum(1, keepdim=True)
    r = torch.where(valid, rewards, 0.0)
    mean = r.sum(1, keepdim=True) / n.clamp_min(1)
    centred = torch.where(valid, r - mean, 0.0)
    std = (centred.square().sum(1, keepdim=True) / n.clamp_min(1)).sqrt()
    keep = (n >= min_valid) & (std > eps)
    advantage = torch.where(keep, centred / std.clamp_min(eps), 0.0)
    return GroupAdvantages(advantage, valid & keep, int((~keep).sum()))
