"""TDM's gradients against its losses written out: fake scores (Eq. 1) and generator (Eq. 2, 10 and 11)."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mixture_world import SMALL, TEACHER, Experiment, batch_of, experiment, gradients, with_sgd
from tdm_r1.algorithms.rollout import Rollout, draw_points, draw_times
from tdm_r1.algorithms.tdm import TDM
from tdm_r1.algorithms.tdm_r1 import TDMR1
from tdm_r1.core import flow, losses, solvers
from tdm_r1.core.randomness import Normal
from tdm_r1.models.protocol import Conditioning
from tdm_r1.models.specification import Role

SETTINGS = {
    "euler": {},
    "dpm": {"sampler": {"solver": "dpm"}},
    "stochastic": {"sampler": {"solver": "stochastic", "steps": 3}},
    "interval": {"tdm": {"noise_range": "interval"}},
    "guided": {"tdm": {"teacher_guidance": 2.5}},
    "two": {"tdm": {"fake_scores": "two"}},
}


def stirred(kind: type, name: str, **more: dict) -> Experiment:
    """Every role somewhere else, and SGD of rate 1 in place of AdamW, so that an update is the gradient."""
    found = with_sgd(experiment(kind, TEACHER, batch=SMALL, **SETTINGS[name], **more))
    with torch.no_grad():
        for k, spec in enumerate(found.roles.specs):
            for p in found.roles.parameters(spec.name):
                p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(k)))
    return found


def velocity(found: Experiment, role: str, x_t: Tensor, t: Tensor, c: Conditioning) -> Tensor:
    with found.roles.use(role) as field:
        return field(x_t, t, c)


def shaped(a: Tensor) -> Tensor:
    return a.reshape(-1, 1, 1, 1)


def require_update(found: Experiment, role: Role, loss: Tensor, update) -> dict[str, float]:
    """``update()`` moves the role against the gradient of ``loss``."""
    names = list(found.roles.weights(role))
    expected = torch.autograd.grad(loss, found.roles.parameters(role))
    before = gradients(found, role)
    metrics = update()
    after = gradients(found, role)
    for name, gradient in zip(names, expected, strict=True):
        assert float(gradient.abs().max()) > 1e-6
        torch.testing.assert_close(before[name] - after[name], gradient, atol=2e-6, rtol=5e-4)
    return metrics


def fake_of(found: Experiment, x_t: Tensor, t: Tensor, c: Conditioning, final: Tensor) -> Tensor:
    one = velocity(found, Role.FAKE, x_t, t, c)
    if found.config.tdm.fake_scores == "one":
        return one
    return torch.where(shaped(final), velocity(found, Role.FAKE_FINAL, x_t, t, c), one)


def generator_loss(found: Experiment, rollout: Rollout, noise: torch.Generator, scale: float) -> tuple[Tensor, dict]:
    config, trajectory, c = found.config, rollout.trajectory, rollout.conditioning
    grid, n = trajectory.grid.float(), len(rollout)
    index = torch.randint(trajectory.steps, (n,), generator=noise)
    t = draw_times(trajectory, index, noise, noise_range=config.tdm.noise_range)
    eps, eps_step = (Normal.drawn(noise, trajectory.final.shape[1:]).first(n) for _ in range(2))
    rows = range(n)
    x = torch.stack([trajectory.points[int(index[i]), i] for i in rows])
    before = torch.stack([trajectory.clean[max(int(index[i]) - 1, 0), i] for i in rows])
    here, to, last = grid[index], grid[index + 1], grid[(index - 1).clamp_min(0)]
    x0 = x - shaped(here) * velocity(found, Role.GENERATOR, x, here, c)
    with torch.no_grad():
        if config.sampler.solver == "stochastic":
            x_s = (1 - shaped(to)) * x0 + shaped(to) * eps_step
        else:
            h = [(1 - u).log() - u.log() for u in (last, here, to)]
            ratio = torch.where((last < 1) & (index > 0) & (to > 0), 0.5 * (h[2] - h[1]) / (h[1] - h[0]), 0.0)
            ratio = ratio if config.sampler.solver == "dpm" else torch.zeros_like(ratio)
            d = x0 + shaped(ratio.nan_to_num()) * (x0 - before)
            x_s = shaped(to / here) * x + (1 - shaped(to / here)) * d
        x_t = flow.renoise(x_s, eps, to, t)
        # the mixture knows no prompts: the guided teacher is the teacher, but for rounding
        teacher = x_t - shaped(t) * velocity(found, Role.TEACHER, x_t, t, c)
        fake = x_t - shaped(t) * fake_of(found, x_t, t, c, index == trajectory.steps - 1)
        reward = torch.zeros_like(fake)
        if scale:
            phi, ref = (velocity(found, role, x_t, t, c) for role in (Role.SURROGATE_EMA, Role.TEACHER))
            low, high = config.surrogate.time_range
            reward = scale * shaped((t >= low) & (t <= high)) * shaped(t) * (phi - ref)
        norm = (x0 - teacher).abs().flatten(1).mean(1).clamp_min(config.tdm.normalizer_floor)
        kl = fake - teacher
    parts = {
        "generator/kl_part": float((kl.abs().flatten(1).mean(1) / norm).mean()),
        "generator/normalizer": float(norm.mean()),
        "generator/reward_part": float((reward.abs().flatten(1).mean(1) / norm).mean()),
    }
    return (x0 * (kl + reward) / shaped(norm)).flatten(1).mean(1).mean(), parts


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("scale", [0.0, 3.0])
def test_the_generator_moves_against_the_gradient_of_the_printed_loss(name: str, scale: float):
    more = {"balance": {"scale": scale}, "surrogate": {"time_range": (0.2, 0.9)}} if scale else {}
    found = stirred(TDMR1 if scale else TDM, name, **more)
    tdm = found.algorithm.tdm if scale else found.algorithm
    rollout = tdm.roll_out(batch_of(24))
    loss, parts = generator_loss(found, rollout, torch.Generator().manual_seed(3), scale)
    ema = {n: p.clone() for n, p in found.roles.weights(Role.GENERATOR_EMA).items()}
    part = found.algorithm.reward_part if scale else None
    noise = torch.Generator().manual_seed(3)
    metrics = require_update(found, Role.GENERATOR, loss, lambda: tdm.fit_generator(rollout, noise, part))
    for key, value in parts.items():
        if scale or key != "generator/reward_part":
            assert metrics[key] == pytest.approx(value, rel=1e-4), key
    assert ("generator/kl_reward_cosine" in metrics) is bool(scale)
    assert metrics["generator/learning_rate"] == 1
    decay, now = found.config.tdm.generator_ema_decay, found.roles.weights(Role.GENERATOR)
    for n, p in found.roles.weights(Role.GENERATOR_EMA).items():
        torch.testing.assert_close(p, decay * ema[n] + (1 - decay) * now[n])


@pytest.mark.parametrize("name", SETTINGS)
def test_the_fake_scores_move_against_the_gradient_of_eq_1(name: str):
    found = stirred(TDM, name)
    rollout, noise_range = found.algorithm.roll_out(batch_of(24)), found.config.tdm.noise_range
    noise = torch.Generator().manual_seed(3)
    parts = [("all", Role.FAKE, torch.arange(24))]
    if found.config.tdm.fake_scores == "two":
        earlier, final = torch.randperm(24, generator=noise).chunk(2)
        parts = [("earlier", Role.FAKE, earlier), ("final", Role.FAKE_FINAL, final)]
    for points, role, rows in parts:
        own, seed = rollout.rows(rows), noise.get_state()
        draw = draw_points(own, noise, points=points, noise_range=noise_range).all()
        assert bool((draw.index == rollout.trajectory.steps - 1).any()) is (points != "earlier")
        v = velocity(found, role, draw.x_t, draw.t, own.conditioning)
        loss = losses.denoising(v, draw.x_t, draw.eps, draw.s, draw.t).mean()
        again = torch.Generator()
        again.set_state(seed)
        metrics = require_update(
            found, role, loss, lambda p=points, r=role, o=own, g=again: found.algorithm.fit_fake_at(p, r, o, g)
        )
        assert metrics[f"{role}/loss"] == pytest.approx(float(loss.detach()), rel=1e-4)


def test_the_fakes_schedule_counts_its_own_updates():
    found = experiment(TDM, TEACHER, batch=SMALL, tdm={"fake_steps": 3})
    assert found.algorithm.optimizers[Role.FAKE].total == 3 * found.config.iterations
    assert found.algorithm.optimizers[Role.GENERATOR].total == found.config.iterations
    r1 = experiment(TDMR1, TEACHER, batch=SMALL, surrogate={"draws": 4})
    assert r1.algorithm.surrogate.optimizer.total == 4 * r1.config.iterations


def test_a_rollout_repeats_the_stochastic_solvers_noise_from_its_generator():
    found = experiment(TDM, TEACHER, batch=SMALL, sampler={"solver": "stochastic"})
    one, again = (found.algorithm.roll_out(batch_of(24, seed=5)).trajectory for _ in range(2))
    assert torch.equal(one.points, again.points)
    eps = torch.Generator().manual_seed(5)
    torch.randn(24, 2, 1, 1, generator=eps)  # x_1
    first = Normal.drawn(eps, (2, 1, 1)).first(24)
    torch.testing.assert_close(one.points[1], flow.add_noise(one.clean[0], first, float(one.grid[1])))
    assert isinstance(one, solvers.Trajectory)
