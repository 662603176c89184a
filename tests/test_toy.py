"""The generator's directions in a world with exact scores: Eq. 2 is the KL's gradient, Eq. 10 raises the reward."""

import math
from itertools import pairwise

import pytest
import torch

from tdm_r1.core import flow, losses
from tdm_r1.core.toy import GaussianMixture

D = torch.float64
TEACHER = GaussianMixture(
    torch.tensor([0.3, 0.7], dtype=D),
    torch.tensor([[2.0, 0.0], [-1.0, 1.0]], dtype=D),
    torch.tensor([0.5, 0.8], dtype=D),
)


def mixture_log_prob(x: torch.Tensor) -> torch.Tensor:
    """torch.distributions' own density of TEACHER: an independent reference."""
    d = torch.distributions
    components = d.Independent(d.Normal(TEACHER.means, TEACHER.stds[:, None].expand(2, 2)), 1)
    return d.MixtureSameFamily(d.Categorical(TEACHER.weights), components).log_prob(x)


def test_mixture_density_and_score():
    x = torch.randn(50, 2, dtype=D, generator=torch.Generator().manual_seed(0), requires_grad=True)
    torch.testing.assert_close(TEACHER.log_prob(x), mixture_log_prob(x))
    (score,) = torch.autograd.grad(mixture_log_prob(x).sum(), x)
    torch.testing.assert_close(TEACHER.score(x.detach()), score)


def test_clean_prediction_is_the_posterior_mean():
    g = torch.Generator().manual_seed(1)
    x_0 = TEACHER.sample(400_000, g)
    eps = torch.randn(x_0.shape, generator=g, dtype=D)
    x_t = flow.add_noise(x_0, eps, 0.5)
    near = ((x_t - torch.tensor([-0.3, 0.5], dtype=D)).abs() < 0.1).all(1)
    exact = TEACHER.clean(x_t[near], torch.full((int(near.sum()),), 0.5, dtype=D))
    torch.testing.assert_close(x_0[near].mean(0), exact.mean(0), atol=0.03, rtol=0)


def test_tilted_is_the_rlhf_optimum():
    target, strength = torch.tensor([1.0, 1.0], dtype=D), 0.7
    x = torch.randn(50, 2, dtype=D, generator=torch.Generator().manual_seed(2))
    difference = TEACHER.tilted(target, strength).log_prob(x) - TEACHER.log_prob(x)
    constant = difference + 0.5 * strength * (x - target).square().sum(1)
    torch.testing.assert_close(constant, constant[:1].expand(50))


class Generator:
    """x_0 = mean + exp(log_std) z: a one-step generator whose law at every noise level is known."""

    def __init__(self) -> None:
        self.mean = torch.tensor([0.5, -0.5], dtype=D, requires_grad=True)
        self.log_std = torch.tensor(math.log(0.6), dtype=D, requires_grad=True)

    def __call__(self, z: torch.Tensor) -> torch.Tensor:
        return self.mean + self.log_std.exp() * z

    def law(self) -> GaussianMixture:
        return GaussianMixture.single(self.mean.detach(), float(self.log_std.detach().exp()))


@pytest.mark.parametrize("t", [0.3, 0.7])
def test_distribution_matching_is_the_gradient_of_the_kl(t: float):
    """Against KL between Gaussians at noise level t, whose gradient is known in closed form."""
    generator, teacher = Generator(), GaussianMixture.single(torch.tensor([-1.0, 1.0], dtype=D), 0.9)
    g = torch.Generator().manual_seed(3)
    n = 200_000
    z, eps = (torch.randn(n, 2, generator=g, dtype=D) for _ in range(2))
    x_0 = generator(z)
    times = torch.full((n,), t, dtype=D)
    x_t = flow.add_noise(x_0, eps, t).detach()
    direction = losses.distribution_matching(generator.law().clean(x_t, times), teacher.clean(x_t, times))
    loss = 2 * losses.follow(x_0, direction).mean()  # 2 dimensions: `follow` takes a mean over them
    got_mean, got_log_std = torch.autograd.grad(loss, [generator.mean, generator.log_std])

    # x0_hat difference = t^2 / (1 - t) score difference, and dx_t/dx_0 = 1 - t: the direction is t^2/(1-t)^2 grad KL
    factor = t**2 / (1 - t) ** 2
    p, q = generator.law().noised(t), teacher.noised(t)
    want_mean = (1 - t) * (p.means - q.means)[0] / q.stds**2
    std = generator.log_std.detach().exp()
    variance_gradient = 0.5 * 2 * (1 / q.stds**2 - 1 / p.stds**2)  # d KL / d p.stds^2, two dimensions
    want_log_std = (variance_gradient * 2 * (1 - t) ** 2 * std**2)[0]
    torch.testing.assert_close(got_mean, factor * want_mean, atol=0.02, rtol=0.02)
    torch.testing.assert_close(got_log_std, factor * want_log_std, atol=0.02, rtol=0.03)


