"""Few-step solvers against closed forms and against diffusers' schedulers on the same sigmas."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler

from tdm_r1.core import flow, solvers
from tdm_r1.core.toy import GaussianMixture

MEAN, STD = torch.tensor([1.0, -0.5], dtype=torch.float64), 0.6
WORLD = GaussianMixture.single(MEAN, STD)


def exact_flow(x: torch.Tensor, t: float, s: float) -> torch.Tensor:
    """The probability-flow map of Gaussian data from t to s: standardised coordinates are kept."""
    a, b = WORLD.noised(t), WORLD.noised(s)
    return b.means + (x - a.means) * (b.stds / a.stds)[:, None]


def error(solver: solvers.Solver, steps: int) -> float:
    """Error at s = .05 from t = .95, on a uniform grid there; the ends, where orders drop, are left out."""
    g = torch.Generator().manual_seed(0)
    x = WORLD.noised(0.95).sample(64, g)
    grid = torch.linspace(0.95, 0.05, steps + 1, dtype=torch.float64)
    trajectory = solvers.sample(WORLD.velocity, x, grid, solver=solver)
    return float((trajectory.final - exact_flow(x, 0.95, 0.05)).abs().max())


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("dpm", 2)])
def test_order_of_convergence(solver: solvers.Solver, order: int):
    errors = [error(solver, n) for n in (40, 80, 160)]
    rates = [np.log2(a / b) for a, b in pairwise(errors)]
    assert all(abs(rate - order) < 0.25 for rate in rates), rates


def test_trajectory_records_every_point():
    x_1 = torch.randn(5, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    grid = flow.few_step_grid(4, 3.0)
    trajectory = solvers.sample(lambda x, t: WORLD.velocity(x, t.clamp_max(1 - 1e-9)), x_1, grid)
    assert len(trajectory.points) == 5
    assert len(trajectory.clean) == trajectory.steps == 4
    torch.testing.assert_close(trajectory.final, trajectory.clean[-1])  # the last step lands on its clean prediction
    index = torch.tensor([0, 1, 2, 3, 4])
    torch.testing.assert_close(trajectory.at(index), torch.stack([trajectory.points[i][i] for i in range(5)]))
    torch.testing.assert_close(trajectory.time(index), grid)


def network(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """Any smooth field will do to compare solvers."""
    return torch.sin(3 * x) + flow.expand(t, x) * x


def test_euler_equals_diffusers_scheduler():
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(sigmas=[1.0, 0.75, 0.5, 0.25])
    grid = flow.few_step_grid(4, 3.0)
    np.testing.assert_allclose(scheduler.sigmas.numpy(), grid.numpy(), atol=1e-6)
    x = x_1 = torch.randn(3, 4, generator=torch.Generator().manual_seed(2))
    for sigma, timestep in zip(scheduler.sigmas[:-1], scheduler.timesteps, strict=True):
        x = scheduler.step(network(x, sigma.expand(3)), timestep, x, return_dict=False)[0]
    torch.testing.assert_close(solvers.sample(network, x_1, grid).final, x, atol=1e-5, rtol=1e-5)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers' own, on NumPy 2
def test_dpm_equals_diffusers_scheduler_on_its_sigmas():
    """The scheduler starts at sigma = .9997, where its second step is already of second order: start there too."""
    scheduler = DPMSolverMultistepScheduler(
        use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0, final_sigmas_type="zero"
    )
    scheduler.set_timesteps(6)
    grid = scheduler.sigmas.double()
    assert float(grid[0]) < 1
    x = x_1 = torch.randn(3, 4, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    for sigma, timestep in zip(scheduler.sigmas[:-1], scheduler.timesteps, strict=True):
        x = scheduler.step(network(x, sigma.double().expand(3)), timestep, x, return_dict=False)[0]
    ours = solvers.sample(network, x_1, grid, solver="dpm").final
    torch.testing.assert_close(ours, x, atol=2e-4, rtol=2e-4)


def test_dpm_is_of_first_order_after_pure_noise_and_at_the_end():
    x_1 = torch.randn(3, 4, generator=torch.Generator().manual_seed(4))
    three, four = flow.few_step_grid(3, 1.0), flow.few_step_grid(4, 1.0)
    a, b = (solvers.sample(network, x_1, three, solver=s).final for s in ("euler", "dpm"))
    torch.testing.assert_close(a, b)
    a, b = (solvers.sample(network, x_1, four, solver=s).final for s in ("euler", "dpm"))
    assert (a - b).abs().max() > 1e-4  # the third step of four is of second order


def test_stochastic_keeps_the_marginals():
    """With an exact denoiser for a point mass, x at grid[i] is N((1 - t) x_0, t^2)."""
    point = torch.tensor([[2.0]]).expand(20_000, 1)
    grid = flow.few_step_grid(4, 3.0)

    def velocity(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return flow.v_from_x0(point, x, t)

    g = torch.Generator().manual_seed(5)
    trajectory = solvers.sample(
        velocity,
        torch.randn(20_000, 1, generator=g),
        grid,
        solver="stochastic",
        noise=lambda step: torch.randn(20_000, 1, generator=g),
    )
    for t, x in zip(grid[1:-1], trajectory.points[1:-1], strict=True):
        assert abs(float(x.mean()) - 2 * (1 - float(t))) < 0.03
        assert abs(float(x.std()) - float(t)) < 0.03


def test_unknown_solver():
    x = torch.zeros(1, 1)
    t = torch.ones(())
    with pytest.raises(ValueError, match="known are euler, dpm, stochastic"):
        solvers.solver_step("heun", x, x, x, t, t, t)  # type: ignore[arg-type]


@pytest.mark.parametrize("solver", ["euler", "dpm", "stochastic"])
def test_sampling_is_the_solvers_step_on_the_grids_times(solver: solvers.Solver):
    """Each step with the clean prediction before it, and the noise of its own number."""
    grid, x_1 = flow.few_step_grid(3, 3.0), torch.randn(5, 2)
    noises, asked = [torch.randn(5, 2).double() for _ in range(3)], []

    def noise(step: int) -> torch.Tensor:
        asked.append(step)
        return noises[step]

    found = solvers.sample(lambda x, t: x * t[:, None] + 0.3, x_1, grid, solver=solver, noise=noise)
    assert found.points.dtype == torch.float32
    assert asked == ([0, 1, 2] if solver == "stochastic" else [])
    times = grid.float()
    for i in range(3):
        x = found.points[i]
        x0 = x - times[i] * (x * times[i] + 0.3)
        torch.testing.assert_close(found.clean[i], x0)
        before, t_before = (found.clean[i - 1], times[i - 1]) if i else (x0, times[0])
        step = solvers.solver_step(solver, x0, before, x, t_before, times[i], times[i + 1], noises[i].float())
        torch.testing.assert_close(found.points[i + 1], step)


def test_a_grid_of_one_step():
    assert flow.few_step_grid(1, 3.0).tolist() == [1, 0]
    with pytest.raises(ValueError, match=r"^steps = 0: a grid needs at least 1 step$"):
        flow.few_step_grid(0, 3.0)


def test_the_stochastic_solver_asks_for_noise():
    zero = torch.zeros(2, 1)
    with pytest.raises(ValueError, match=r"^solver = 'stochastic' needs noise at every step$"):
        solvers.solver_step("stochastic", zero, zero, zero, torch.ones(2), torch.ones(2), torch.zeros(2))
