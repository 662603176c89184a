"""Flow maths: float64 round trips, transitions that compose, and the conditional velocity's identity."""

import pytest
import torch

from tdm_r1.core import flow
from tdm_r1.core.toy import GaussianMixture


def draw(seed: int = 0, n: int = 64, d: int = 3) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    x_0, eps = (torch.randn(n, d, generator=g, dtype=torch.float64) for _ in range(2))
    return x_0, eps, torch.rand(n, generator=g, dtype=torch.float64) * 0.9 + 0.05


def test_readings_of_the_true_velocity():
    x_0, eps, t = draw()
    x_t = flow.add_noise(x_0, eps, t)
    torch.testing.assert_close(flow.x0_from_v(eps - x_0, x_t, t), x_0)
    torch.testing.assert_close(flow.eps_from_v(eps - x_0, x_t, t), eps)


def test_round_trips():
    x_t, v, t = draw(1)
    torch.testing.assert_close(flow.v_from_x0(flow.x0_from_v(v, x_t, t), x_t, t), v)
    torch.testing.assert_close(flow.v_from_eps(flow.eps_from_v(v, x_t, t), x_t, t), v)
    torch.testing.assert_close(flow.v_from_score(flow.score_from_v(v, x_t, t), x_t, t), v)


def test_half_precision_is_widened():
    x = torch.ones(2, 3, dtype=torch.bfloat16)
    assert flow.x0_from_v(x, x, torch.tensor([0.1, 0.2])).dtype == torch.float32
    assert flow.add_noise(x, x, 0.3).dtype == torch.float32


def test_transition_composes():
    """q(x_u | x_t) after q(x_t | x_s) is q(x_u | x_s)."""
    like = torch.zeros(1, dtype=torch.float64)
    s, t, u = 0.2, 0.5, 0.8
    alpha_ts, sigma_ts = flow.transition(s, t, like)
    alpha_ut, sigma_ut = flow.transition(t, u, like)
    alpha_us, sigma_us = flow.transition(s, u, like)
    torch.testing.assert_close(alpha_ut * alpha_ts, alpha_us)
    torch.testing.assert_close((alpha_ut * sigma_ts) ** 2 + sigma_ut**2, sigma_us**2)


def test_transition_at_its_ends():
    like = torch.zeros(1, dtype=torch.float64)
    alpha, sigma = flow.transition(0.3, 0.3, like)
    assert float(alpha) == 1
    assert float(sigma) == 0
    alpha, sigma = flow.transition(0.0, 0.7, like)
    torch.testing.assert_close(torch.stack([alpha, sigma]), torch.tensor([0.3, 0.7], dtype=torch.float64))


def test_conditional_velocity_from_data_is_the_plain_one():
    x_0, eps, t = draw(2)
    x_t = flow.renoise(x_0, eps, torch.zeros_like(t), t)
    torch.testing.assert_close(flow.conditional_velocity(x_t, eps, torch.zeros_like(t), t), eps - x_0)


@pytest.mark.parametrize(("s", "t"), [(0.3, 0.6), (0.5, 0.9), (0.1, 0.2)])
def test_regressing_on_the_conditional_velocity_gives_the_marginal_one(s: float, t: float):
    """E[v* | x_t] = v for Gaussian data: the least-squares line through v* is the closed-form velocity."""
    world = GaussianMixture.single(torch.tensor([1.5], dtype=torch.float64), 0.7)
    g = torch.Generator().manual_seed(3)
    n = 400_000
    x_s = flow.add_noise(world.sample(n, g), torch.randn(n, 1, generator=g, dtype=torch.float64), s)
    eps = torch.randn(n, 1, generator=g, dtype=torch.float64)
    x_t = flow.renoise(x_s, eps, s, t)
    v_star = flow.conditional_velocity(x_t, eps, s, t)
    line = torch.linalg.lstsq(torch.cat([torch.ones_like(x_t), x_t], 1), v_star).solution
    probe = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
    exact = world.velocity(probe, torch.full((2,), t, dtype=torch.float64))
    torch.testing.assert_close(line[0] + line[1] * probe, exact, atol=0.03, rtol=0)


def test_grid():
    grid = flow.few_step_grid(4, 3.0)
    torch.testing.assert_close(grid, torch.tensor([1, 0.9, 0.75, 0.5, 0], dtype=torch.float64))
    with pytest.raises(ValueError, match="steps = 0"):
        flow.few_step_grid(0, 3.0)


def test_timesteps_are_those_of_diffusers():
    assert flow.timestep(torch.tensor([0.0, 0.25, 1.0])).tolist() == [0, 250, 1000]


def test_time_sampling_stays_in_range_and_shifts_towards_noise():
    g = torch.Generator().manual_seed(4)
    plain, shifted = flow.logit_normal(20_000, generator=g), flow.logit_normal(20_000, shift=3.0, generator=g)
    assert torch.equal(flow.logit_normal(20_000, generator=g.manual_seed(4)), plain)
    assert 0 < shifted.min() < shifted.max() < 1
    assert abs(float(plain.median()) - 0.5) < 0.02
    assert abs(float(shifted.median()) - 0.75) < 0.02
    low = torch.tensor([0.2, 0.6]).repeat(500)
    t = flow.uniform(1000, low, 0.9, generator=g)
    assert bool((t >= low).all())
    assert float(t.max()) < 0.9
