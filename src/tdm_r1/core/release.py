"""Formulas of the authors' training code (github.com/Luo-Yihong/TDM-R1, SD3.5-M) where it goes beyond the paper.

Pure functions of tensors, as in `losses`. Velocities are v = eps - x_0; `docs/method.md` compares them with the paper.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import flow


def unshifted_uniform(low: Tensor, *, shift: float, gap: float, noise: torch.Generator) -> Tensor:
    """Noise levels t [N], uniform from ``low`` + ``gap`` to 1 in unshifted time, then shifted.

    Args:
        low: lower bounds in unshifted time, [N] below 1 - gap.
        noise: on the CPU: the same numbers on every machine.
    """
    u = flow.uniform(len(low), low + gap, 1.0, generator=noise)
    return flow.shift_time(u, shift)


def clean_target(clean: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
    """The fake score's target (x_t - x0_hat) / t: the velocity towards the generator's clean prediction of the step.

    x_t re-noises the point that the step arrives at, so x_t is not x0_hat noised, except where that point is x_0.
    """
    return flow.v_from_x0(clean, x_t, t)


def velocity_back_to(x_s: Tensor, eps: Tensor, s: Tensor, t: Tensor) -> Tensor:
    """`flow.conditional_velocity` at x_t = `flow.renoise` (x_s, eps, s, t), written in x_s: finite up to t = 1.

    -x_s / (1 - s) + eps (t + (1 - t) (s / (1 - s))^2) / sigma_{t,s}.
    """
    _, sigma = flow.transition(s, t, x_s)
    s, t = flow.expand(s, x_s), flow.expand(t, x_s)
    return -flow.widen(x_s) / (1 - s) + eps * (t + (1 - t) * (s / (1 - s)).square()) / sigma


# ------------------------------------------------------------------------------------------ surrogate


def held_by_distance(loss_phi: Tensor, loss_ref: Tensor, advantage: Tensor, distance: Tensor, limit: float) -> Tensor:
    """Samples that have moved in their advantage's direction, where phi is far from its reference, bool [B].

    Args:
        distance: |v_phi - v_ref|^2, as the mean of the samples that share a draw, [B].
        limit: distance above which it holds.
    """
    moved = torch.where(advantage > 0, loss_phi < loss_ref, (loss_phi > loss_ref) & (advantage < 0))
    return moved & (distance > limit)


# ------------------------------------------------------------------------------------------ generator


def kl_direction(
    x0_fake: Tensor, x0_cond: Tensor, x0_uncond: Tensor, *, guidance: float, weight: float
) -> tuple[Tensor, Tensor]:
    """The KL part with guidance as a reward of weight ``weight``, and the guided teacher's clean prediction.

    (x0_fake - x0_cond) - weight (guidance - 1) (x0_cond - x0_uncond). With weight 1 it is Eq. 2 against the guided
    teacher.
    """
    beyond = (guidance - 1) * (x0_cond - x0_uncond)
    return x0_fake - x0_cond - weight * beyond, x0_cond + beyond
