"""Rectified-flow maths: the one owner of the direction of time.

``t`` in [0, 1] is the noise level: t = 0 is data, t = 1 is noise, x_t = (1 - t) x_0 + t eps, v = eps - x_0.
``timestep`` (0..1000) exists only at the edge to diffusers. Everything here is float32 or better, whatever the
network's dtype. Times are scalars or ``[B]`` tensors and broadcast over the trailing dimensions.
"""

from __future__ import annotations

import torch
from torch import Tensor


def expand(t: Tensor | float, like: Tensor) -> Tensor:
    """``t`` (a number or [B]) as a float tensor that broadcasts against ``like`` [B, ...], float32 or better."""
    t = torch.as_tensor(t, device=like.device)
    t = t.to(torch.promote_types(torch.float32, like.dtype))
    return t.reshape(t.shape + (1,) * (like.ndim - t.ndim)) if t.ndim else t


def widen(x: Tensor) -> Tensor:
    """``x`` in float32, or in its own dtype where that is wider."""
    return x.to(torch.promote_types(torch.float32, x.dtype))


# ------------------------------------------------------------------------------------------ path


def add_noise(x_0: Tensor, eps: Tensor, t: Tensor | float) -> Tensor:
    """x_t = (1 - t) x_0 + t eps."""
    t = expand(t, x_0)
    return (1 - t) * widen(x_0) + t * eps


def x0_from_v(v: Tensor, x_t: Tensor, t: Tensor | float) -> Tensor:
    """x0_hat = x_t - t v."""
    return widen(x_t) - expand(t, x_t) * v


def eps_from_v(v: Tensor, x_t: Tensor, t: Tensor | float) -> Tensor:
    """eps_hat = x_t + (1 - t) v."""
    return widen(x_t) + (1 - expand(t, x_t)) * v


def v_from_x0(x_0: Tensor, x_t: Tensor, t: Tensor | float) -> Tensor:
    """v = (x_t - x0_hat) / t; infinite at t = 0."""
    return (widen(x_t) - x_0) / expand(t, x_t)


def v_from_eps(eps: Tensor, x_t: Tensor, t: Tensor | float) -> Tensor:
    """v = (eps_hat - x_t) / (1 - t); infinite at t = 1."""
    return (eps - widen(x_t)) / (1 - expand(t, x_t))


def score_from_v(v: Tensor, x_t: Tensor, t: Tensor | float) -> Tensor:
    """score(x_t) = -eps_hat / t; infinite at t = 0."""
    return -eps_from_v(v, x_t, t) / expand(t, x_t)


def v_from_score(score: Tensor, x_t: Tensor, t: Tensor | float) -> Tensor:
    """v = (-t score - x_t) / (1 - t); infinite at t = 1."""
    return v_from_eps(-expand(t, x_t) * score, x_t, t)


# ------------------------------------------------------------------------------------------ transitions


def transition(s: Tensor | float, t: Tensor | float, like: Tensor) -> tuple[Tensor, Tensor]:
    """alpha_{t,s} and sigma_{t,s} of q(x_t | x_s) = N(alpha_{t,s} x_s, sigma_{t,s}^2), 0 <= s <= t <= 1, s < 1."""
    s, t = expand(s, like), expand(t, like)
    alpha = (1 - t) / (1 - s)
    # t^2 - alpha^2 s^2 as a product, so that nothing cancels near t = s
    sigma = ((t - alpha * s) * (t + alpha * s)).clamp_min(0).sqrt()
    return alpha, sigma


def renoise(x_s: Tensor, eps: Tensor, s: Tensor | float, t: Tensor | float) -> Tensor:
    """A draw x_t = alpha_{t,s} x_s + sigma_{t,s} eps of q(x_t | x_s)."""
    alpha, sigma = transition(s, t, x_s)
    return alpha * widen(x_s) + sigma * eps


def conditional_eps(eps: Tensor, s: Tensor | float, t: Tensor | float) -> Tensor:
    """eps* = t eps / sigma_{t,s}: the eps-reading of the conditional velocity back to x_s.

    Regressing an eps-prediction on it regresses on the marginal one, since -eps/sigma_{t,s} is the score of
    q(x_t | x_s). Unbounded as t -> s; losses use its bounded form (see `losses.denoising`).
    """
    _, sigma = transition(s, t, eps)
    return expand(t, eps) * eps / sigma


def conditional_velocity(x_t: Tensor, eps: Tensor, s: Tensor | float, t: Tensor | float) -> Tensor:
    """v*(x_t, x_s) = -x_t/(1-t) + t eps/((1-t) sigma_{t,s}): the velocity of a perfect denoiser back to x_s.

    With s = 0 it is eps - x_0.
    """
    return v_from_eps(conditional_eps(eps, s, t), x_t, t)


# ------------------------------------------------------------------------------------------ time


def shift_time(u: Tensor, shift: float) -> Tensor:
    """shift(u, s) = s u / (1 + (s - 1) u): moves times in [0, 1] towards noise for s > 1."""
    return shift * u / (1 + (shift - 1) * u)


def few_step_grid(steps: int, shift: float, *, device: torch.device | str = "cpu") -> Tensor:
    """The grid [K + 1] with 1 = grid[0] > ... > grid[K] = 0: t_K first, t_0 last, float64."""
    if steps < 1:
        raise ValueError(f"steps = {steps}: a grid needs at least 1 step")
    return shift_time(torch.linspace(1, 0, steps + 1, dtype=torch.float64, device=device), shift)


def logit_normal(n: int, *, shift: float = 1.0, generator: torch.Generator) -> Tensor:
    """[n] times with logit(t) standard normal, then shifted (SD3, arXiv 2403.03206, section 3.1)."""
    u = torch.randn(n, generator=generator, device=generator.device).sigmoid()
    return shift_time(u, shift)


def uniform(n: int, low: Tensor | float, high: Tensor | float, *, generator: torch.Generator) -> Tensor:
    """[n] times uniform in [low, high); the bounds may be [n] tensors."""
    u = torch.rand(n, generator=generator, device=generator.device)
    if isinstance(low, Tensor):
        u = u.to(low.device)
    return low + (high - low) * u


def timestep(t: Tensor) -> Tensor:
    """diffusers' timestep in [0, 1000] of ``t`` in [0, 1]."""
    return 1000 * t
