"""Few-step solvers that record every point of the trajectory.

A solver walks the grid 1 = t_K > ... > t_0 = 0 (`flow.few_step_grid`) from grid[i] to grid[i + 1]; index i counts
forward evaluations, so x_{t_k} of the paper is ``points[K - k]``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, get_args

import torch
from torch import Tensor

from . import flow

Solver = Literal["euler", "dpm", "stochastic"]  # as algorithms.settings has it


@dataclass(frozen=True)
class Trajectory:
    """``points[i]`` is x at grid[i], ``clean[i]`` the x0_hat read there.

    grid: [K + 1]. points: [K + 1, B, ...]. clean: [K, B, ...].
    """

    grid: Tensor
    points: Tensor
    clean: Tensor

    @property
    def steps(self) -> int:
        return len(self.clean)

    @property
    def final(self) -> Tensor:
        return self.points[-1]

    def rows(self, rows: Tensor) -> Trajectory:
        """The trajectories of the samples in ``rows`` [N] (int64)."""
        return Trajectory(self.grid, self.points[:, rows], self.clean[:, rows])

    def at(self, i: Tensor) -> Tensor:
        """The points of index ``i`` [B], one of each sample: [B, ...]."""
        return self.points[i, torch.arange(len(i), device=i.device)]

    def clean_at(self, i: Tensor) -> Tensor:
        """The clean predictions of index ``i`` [B]."""
        return self.clean[i, torch.arange(len(i), device=i.device)]

    def time(self, i: Tensor) -> Tensor:
        """grid[i] in the points' precision, where the points are, [B]."""
        return self.grid.to(self.points.device, flow.widen(self.points).dtype)[i]


def euler_step(x0: Tensor, x_t: Tensor, t: Tensor, s: Tensor) -> Tensor:
    """First-order step from t to s < t, DDIM in flow form: x_s = (s/t) x_t + (1 - s/t) x0_hat (arXiv 2010.02502)."""
    ratio = flow.expand(s, x_t) / flow.expand(t, x_t)
    return ratio * x_t + (1 - ratio) * x0


def dpm_step(x0: Tensor, x0_last: Tensor, x_t: Tensor, t_last: Tensor, t: Tensor, s: Tensor) -> Tensor:
    """DPM-Solver++ 2M (arXiv 2211.01095, algorithm 2) on flow sigmas: alpha = 1 - t, sigma = t.

    With lambda = log(alpha/sigma), h = lambda_s - lambda_t and h_last likewise, the clean prediction is extrapolated
    to D = x0 + h/(2 h_last) (x0 - x0_last). The first step (t_last = t), the one after t_last = 1 (where lambda is
    infinite) and the one to s = 0 are of first order.
    """
    t_last, t, s = (flow.expand(u, x_t) for u in (t_last, t, s))
    first_order = (t_last >= 1) | (t_last <= t) | (s <= 0)

    def log_snr(u: Tensor) -> Tensor:
        u = u.clamp(1e-6, 1 - 1e-6)  # only ever reached where the first-order branch is taken
        return torch.log1p(-u) - torch.log(u)

    half_ratio = 0.5 * (log_snr(s) - log_snr(t)) / (log_snr(t) - log_snr(t_last))
    d = x0 + torch.where(first_order, 0.0, half_ratio) * (x0 - x0_last)
    return (s / t) * x_t + (1 - s / t) * d


def solver_step(
    solver: Solver,
    x0: Tensor,
    x0_last: Tensor,
    x_t: Tensor,
    t_last: Tensor,
    t: Tensor,
    s: Tensor,
    eps: Tensor | None = None,
) -> Tensor:
    """One step of the named solver from t to s, given the clean prediction at t and the last one, at t_last.

    ``stochastic`` re-noises the clean prediction with ``eps``, as consistency models do: the paper's ablation
    (Fig. 4); the others ignore ``eps``. On the first step pass t_last = t and x0_last = x0. Times are numbers or [B].
    """
    match solver:
        case "euler":
            return euler_step(x0, x_t, t, s)
        case "dpm":
            return dpm_step(x0, x0_last, x_t, t_last, t, s)
        case "stochastic":
            if eps is None:
                raise ValueError("solver = 'stochastic' needs noise at every step")
            return flow.add_noise(x0, eps, s)
    raise ValueError(f"solver = {solver!r}: known are {', '.join(get_args(Solver))}")


def sample(
    velocity: Callable[[Tensor, Tensor], Tensor],
    x_1: Tensor,
    grid: Tensor,
    *,
    solver: Solver = "euler",
    noise: Callable[[int], Tensor] | None = None,
) -> Trajectory:
    """Integrates from noise ``x_1`` [B, ...] at grid[0] = 1 down to grid[K] = 0, keeping every point.

    Args:
        velocity: ``velocity(x_t, t)`` takes t [B] in [0, 1].
        noise: ``noise(i)`` is the noise [B, ...] of step i, which the stochastic solver alone asks for.
    """
    times = grid.to(x_1.device, flow.widen(x_1).dtype)
    x, last, t_last = x_1, None, times[0]
    points, clean = [x_1], []
    for i, (t, s) in enumerate(pairwise(times)):
        x0 = flow.x0_from_v(velocity(x, t.expand(len(x))), x, t)
        eps = noise(i).to(x) if noise and solver == "stochastic" else None
        x = solver_step(solver, x0, x0 if last is None else last, x, t_last, t, s, eps)
        last, t_last = x0, t
        points.append(x)
        clean.append(x0)
    return Trajectory(grid, torch.stack(points), torch.stack(clean))