def test_matching_pulls_the_generator_onto_the_teacher():
    generator, teacher = Generator(), GaussianMixture.single(torch.tensor([-1.0, 1.0], dtype=D), 0.9)
    g = torch.Generator().manual_seed(4)
    optimizer = torch.optim.Adam([generator.mean, generator.log_std], lr=0.05)
    for _ in range(300):
        z, eps = (torch.randn(512, 2, generator=g, dtype=D) for _ in range(2))
        t = float(torch.rand((), generator=g)) * 0.9 + 0.05
        x_0 = generator(z)
        x_t = flow.add_noise(x_0, eps, t).detach()
        times = torch.full((512,), t, dtype=D)
        x0_fake, x0_teacher = (w.clean(x_t, times) for w in (generator.law(), teacher))
        direction = losses.distribution_matching(x0_fake, x0_teacher)
        norm = losses.magnitude(x_0.detach(), x0_teacher, floor=0.05)
        optimizer.zero_grad()
        losses.follow(x_0, direction / norm[:, None]).mean().backward()
        optimizer.step()
    torch.testing.assert_close(generator.mean.detach(), teacher.means[0], atol=0.1, rtol=0)
    assert abs(float(generator.log_std.detach().exp()) - 0.9) < 0.1


def test_reward_direction_raises_an_analytic_reward():
    """phi = p_ref exp(reward), exactly: following Eq. 10 from p_ref raises the reward, step by step."""
    reference = GaussianMixture.single(torch.tensor([0.5, -0.5], dtype=D), 0.6)
    target = torch.tensor([1.5, 0.5], dtype=D)
    surrogate = reference.tilted(target, strength=1.0)
    generator = Generator()
    g = torch.Generator().manual_seed(5)
    optimizer = torch.optim.SGD([generator.mean, generator.log_std], lr=0.5)
    rewards = []
    z = torch.randn(20_000, 2, generator=g, dtype=D)  # the same draws in every step, so that rewards compare
    for _ in range(8):
        eps = torch.randn(20_000, 2, generator=g, dtype=D)
        x_0 = generator(z)
        rewards.append(float(-0.5 * (x_0 - target).square().sum(1).mean().detach()))
        x_t = flow.add_noise(x_0, eps, 0.6).detach()
        times = torch.full((20_000,), 0.6, dtype=D)
        direction = losses.reward_direction(surrogate.clean(x_t, times), reference.clean(x_t, times))
        optimizer.zero_grad()
        losses.follow(x_0, direction).mean().backward()
        optimizer.step()
    assert all(b > a for a, b in pairwise(rewards)), rewards
    assert rewards[-1] > rewards[0] + 0.3


def test_reward_and_kl_together_find_the_tilted_law():
    """At reward weight 1 the fixed point of Eq. 10 is the RLHF optimum phi: mean between teacher and target."""
    teacher = GaussianMixture.single(torch.tensor([0.0, 0.0], dtype=D), 1.0)
    surrogate = teacher.tilted(torch.tensor([2.0, 0.0], dtype=D), strength=1.0)
    generator = Generator()
    g = torch.Generator().manual_seed(6)
    optimizer = torch.optim.Adam([generator.mean, generator.log_std], lr=0.03)
    for _ in range(500):
        z, eps = (torch.randn(512, 2, generator=g, dtype=D) for _ in range(2))
        t = float(torch.rand((), generator=g)) * 0.6 + 0.05
        times = torch.full((512,), t, dtype=D)
        x_0 = generator(z)
        x_t = flow.add_noise(x_0, eps, t).detach()
        x0_fake, x0_teacher, x0_phi = (w.clean(x_t, times) for w in (generator.law(), teacher, surrogate))
        direction = losses.distribution_matching(x0_fake, x0_teacher) + losses.reward_direction(x0_phi, x0_teacher)
        optimizer.zero_grad()
        losses.follow(x_0, direction).mean().backward()
        optimizer.step()
    torch.testing.assert_close(generator.mean.detach(), surrogate.means[0], atol=0.1, rtol=0)
    assert abs(float(generator.log_std.detach().exp()) - float(surrogate.stds)) < 0.08
