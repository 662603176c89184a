"""The losses of TDM and TDM-R1 as pure functions of tensors to a ``[B]`` tensor; the caller reduces, weights, logs.

Equation numbers are those of TDM-R1 (arXiv 2603.07700). Predictions are velocities v = eps - x_0. Where the print
cannot be followed literally, `docs/method.md` says what is implemented instead and why.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from . import flow


def _mean(x: Tensor) -> Tensor:
    """Mean over all dimensions but the first: [B, ...] to [B]."""
    return x.flatten(1).mean(1)


def squared_error(a: Tensor, b: Tensor) -> Tensor:
    """Mean of (a - b)^2 over all dimensions but the first, [B]."""
    return _mean((a - b).square())


# ------------------------------------------------------------------------------------------ denoising


def denoising(v: Tensor, x_t: Tensor, eps: Tensor, s: Tensor, t: Tensor, *, clamp: float = 0.1) -> Tensor:
    """Eq. 1: denoising of x_t ~ q(x_t | x_s) back to x_s, in its bounded form, [B].

    ``w(t, s) | eps - (sigma_{t,s}/t) eps_hat |^2``, meaned over dimensions, with `balanced_weight`: with s = 0 and t
    below 1 - clamp it is the plain velocity error ``|v - (eps - x_0)|^2``, and it stays finite as t -> s, where the
    conditional velocity blows up.

    Args:
        v: the network's velocity at (x_t, t), [B, ...].
        x_t, eps: the noised point and the noise that made it (`flow.renoise`), [B, ...].
        s, t: times [B], 0 <= s <= t < 1.
        clamp: lower bound of 1 - t in the weight.
    """
    ratio, weight = balanced_weight(s, t, x_t, clamp)
    return _mean(weight * (eps - ratio * flow.eps_from_v(v, x_t, t)).square())


def balanced_weight(s: Tensor, t: Tensor, like: Tensor, clamp: float) -> tuple[Tensor, Tensor]:
    """sigma_{t,s}/t, and the weight w(t, s) = 1 / (1 - (sigma_{t,s}/t)^2 + max(1 - t, clamp)^2).

    Near t = s the noise cannot be inferred from x_t and the residual has variance 1 - ratio^2; with s = 0 it has about
    (1 - t)^2. The weight is the inverse of their sum, so that draws of every (s, t) are about equally loud: with
    1 / (1 - t)^2 alone the draws near t = s drown the others (docs/notes).
    """
    _, sigma = flow.transition(s, t, like)
    t = flow.expand(t, like)
    ratio = sigma / t.clamp_min(1e-6)
    return ratio, 1 / (1 - ratio.square() + (1 - t).clamp_min(clamp).square())


# ------------------------------------------------------------------------------------------ surrogate


def preference_terms(loss_phi: Tensor, loss_ref: Tensor, advantage: Tensor, span: Tensor) -> Tensor:
    """The terms whose sum over a group stands inside the sigmoid of Eq. 9 and 18, [B].

    ``(T - t_k) A_i (l_phi,i - l_ref,i)``: membership is sign(A_i) and the weight omega_i is |A_i|, so the two sums
    of Eq. 9 are one signed sum, and the partition function cancels because the A_i of a group sum to zero.

    Args:
        loss_phi, loss_ref: `denoising` under the surrogate and under the reference, [B].
        advantage: A_i, [B].
        span: T - t_k of each sample, [B].
    """
    return span * advantage * (loss_phi - loss_ref)


def group_preference(sums: Tensor, *, beta: float) -> Tensor:
    """Eq. 8, 9 and 18: ``-log sigmoid(-beta S)`` of each group's sum S of `preference_terms`, [n_groups].

    The print of Eq. 9 lacks the outer minus (Eq. 16 has it).

    Args:
        sums: [n_groups].
        beta: inverse temperature of the preference; the denoising losses are means over dimensions.
    """
    return -F.logsigmoid(-beta * sums)


def group_slope(loss_phi: Tensor, loss_ref: Tensor, advantage: Tensor, group: int, beta: float) -> Tensor:
    """sigmoid(beta / G sum_i A_i (l_phi,i - l_ref,i)) of each sample's group of ``group`` consecutive ones, [B].

    The slope of `group_preference` over beta / G, as DGPO (arXiv 2510.08425) and the authors' release hold it constant.
    """
    inside = (advantage * (loss_phi - loss_ref)).reshape(-1, group).sum(1)
    return torch.sigmoid(beta / group * inside).repeat_interleave(group)


def held_by_ratio(loss_phi: Tensor, loss_old: Tensor, advantage: Tensor, clip: float) -> Tensor:
    """Samples whose ratio exp(l_old - l_phi) has left 1 +- ``clip`` in their advantage's direction, bool [B].

    The clip of PPO (arXiv 1707.06347, Eq. 7), as DGPO takes it: a better sample above 1 + clip, a worse one below
    1 - clip.
    """
    ratio = (loss_old - loss_phi).exp()
    return torch.where(advantage > 0, ratio > 1 + clip, (ratio < 1 - clip) & (advantage < 0))


def anchored_regression(
    v_phi: Tensor,
    v_ref: Tensor,
    v_base: Tensor,
    x_t: Tensor,
    eps: Tensor,
    s: Tensor,
    t: Tensor,
    advantage: Tensor,
    *,
    kappa: float = 1.0,
    clamp: float = 0.1,
) -> Tensor:
    """The anchored surrogate (ours): ``| (eps_phi - eps_ref) - kappa A (eps* - eps_base) |^2``, weighted, [B].

    At phi = ref the gradient of `group_preference` is beta/2 sum_i A_i grad l_i; adding the trust region
    ``|eps_phi - eps_ref|^2`` and completing the square gives this regression with eps_base = eps_ref. Its fixed point
    is ``eps_phi - eps_ref = kappa E[A (eps* - eps_base) | x_t]``: by Tweedie's formula the gradient of the expected
    advantage at that noise level, exactly so if the baseline is the generator's own denoiser (the fake score); else
    ``kappa E[A | x_t] (E[eps* | x_t] - eps_base)`` is added. Convex in eps_phi, without beta, nothing to saturate. The
    weight is ``(sigma_{t,s}/t)^2 w(t, s)`` with `balanced_weight`'s w, under which the residual is bounded.
    """
    ratio, weight = balanced_weight(s, t, x_t, clamp)
    eps_ref = flow.eps_from_v(v_ref, x_t, t)
    target = kappa * flow.expand(advantage, x_t) * (eps - ratio * flow.eps_from_v(v_base, x_t, t))
    return _mean(weight * (ratio * (flow.eps_from_v(v_phi, x_t, t) - eps_ref) - target).square())


def clipped(log_ratio: Tensor, advantage: Tensor, limit: float) -> Tensor:
    """``l_phi - l_ref`` [B], held where a sample has gone further than ``limit`` in its advantage's direction (better
    samples down, worse ones up): it gets no gradient there. One that went the wrong way keeps its own, as in PPO
    (arXiv 1707.06347, Eq. 7).
    """
    return torch.where(advantage > 0, log_ratio.clamp_min(-limit), log_ratio.clamp_max(limit))


# ------------------------------------------------------------------------------------------ other methods


def normalized_error(v: Tensor, x_t: Tensor, t: Tensor, x_0: Tensor, *, floor: float = 1e-5) -> Tensor:
    """DiffusionNFT's error (arXiv 2509.16117, section 3.3): mean |x0_hat - x_0|^2 over mean |x0_hat - x_0|, [B].

    The normaliser is held constant, and at least ``floor``.
    """
    error = flow.x0_from_v(v, x_t, t) - x_0
    return _mean(error.square()) / _mean(error.detach().abs()).clamp_min(floor)


def clipped_policy(new: Tensor, old: Tensor, advantage: Tensor, clip: float) -> tuple[Tensor, Tensor]:
    """PPO's clipped loss (arXiv 1707.06347, Eq. 7) of log likelihoods [B], and the likelihoods' ratio, [B]."""
    ratio = (new - old).exp()
    return torch.maximum(-advantage * ratio, -advantage * ratio.clamp(1 - clip, 1 + clip)), ratio.detach()


# ------------------------------------------------------------------------------------------ generator


def distribution_matching(x0_fake: Tensor, x0_teacher: Tensor) -> Tensor:
    """Eq. 2: the direction of KL(generator || teacher), ``x0_fake - x0_teacher``, [B, ...].

    Scores are linear in x0_hat at a fixed (x_t, t), so this is a positive multiple of s_fake - s_psi.
    """
    return x0_fake - x0_teacher


def reward_direction(x0_phi: Tensor, x0_ref: Tensor) -> Tensor:
    """Eq. 10: the direction in which log p_phi(x_t)/p_ref(x_t), the implicit reward, falls: ``x0_ref - x0_phi``.

    Eq. 11 with phi's network held constant cancels or points the wrong way, depending on the parameterisation read
    into it; the score difference is what the RLHF optimum p_phi ~ p_ref exp(r/beta) prescribes (`docs/method.md`).
    """
    return x0_ref - x0_phi


def magnitude(x0: Tensor, x0_teacher: Tensor, *, floor: float) -> Tensor:
    """DMD's normaliser: mean |x0_hat - x0_teacher| of each sample, at least ``floor``; [B]."""
    return _mean((x0 - x0_teacher).abs()).clamp_min(floor)


def follow(output: Tensor, direction: Tensor) -> Tensor:
    """A loss whose gradient with respect to ``output`` is ``direction`` over the number of dimensions, [B].

    ``direction`` is the stop-gradient of Eq. 2 and 11: it must not require grad.
    """
    if direction.requires_grad:
        raise AssertionError("the direction of Eq. 2 and 11 is a stop-gradient")
    return _mean(output * direction)


def saturation(terms: Tensor) -> Tensor:
    """Share of preference sigmoids that are saturated: |argument| above 4 (gradient under 2 % of the largest)."""
    return (terms.abs() > 4).to(torch.float32).mean()
