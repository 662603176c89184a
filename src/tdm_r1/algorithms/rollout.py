"""Trajectories of the generator, and re-noised points of them: what every loss is computed on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..core import flow, processes, solvers
from ..core.randomness import Normal
from ..models.protocol import Conditioning, guided, in_parts
from ..models.roles import Roles
from .settings import NoiseRange, SamplerConfig

Points = Literal["all", "earlier", "final"]  # of a trajectory: every x_{t_k}, those before x_0, x_0
TIME_MAX = 0.99  # t is drawn below it where t_k is: at t = 1 every point of a trajectory is the same noise
TIME_GAP = 0.02  # share of the range above t_k that is left out: at t = t_k there is no noise to remove


@dataclass(frozen=True)
class Rollout:
    """Trajectories of B samples and the prompts that they were made for."""

    trajectory: solvers.Trajectory
    conditioning: Conditioning

    def __len__(self) -> int:
        return len(self.conditioning)

    def rows(self, rows: Tensor) -> Rollout:
        """The samples in ``rows`` [N] (int64)."""
        return Rollout(self.trajectory.rows(rows), self.conditioning.rows(rows))

    @staticmethod
    def join(parts: Sequence[Rollout]) -> Rollout:
        """Several on the same grid, one after the other."""
        trajectories = [part.trajectory for part in parts]
        points, clean = (torch.cat([getattr(t, name) for t in trajectories], 1) for name in ("points", "clean"))
        trajectory = solvers.Trajectory(trajectories[0].grid, points, clean)
        return Rollout(trajectory, Conditioning.join([part.conditioning for part in parts]))

    def micro_batches(self, size: int, *, group: int = 1) -> Iterator[Tensor]:
        """Row indices of at most ``size`` samples at a time; of this process's share, where there are several.

        Args:
            group: consecutive samples that stay in one micro-batch.
        """
        yield from micro_batches(torch.arange(len(self)), size, group=group)


def micro_batches(rows: Tensor, size: int, *, group: int = 1) -> Iterator[Tensor]:
    """This process's share of ``rows`` [N], at most ``size`` at a time, see `Rollout.micro_batches`.

    Every process gets the same number of micro-batches, so the last may be empty (`core.processes.in_step`).
    """
    own, size = processes.mine(rows, group), size // group * group
    yield from processes.in_step(own.split(size) if len(own) else [], processes.most(len(rows), group), size)


@dataclass(frozen=True)
class Renoised:
    """Points x_t ~ q(x_t | x_s) with s = t_k. ``index`` i has grid[i] = t_{k+1}.

    index: int64 [B] in 0..K-1, the step whose result is x_s. s, t: [B]. x_t, eps: [B, C, H, W].
    """

    index: Tensor
    s: Tensor
    t: Tensor
    x_t: Tensor
    eps: Tensor


@dataclass(frozen=True)
class Draw:
    """What was drawn for every sample: the points x_s [B, C, H, W], times and noise, from which `rows` makes x_t."""

    index: Tensor
    s: Tensor
    t: Tensor
    x_s: Tensor
    noise: Normal

    def rows(self, rows: Tensor) -> Renoised:
        """The re-noised points of the samples in ``rows`` [N] (int64)."""
        s, t, eps = self.s[rows], self.t[rows], self.noise[rows].to(self.x_s.device)
        return Renoised(self.index[rows], s, t, flow.renoise(self.x_s[rows], eps, s, t), eps)

    def all(self) -> Renoised:
        """Those of all samples."""
        return self.rows(torch.arange(len(self.index)))


@torch.no_grad()  # the trajectory is data; only one step of it is re-run with gradient (TDM.fit_generator)
def roll_out(
    roles: Roles,
    role: str,
    conditioning: Conditioning,
    x_1: Tensor,
    sampler: SamplerConfig,
    noise: torch.Generator | None,
    *,
    micro_batch: int,
    empty: Conditioning | None = None,
) -> Rollout:
    """The trajectories of a role from noise ``x_1`` [B, C, H, W], keeping every x_{t_k}.

    Args:
        empty: the empty prompt's conditioning, where the sampler has guidance.
    """
    grid = flow.few_step_grid(sampler.steps, sampler.shift)
    own = processes.mine(torch.arange(len(x_1)))
    c, start = conditioning.rows(own), x_1[own]
    noises = [Normal.drawn(noise, x_1.shape[1:]) for _ in range(sampler.steps)] if noise else []

    with roles.use(role) as velocity:
        field = guided(velocity, empty, sampler.guidance) if empty else velocity
        v = in_parts(field, micro_batch, most=processes.most(len(x_1)))
        walked = solvers.sample(
            lambda x, t: v(x, t, c), start, grid, solver=sampler.solver, noise=lambda step: noises[step][own]
        )
    points, clean = (
        processes.gather(a.transpose(0, 1), len(x_1)).transpose(0, 1) for a in (walked.points, walked.clean)
    )
    return Rollout(solvers.Trajectory(grid, points, clean), conditioning)


def draw_points(
    rollout: Rollout,
    noise: torch.Generator,
    *,
    group_size: int = 1,
    points: Points = "all",
    noise_range: NoiseRange = "to_noise",
    time_range: tuple[float, float] = (0.0, 1.0),
) -> Draw:
    """Draws k, t >= t_k and noise for every sample, shared inside consecutive groups of ``group_size``.

    Args:
        noise: on the CPU: the same numbers on every machine.
        points: x_0 alone, those before it, or all.
        noise_range, time_range: see `draw_times`.
    """
    n_groups, trajectory = len(rollout) // group_size, rollout.trajectory
    last = trajectory.steps - 1
    low, high = {"all": (0, last), "earlier": (0, last - 1), "final": (last, last)}[points]
    index = torch.randint(low, high + 1, (n_groups,), generator=noise)  # on the CPU, so that a GPU waits for nothing
    eps = Normal.drawn(noise, trajectory.final.shape[1:], shared=group_size)
    t = draw_times(trajectory, index, noise, noise_range=noise_range, time_range=time_range)
    index, t = (a.repeat_interleave(group_size, 0) for a in (index, t))
    return Draw(index, trajectory.time(index + 1), t, trajectory.at(index + 1), eps)


def draw_times(
    trajectory: solvers.Trajectory,
    index: Tensor,
    noise: torch.Generator,
    *,
    noise_range: NoiseRange,
    time_range: tuple[float, float] = (0.0, 1.0),
) -> Tensor:
    """t >= t_k of each sample [B], where grid[index + 1] = t_k.

    ``noise_range``: up to 1, or to t_{k+1}. ``time_range`` narrows it where t_k allows that. t stays off t_k and 1.
    """
    low = trajectory.time(index + 1)
    high = trajectory.time(index) if noise_range == "interval" else torch.ones_like(low)
    low = torch.where(high > time_range[0], low.clamp_min(time_range[0]), low)
    high = torch.where(low < time_range[1], high.clamp_max(time_range[1]), high)
    high = torch.minimum(high, ((1 + low) / 2).clamp_min(TIME_MAX))  # a grid of many steps has t_k above TIME_MAX
    return flow.uniform(len(index), low + TIME_GAP * (high - low), high, generator=noise)
