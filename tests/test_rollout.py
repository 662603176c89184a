"""Trajectories of the generator, and points drawn from them."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from mixture_world import TEACHER, conditioning, experiment
from tdm_r1.algorithms.rollout import Rollout, draw_points, draw_times, roll_out
from tdm_r1.algorithms.tdm import TDM
from tdm_r1.core import flow
from tdm_r1.core.solvers import Trajectory
from tdm_r1.models.specification import Role


def rollout_of(n: int, steps: int = 4, shift: float = 3.0) -> Rollout:
    """Trajectories whose point i is i everywhere."""
    points = torch.arange(steps + 1.0)[:, None, None, None, None].expand(steps + 1, n, 2, 1, 1)
    return Rollout(Trajectory(flow.few_step_grid(steps, shift), points, points[:-1]), conditioning(n))


@pytest.mark.parametrize("solver", ["euler", "dpm", "stochastic"])
def test_a_rollout_is_the_solvers_walk(solver: str):
    found = experiment(TDM, TEACHER, sampler={"solver": solver, "steps": 3, "shift": 2.0})
    c, x_1 = conditioning(5), torch.randn(5, 2, 1, 1, generator=torch.Generator().manual_seed(1))

    def go(micro_batch: int, seed: int = 0) -> Trajectory:
        noise = torch.Generator().manual_seed(seed)
        sampler = found.config.sampler
        return roll_out(found.roles, Role.TEACHER, c, x_1, sampler, noise, micro_batch=micro_batch).trajectory

    whole = go(5)
    assert whole.points.shape == (4, 5, 2, 1, 1)
    assert whole.steps == 3
    torch.testing.assert_close(whole.points[0], x_1)
    torch.testing.assert_close(whole.grid, torch.tensor([1, 0.8, 0.5, 0], dtype=torch.float64))
    torch.testing.assert_close(go(2).points, whole.points)
    assert not whole.points.requires_grad
    assert torch.equal(go(5, seed=1).points, whole.points) == (solver != "stochastic")
    v = TEACHER.velocity(x_1.flatten(1), torch.full((5,), 1 - 1e-4)).reshape(x_1.shape)
    torch.testing.assert_close(whole.clean[0], x_1 - v, atol=1e-3, rtol=1e-3)


def test_draws_are_shared_inside_groups_and_only_there():
    draw = draw_points(rollout_of(12), torch.Generator().manual_seed(0), group_size=4).all()
    for values in (draw.index, draw.s, draw.t, draw.eps.flatten(1)[:, 0]):
        groups = values.reshape(3, 4)
        assert (groups == groups[:, :1]).all()
    assert len(draw.t.unique()) == 3
    alone = draw_points(rollout_of(12), torch.Generator().manual_seed(0)).all()
    assert len(alone.t.unique()) == 12


@pytest.mark.parametrize(("points", "expected"), [("all", {0, 1, 2, 3}), ("earlier", {0, 1, 2}), ("final", {3})])
def test_points_of_the_trajectory(points: str, expected: set[int]):
    rollout = rollout_of(400)
    draw = draw_points(rollout, torch.Generator().manual_seed(0), points=points).all()  # type: ignore[arg-type]
    counts = Counter(draw.index.tolist())
    assert set(counts) == expected
    assert min(counts.values()) > 400 / len(expected) * 0.7
    torch.testing.assert_close(draw.s, rollout.trajectory.grid[draw.index + 1].float())
    x_s = (draw.index + 1.0)[:, None, None, None].expand(-1, 2, 1, 1)  # point i is i everywhere
    torch.testing.assert_close(draw.x_t, flow.renoise(x_s, draw.eps, draw.s, draw.t))


@pytest.mark.parametrize("time_range", [(0.0, 1.0), (0.3, 0.95), (0.55, 0.6)])
@pytest.mark.parametrize("noise_range", ["to_noise", "interval"])
def test_times_fill_their_range(noise_range: str, time_range: tuple[float, float]):
    """t_k < t < 1 (or t_{k+1}), inside time_range where t_k allows it, evenly."""
    trajectory = rollout_of(40_000).trajectory
    grid = trajectory.grid.float()
    index = torch.arange(40_000) % 4
    noise = torch.Generator().manual_seed(0)
    t = draw_times(trajectory, index, noise, noise_range=noise_range, time_range=time_range)  # type: ignore[arg-type]
    for i in range(4):
        low, high = float(grid[i + 1]), float(grid[i]) if noise_range == "interval" else 1.0
        if high > time_range[0]:
            low = max(low, time_range[0])
        if low < time_range[1]:
            high = min(high, time_range[1])
        high = min(high, 0.99)
        own = t[index == i]
        low += 0.02 * (high - low)
        assert low <= own.min()
        assert own.max() <= high
        assert own.min() - low < 0.01 * (high - low)
        assert high - own.max() < 0.01 * (high - low)
        assert float(own.mean()) == pytest.approx((low + high) / 2, abs=0.02 * (high - low) + 1e-6)


@pytest.mark.parametrize(("steps", "shift"), [(8, 15.0), (40, 3.0)])
def test_times_are_above_their_points_on_steep_grids(steps: int, shift: float):
    draw = draw_points(rollout_of(2000, steps, shift), torch.Generator().manual_seed(0)).all()
    assert (draw.t > draw.s).all()
    assert (draw.t < 1).all()
    assert draw.s.max() > 0.99
