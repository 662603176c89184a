"""Losses against NumPy, against their closed forms, and in their limits."""

import numpy as np
import pytest
import torch

from tdm_r1.core import flow, losses
from tdm_r1.core.toy import GaussianMixture

D = torch.float64


def preference(l_phi, l_ref, advantage, span, group, n_groups, beta):
    terms = losses.preference_terms(l_phi, l_ref, advantage, span)
    return losses.group_preference(terms.new_zeros(n_groups).index_add(0, group, terms), beta=beta)


def batch(n: int = 12, d: int = 5, seed: int = 0) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    out = {k: torch.randn(n, d, generator=g, dtype=D) for k in ("v_phi", "v_ref", "x_s", "eps")}
    out["s"] = torch.tensor([0.0, 0.5, 0.75], dtype=D).repeat(n // 3)
    out["t"] = out["s"] + (0.99 - out["s"]) * torch.rand(n, generator=g, dtype=D)
    out["x_t"] = flow.renoise(out["x_s"], out["eps"], out["s"], out["t"])
    return out


def denoising_numpy(v, x_t, eps, s, t, clamp=0.1):
    """An independent reading of Eq. 1 in its bounded form, with the transition written out."""
    s, t = s[:, None], t[:, None]
    alpha = (1 - t) / (1 - s)
    ratio = np.sqrt(t**2 - alpha**2 * s**2) / t
    residual = eps - ratio * (x_t + (1 - t) * v)
    return (residual**2 / (1 - ratio**2 + np.maximum(1 - t, clamp) ** 2)).mean(1)


def test_denoising_equals_numpy():
    b = batch()
    want = denoising_numpy(*(b[k].numpy() for k in ("v_phi", "x_t", "eps", "s", "t")))
    np.testing.assert_allclose(losses.denoising(b["v_phi"], b["x_t"], b["eps"], b["s"], b["t"]), want, rtol=1e-9)


def test_denoising_of_data_is_the_velocity_error():
    b = batch()
    zero, t = torch.zeros(12, dtype=D), torch.linspace(0.05, 0.89, 12, dtype=D)
    x_t = flow.renoise(b["x_s"], b["eps"], zero, t)
    want = (b["v_phi"] - (b["eps"] - b["x_s"])).square().mean(1)
    torch.testing.assert_close(losses.denoising(b["v_phi"], x_t, b["eps"], zero, t), want)


def test_denoising_stays_finite_where_the_conditional_velocity_blows_up():
    b = batch()
    s = torch.full((12,), 0.5, dtype=D)
    t = s + 1e-9
    x_t = flow.renoise(b["x_s"], b["eps"], s, t)
    assert flow.conditional_velocity(x_t, b["eps"], s, t).abs().max() > 1e3
    assert losses.denoising(b["v_phi"], x_t, b["eps"], s, t).max() < 50


def test_group_preference_equals_numpy_with_its_gradient():
    """Eq. 9 and 18 written with two sums over winners and losers and differentiated by hand in NumPy."""
    b = batch()
    group = torch.tensor([0] * 6 + [1] * 6)
    advantage = torch.tensor([1.5, -0.5, -1.0, 0.5, -1.0, 0.5] * 2, dtype=D)
    span, beta = 1 - b["s"], 3.0
    v = b["v_phi"].clone().requires_grad_(True)
    l_phi = losses.denoising(v, b["x_t"], b["eps"], b["s"], b["t"])
    l_ref = losses.denoising(b["v_ref"], b["x_t"], b["eps"], b["s"], b["t"])
    loss = preference(l_phi, l_ref, advantage, span, group, 2, beta=beta)
    loss.sum().backward()

    x_t, eps, s, t = (b[k].numpy() for k in ("x_t", "eps", "s", "t"))
    gap = denoising_numpy(b["v_phi"].numpy(), x_t, eps, s, t) - denoising_numpy(b["v_ref"].numpy(), x_t, eps, s, t)
    a, w = advantage.numpy(), np.abs(advantage.numpy())
    for k in range(2):
        rows = np.arange(6) + 6 * k
        win, lose = rows[a[rows] > 0], rows[a[rows] < 0]
        inside = (w * span.numpy() * gap)[win].sum() - (w * span.numpy() * gap)[lose].sum()
        np.testing.assert_allclose(loss[k].item(), np.log1p(np.exp(beta * inside)), rtol=1e-9)
        slope = beta / (1 + np.exp(-beta * inside))
        alpha = (1 - t) / (1 - s)
        ratio = np.sqrt(t**2 - alpha**2 * s**2) / t
        residual = eps - ratio[:, None] * (x_t + (1 - t)[:, None] * b["v_phi"].numpy())
        weight = (1 / (1 - ratio**2 + np.maximum(1 - t, 0.1) ** 2))[:, None]
        d_loss = -2 * weight * residual * (ratio * (1 - t))[:, None] / 5
        want = slope * (a * span.numpy())[:, None] * d_loss
        np.testing.assert_allclose(v.grad[rows], want[rows], rtol=1e-8, atol=1e-12)


def test_group_preference_prefers_the_better_sample():
    """Lower loss on the winner, higher on the loser: below log 2, which is the value at phi = ref."""
    a, zero = torch.tensor([1.0, -1.0]), torch.zeros(2)
    group = torch.zeros(2, dtype=torch.int64)
    good = preference(torch.tensor([0.5, 1.5]), zero + 1, a, zero + 1, group, 1, beta=1.0)
    same = preference(zero + 1, zero + 1, a, zero + 1, group, 1, beta=1.0)
    bad = preference(torch.tensor([1.5, 0.5]), zero + 1, a, zero + 1, group, 1, beta=1.0)
    assert good < same < bad
    torch.testing.assert_close(same, torch.tensor([2.0]).log())


def test_anchored_gradient_at_the_reference_is_the_preferences():
    """At phi = ref both gradients are the same combination of A_i grad l_i, up to a positive factor."""
    b = batch()
    advantage = torch.tensor([1.0, -1.0, 0.5, -0.5, 2.0, -2.0] * 2, dtype=D)
    s, t = b["s"][:1].expand(12), torch.full((12,), 0.6, dtype=D)  # one (k, t): one span for all
    x_t = flow.renoise(b["x_s"], b["eps"], s, t)
    grads = []
    for kind in ("preference", "anchored"):
        v = b["v_ref"].clone().requires_grad_(True)
        if kind == "preference":
            l_phi, l_ref = (losses.denoising(u, x_t, b["eps"], s, t) for u in (v, b["v_ref"]))
            group = torch.zeros(12, dtype=torch.int64)
            preference(l_phi, l_ref, advantage, 1 - s, group, 1, beta=2.0).sum().backward()
        else:
            losses.anchored_regression(v, b["v_ref"], b["v_ref"], x_t, b["eps"], s, t, advantage).sum().backward()
        grads.append(v.grad.flatten())
    cosine = torch.nn.functional.cosine_similarity(*grads, dim=0)
    torch.testing.assert_close(cosine, torch.ones((), dtype=D))


@pytest.mark.parametrize("reference", ["exact", "wrong"])
def test_anchored_fixed_point_is_the_gradient_of_the_expected_advantage(reference: str):
    """Gaussian data, quadratic reward: eps_phi - eps_ref = -kappa t d/dx E[A | x_t], linear in x_t, in closed form.

    With the exact denoiser as baseline this holds whatever the reference is.
    """
    m, std, a, t, n, kappa = 0.4, 0.8, 1.2, 0.5, 400_000, 0.7
    world = GaussianMixture.single(torch.tensor([m], dtype=D), std)
    g = torch.Generator().manual_seed(0)
    x_0 = world.sample(n, g)
    eps = torch.randn(n, 1, generator=g, dtype=D)
    reward = -((x_0 - a) ** 2)[:, 0]
    advantage = (reward - reward.mean()) / reward.std()
    zero, times = torch.zeros(n, dtype=D), torch.full((n,), t, dtype=D)
    x_t = flow.renoise(x_0, eps, zero, times)
    v_base = world.velocity(x_t, times)
    v_ref = v_base if reference == "exact" else 0.3 - 0.5 * x_t

    # the regression is quadratic in phi: one Newton step from phi = ref in the family delta_v = w0 + w1 x_t
    features = torch.cat([torch.ones_like(x_t), x_t], 1)
    w = torch.zeros(2, 1, dtype=D, requires_grad=True)

    def loss(w: torch.Tensor) -> torch.Tensor:
        return losses.anchored_regression(
            v_ref + features @ w, v_ref, v_base, x_t, eps, zero, times, advantage, kappa=kappa
        ).mean()

    (gradient,) = torch.autograd.grad(loss(w), w)
    hessian = torch.autograd.functional.hessian(loss, w).reshape(2, 2)
    w = -torch.linalg.solve(hessian, gradient)

    variance = (1 - t) ** 2 * std**2 + t**2
    gain = (1 - t) * std**2 / variance  # posterior mean: m + gain (x_t - (1 - t) m)
    probe = torch.tensor([-1.0, 0.0, 1.0], dtype=D)
    posterior = m + gain * (probe - (1 - t) * m)
    slope = -2 * (posterior - a) * gain / reward.std()  # d/dx E[A | x_t]
    got = (1 - t) * (w[0] + w[1] * probe)  # delta_eps = (1 - t) delta_v
    torch.testing.assert_close(got, -kappa * t * slope, atol=0.02, rtol=0.02)


def test_follow_has_the_given_gradient():
    x = torch.randn(3, 4, dtype=D, requires_grad=True)
    direction = torch.randn(3, 4, dtype=D)
    losses.follow(x, direction).sum().backward()
    torch.testing.assert_close(x.grad, direction / 4)
    with pytest.raises(AssertionError, match="stop-gradient"):
        losses.follow(x, x)


def test_magnitude_has_a_floor():
    x = torch.zeros(2, 3)
    teacher = torch.tensor([[3.0, 3, 3], [0.01, 0, 0]])
    torch.testing.assert_close(losses.magnitude(x, teacher, floor=0.05), torch.tensor([3.0, 0.05]))


def test_saturation():
    assert losses.saturation(torch.tensor([0.0, 3.0, -5.0, 9.0])) == 0.5


def test_the_clip_holds_what_has_gone_far_enough_and_nothing_else():
    ratio = torch.tensor([-3.0, -0.5, 3.0, -3.0, 0.5, 3.0], requires_grad=True)
    advantage = torch.tensor([1.0, 1.0, 1.0, -1.0, -1.0, -1.0])
    held = losses.clipped(ratio, advantage, 1.0)
    assert held.tolist() == [-1.0, -0.5, 3.0, -3.0, 0.5, 1.0]
    held.sum().backward()
    assert ratio.grad is not None
    assert ratio.grad.tolist() == [0.0, 1.0, 1.0, 1.0, 1.0, 0.0]
