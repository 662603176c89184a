"""The stochastic sampler of Flow-GRPO (arXiv 2505.05470, Eq. 9 to 11): an SDE with the flow's own marginals.

Each step from t to s < t is a Gaussian, N(mean, std^2 (t - s)), whose likelihood policy gradients need.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import flow


def noise_scale(t: Tensor, t_below_1: Tensor, level: float) -> Tensor:
    """``level`` sqrt(t / (1 - t)), whose 1 - t at t = 1 is that of ``t_below_1``, the grid's second point."""
    return level * (t / (1 - torch.where(t >= 1, t_below_1, t))).sqrt()


def step_mean(v: Tensor, x_t: Tensor, t: Tensor, s: Tensor, scale: Tensor) -> Tensor:
    """x_t + (v + scale^2 / (2 t) (x_t + (1 - t) v)) (s - t): the mean of x_s."""
    t, s, scale = (flow.expand(a, x_t) for a in (t, s, scale))
    return flow.widen(x_t) + (v + scale.square() / (2 * t) * (x_t + (1 - t) * v)) * (s - t)


def log_likelihood(x_s: Tensor, mean: Tensor, deviation: Tensor) -> Tensor:
    """log N(x_s; mean, deviation^2), as the mean over dimensions and up to a constant, [B]."""
    return -((x_s - mean) / flow.expand(deviation, x_s)).square().flatten(1).mean(1) / 2
