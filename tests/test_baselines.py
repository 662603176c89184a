"""DGPO, Flow-GRPO, DiffusionNFT and TDM with a direct loss: closed forms, gradients written out, the way they learn."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

from mixture_world import SMALL, TEACHER, Experiment, batch_of, experiment
from tdm_r1.algorithms.dgpo import DGPO
from tdm_r1.algorithms.flow_grpo import FlowGRPO
from tdm_r1.algorithms.nft import DiffusionNFT
from tdm_r1.algorithms.policy import OLD
from tdm_r1.algorithms.protocol import Algorithm
from tdm_r1.algorithms.rollout import Rollout
from tdm_r1.algorithms.tdm_direct_rl import TDMDirectRL
from tdm_r1.config.run import validate
from tdm_r1.core import flow, losses, sde
from tdm_r1.core.randomness import Normal
from tdm_r1.core.toy import GaussianMixture
from tdm_r1.errors import UserError
from tdm_r1.models.specification import Role

# ------------------------------------------------------------------------------------------ the stochastic sampler


@pytest.mark.parametrize("level", [0.3, 0.7, 1.2])
def test_the_sde_has_the_marginals_of_the_flow(level: float):
    """Against the exact law: whatever its noise, the end is distributed as the data are."""
    law = GaussianMixture(TEACHER.weights.double(), TEACHER.means.double(), TEACHER.stds.double())
    noise, n = torch.Generator().manual_seed(0), 4000
    grid = flow.few_step_grid(400, 3.0)
    x = torch.randn(n, 2, generator=noise, dtype=torch.float64)
    for t, s in pairwise(grid):
        v = law.velocity(x, t.clamp_max(1 - 1e-6).expand(n))
        scale = sde.noise_scale(t, grid[1], level)
        mean = sde.step_mean(v, x, t, s, scale)
        x = mean + scale * (t - s).sqrt() * torch.randn(n, 2, generator=noise, dtype=torch.float64)
    own = law.sample(n, torch.Generator().manual_seed(1))
    torch.testing.assert_close(x.mean(0), own.mean(0), atol=0.05, rtol=0)
    torch.testing.assert_close(torch.cov(x.T), torch.cov(own.T), atol=0.06, rtol=0)


def test_without_noise_the_sde_is_eulers_step():
    x, v = torch.randn(5, 3).double(), torch.randn(5, 3).double()
    t, s = torch.tensor(0.7).double(), torch.tensor(0.4).double()
    torch.testing.assert_close(sde.step_mean(v, x, t, s, torch.tensor(0.0)), x + (s - t) * v)
    assert sde.noise_scale(torch.tensor(1.0), torch.tensor(0.9), 0.7) == pytest.approx(0.7 * (1 / 0.1) ** 0.5, rel=1e-5)
    assert sde.noise_scale(t, torch.tensor(0.9), 0.7) == pytest.approx(0.7 * (0.7 / 0.3) ** 0.5)


def test_the_log_likelihood_is_the_normal_ones_mean_over_dimensions():
    x, mean, deviation = torch.randn(4, 3, 2), torch.randn(4, 3, 2), torch.tensor(0.6)
    normal = torch.distributions.Normal(mean, deviation).log_prob(x).flatten(1).mean(1)
    other = torch.distributions.Normal(mean, deviation).log_prob(mean).flatten(1).mean(1)
    torch.testing.assert_close(sde.log_likelihood(x, mean, deviation), normal - other)


# ------------------------------------------------------------------------------------------ losses


def test_ppos_loss_follows_the_ratio_inside_the_clip_alone():
    old, advantage = torch.zeros(6), torch.tensor([1.0, 1.0, 1.0, -1.0, -1.0, -1.0])
    new = torch.tensor([0.3, 0.05, -0.3, 0.3, 0.05, -0.3], requires_grad=True)
    loss, ratio = losses.clipped_policy(new, old, advantage, 0.1)
    torch.testing.assert_close(ratio, new.detach().exp())
    (slope,) = torch.autograd.grad(loss.sum(), new)
    follows = torch.tensor([0, 1, 1, 1, 1, 0]).bool()
    torch.testing.assert_close(slope, torch.where(follows, -advantage * ratio, 0.0))


def test_the_normalised_error_is_the_squared_one_over_the_absolute_one():
    x_t, v, x_0, t = torch.randn(3, 4), torch.randn(3, 4), torch.randn(3, 4), torch.tensor([0.2, 0.6, 1.0])
    error = x_t - t[:, None] * v - x_0
    expected = error.square().mean(1) / error.abs().mean(1)
    torch.testing.assert_close(losses.normalized_error(v, x_t, t, x_0), expected)
    assert losses.normalized_error(x_t - x_0, x_t, torch.ones(3), x_0).abs().max() < 1e-6


# ------------------------------------------------------------------------------------------ gradients


def stirred(kind: type[Algorithm], **settings: dict) -> Experiment:
    """Every role somewhere else, so that nothing cancels."""
    found = experiment(kind, TEACHER, batch=SMALL, **settings)
    with torch.no_grad():
        for k, spec in enumerate(found.roles.specs):
            for p in found.roles.parameters(spec.name):
                p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(k)))
    return found


def velocity(found: Experiment, role: str, x_t: Tensor, t: Tensor, rollout: Rollout) -> Tensor:
    with found.roles.use(role) as v:
        return v(x_t, t, rollout.conditioning)


def compare(found: Experiment, by_hand: Tensor) -> None:
    parameters = found.roles.parameters(Role.GENERATOR)
    mine = [p.grad.clone() for p in parameters]
    expected = torch.autograd.grad(by_hand, parameters)
    for a, b in zip(mine, expected, strict=True):
        assert float(b.abs().max()) > 1e-7
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)


def samples_of(found: Experiment) -> tuple[Rollout, Tensor]:
    rollout = found.algorithm.roll_out(batch_of(24, 6), Role.GENERATOR)
    advantage = torch.randn(24, generator=torch.Generator().manual_seed(1))
    return rollout, advantage


@pytest.mark.parametrize("micro_batch", [24, 6])
def test_dgpos_gradient_is_that_of_its_loss_written_out(micro_batch: int):
    config = {"beta": 30.0, "kl_weight": 0.3, "clip": 0.02, "draws": 3, "time_low": 0.5}
    found = stirred(DGPO, dgpo=config)
    found.algorithm.micro_batch = micro_batch
    rollout, advantage = samples_of(found)
    found.algorithm.fit(rollout, advantage, torch.Generator().manual_seed(2), weight=0.7)
    noise = torch.Generator().manual_seed(2)
    times = found.algorithm.draw_times(noise)
    total, x_0 = torch.zeros(()), rollout.trajectory.final
    for time in times.float():
        eps = Normal.drawn(noise, (2, 1, 1)).first(4).repeat_interleave(6, 0)
        t, x_t = time.expand(24), (1 - time) * x_0 + time * eps
        v, ref, old = (velocity(found, role, x_t, t, rollout) for role in (Role.GENERATOR, Role.REFERENCE, OLD))
        l_v, l_ref, l_old = ((u - (eps - x_0)).square().flatten(1).mean(1) for u in (v, ref, old))
        for i in range(24):
            group = slice(i // 6 * 6, i // 6 * 6 + 6)
            w = torch.sigmoid(30.0 * (advantage[group] * (l_v - l_ref)[group]).sum() / 6).detach()
            rho = float((l_old[i] - l_v[i]).exp().detach())
            held = rho > 1.02 if advantage[i] > 0 else rho < 0.98
            total = total + (0 if held else w * advantage[i] * l_v[i])
        total = total + 0.3 * (v - ref.detach()).square().flatten(1).mean(1).sum()
    compare(found, 0.7 * total / (24 * 3))


def test_dgpo_draws_its_noise_levels_from_the_noisy_end_of_the_grid():
    found = experiment(DGPO, TEACHER, batch=SMALL, sampler={"steps": 10}, dgpo={"draws": 4, "time_low": 0.6})
    noise = torch.Generator().manual_seed(0)
    grid = flow.few_step_grid(10, 3.0)
    drawn = [found.algorithm.draw_times(noise) for _ in range(200)]
    assert all(len(t.unique()) == 4 for t in drawn)
    assert set(torch.cat(drawn).tolist()) == set(grid[:5].tolist())


def test_nfts_gradient_is_that_of_its_loss_written_out():
    found = stirred(DiffusionNFT, nft={"mixture": 0.7, "kl_weight": 0.3})
    rollout, advantage = samples_of(found)
    found.algorithm.fit(rollout, advantage, torch.Generator().manual_seed(2))
    noise = torch.Generator().manual_seed(2)
    orders = torch.rand(24, 4, generator=noise).argsort(1)[:, 1:]
    grid, x_0, total = flow.few_step_grid(4, 3.0).float(), rollout.trajectory.final, torch.zeros(())
    for j in range(3):
        t, eps = grid[orders[:, j]], Normal.drawn(noise, (2, 1, 1)).first(24)
        shaped = t.reshape(-1, 1, 1, 1)
        x_t = (1 - shaped) * x_0 + shaped * eps
        v, ref, old = (velocity(found, role, x_t, t, rollout) for role in (Role.GENERATOR, Role.REFERENCE, OLD))
        ref, old = ref.detach(), old.detach()
        for i in range(24):
            r = 0.5 + float(advantage[i]) / 10
            plus, minus = 0.7 * v[i] + 0.3 * old[i], 1.7 * old[i] - 0.7 * v[i]
            sides = [t[i] * (side - (eps - x_0)[i]) for side in (plus, minus)]
            better, worse = (e.square().mean() / e.abs().mean().detach() for e in sides)
            total = total + 5 / 0.7 * (r * better + (1 - r) * worse) + 0.3 * (v[i] - ref[i]).square().mean()
    compare(found, total / (24 * 3))


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_flow_grpos_gradient_is_that_of_its_loss_written_out(guidance: float):
    config = {"noise_level": 0.7, "clip": 0.05, "kl_weight": 0.3}
    found = stirred(FlowGRPO, flow_grpo=config, sampler={"guidance": guidance})
    b = batch_of(24, 6)
    walk = found.algorithm.walk(b.conditioning, b.x_1, b.noise)
    with torch.no_grad():  # the policy has moved since
        for p in found.roles.parameters(Role.GENERATOR):
            p.add_(0.02)
    advantage = torch.randn(24, generator=torch.Generator().manual_seed(1))
    rows = torch.arange(3, 21)
    found.algorithm.fit(walk, b.conditioning, advantage, rows)
    grid, total, n = flow.few_step_grid(4, 3.0).tolist(), torch.zeros(()), len(rows)
    for k in range(3):
        t, s = grid[k], grid[k + 1]
        a = 0.7 * (t / (1 - (t if k else grid[1]))) ** 0.5
        means = []
        for role in (Role.GENERATOR, Role.REFERENCE):
            with found.roles.use(role) as field:  # the mixture knows no prompts: guidance is g v - (g - 1) v
                v = field(walk.points[k, rows], torch.full((n,), t), b.conditioning.rows(rows))
            v = guidance * v - (guidance - 1) * v.detach()
            x = walk.points[k, rows]
            means.append(x + (v + a**2 / (2 * t) * (x + (1 - t) * v)) * (s - t))
        mean, ref = means[0], means[1].detach()
        normal = torch.distributions.Normal(mean, a * (t - s) ** 0.5)
        constant = torch.distributions.Normal(0.0, a * (t - s) ** 0.5).log_prob(torch.tensor(0.0))
        new = normal.log_prob(walk.points[k + 1, rows]).flatten(1).mean(1) - constant
        rho, A = (new - walk.log_likelihood[k, rows]).exp(), advantage[rows]
        loss = torch.maximum(-A * rho, -A * rho.clamp(0.95, 1.05))
        kl = ((mean - ref).square() / (2 * a**2)).flatten(1).mean(1)
        total = total + (loss + 0.3 * kl).sum()
    compare(found, total / (n * 3))


def test_the_direct_loss_is_added_to_tdms_gradient():
    """What TDM's update alone and DGPO's gradient alone would be, summed."""
    found, alone = (stirred(TDMDirectRL, dgpo={"direct_weight": 0.5, "time_low": 0.0}) for _ in range(2))
    gradients = {}
    for name, one in (("both", found), ("tdm", alone)):
        seen: list[list[Tensor]] = []
        optimizer = one.algorithm.tdm.optimizers[Role.GENERATOR]
        optimizer.step = lambda o=optimizer, seen=seen: seen.append([p.grad.clone() for p in o.parameters]) or {}  # type: ignore[method-assign]
        if name == "tdm":
            real = one.algorithm.dgpo.fit

            def kept(*args, real=real, one=one, **more):
                metrics = real(*args, **more)
                gradients["direct"] = [p.grad.clone() for p in one.roles.parameters(Role.GENERATOR)]
                for p in one.roles.parameters(Role.GENERATOR):
                    p.grad = None
                return metrics

            one.algorithm.dgpo.fit = kept
        one.run(1)
        gradients[name] = seen[0]
    for both, tdm, direct in zip(gradients["both"], gradients["tdm"], gradients["direct"], strict=True):
        assert float(direct.abs().max()) > 1e-6
        torch.testing.assert_close(both, tdm + direct)


# ------------------------------------------------------------------------------------------ direction

FAST = {"learning_rate": 0.02, "betas": (0.5, 0.95), "weight_decay": 0.0}
LEARNERS: dict[str, tuple[type[Algorithm], dict]] = {
    "dgpo": (DGPO, {"dgpo": {"optimizer": FAST, "clip": 1.0, "beta": 3.0, "time_low": 0.2}, "sampler": {"steps": 8}}),
    "flow_grpo": (FlowGRPO, {"flow_grpo": {"optimizer": FAST, "clip": 0.2}, "sampler": {"steps": 8}}),
    "nft": (DiffusionNFT, {"nft": {"optimizer": FAST}, "sampler": {"steps": 8}}),
    "direct": (TDMDirectRL, {"dgpo": {"clip": 1.0, "beta": 3.0, "time_low": 0.0, "direct_weight": 10.0}}),
}


@pytest.mark.parametrize("name", LEARNERS)
def test_the_reward_rises(name: str):
    kind, settings = LEARNERS[name]
    found = experiment(kind, TEACHER, **settings)
    rewards = [row["reward/mean"] for row in found.run(80)]
    assert np.mean(rewards[-10:]) > np.mean(rewards[:5]) + 0.3
    assert (found.samples().mean(0) > TEACHER.sample(20_000, torch.Generator().manual_seed(2)).mean(0) + 0.1).all()


@pytest.mark.parametrize("name", LEARNERS)
def test_without_a_difference_of_scores_the_policy_stays_near_its_start(name: str):
    """No advantage: what is left pulls to the start, or to the teacher, which is the start here."""
    kind, settings = LEARNERS[name]
    found = experiment(kind, TEACHER, **settings)
    found.run(20, lambda latents: torch.ones(len(latents), dtype=torch.float64))
    moved = found.samples().mean(0) - TEACHER.sample(20_000, torch.Generator().manual_seed(2)).mean(0)
    assert moved.abs().max() < 0.25


# ------------------------------------------------------------------------------------------ settings


@pytest.mark.parametrize("algorithm", ["dgpo", "flow_grpo", "nft", "tdm_direct_rl"])
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch": {"group": 1}}, "batch.group = 1"),
        ({"batch": {"group": 6, "trained": 2}}, "batch.trained = 2"),
        ({"batch": {"group": 16, "micro_batch": 8}}, "batch.micro_batch = 8"),
    ],
)
def test_groups_that_cannot_be_compared_are_refused(algorithm: str, settings: dict, message: str):
    with pytest.raises(UserError, match=message):
        validate({"algorithm": algorithm} | settings)


def test_steps_and_guidance_that_cannot_run_are_refused():
    with pytest.raises(UserError, match=r"sampler.steps = 1"):
        validate({"algorithm": "dgpo", "sampler": {"steps": 1}})
    for algorithm in ("tdm", "tdm_r1", "tdm_r1_release", "tdm_direct_rl"):
        with pytest.raises(UserError, match=r"sampler.guidance = 2.0"):
            validate({"algorithm": algorithm, "sampler": {"guidance": 2.0}})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"algorithm": "dgpo", "sampler": {"steps": 4}}, r"^dgpo.draws = 4 with sampler.steps = 4 .* has 2 such"),
        (
            {"algorithm": "tdm_direct_rl", "sampler": {"steps": 4}},
            r"^dgpo.draws = 4 with sampler.steps = 4 .* has 2 such",
        ),
        ({"algorithm": "nft", "model": {"surrogate_lora": "x"}}, r"^model.surrogate_lora = 'x': nft has no surrogate"),
        ({"algorithm": "tdm", "batch": {"kl_prompts": 4}}, r"^batch.kl_prompts = 4: tdm has none"),
        ({"algorithm": "tdm", "model": {"surrogate_lora": "x"}}, r"^model.surrogate_lora = 'x': tdm has no surrogate"),
        ({"task": {"kl": "mini_signs"}}, r"^task.kl = 'mini_signs' with batch.kl_prompts = 0"),
        (
            {
                "surrogate": {"draws": 0, "reference": "dynamic", "ema_decay": 0.9},
                "model": {"surrogate_lora": "x"},
            },
            r"^surrogate.draws = 0 with surrogate.reference = dynamic",
        ),
    ],
)
def test_settings_that_would_be_ignored_or_contradict_are_refused(settings: dict, message: str):
    with pytest.raises(UserError, match=message):
        validate(settings)


def test_the_last_step_of_a_walk_has_no_noise():
    found = experiment(FlowGRPO, TEACHER, batch=SMALL)
    b = batch_of(24, 6)
    walk = found.algorithm.walk(b.conditioning, b.x_1, b.noise)
    assert walk.points.shape[0] == 5
    assert walk.log_likelihood.shape == (3, 24)
    grid, x = flow.few_step_grid(4, 3.0).float(), walk.points[3]
    with found.roles.use(Role.GENERATOR) as field, torch.no_grad():
        v = field(x, grid[3].expand(24), b.conditioning)
    torch.testing.assert_close(walk.points[4], x - grid[3] * v)
