"""The authors' released algorithm: each formula, and whole gradients of the three roles written out independently.

The sources of the formulas are facts about github.com/Luo-Yihong/TDM-R1 (SD3.5-M training code), in this notation.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

import tiny_models
from mixture_world import SMALL, TEACHER, batch_of, experiment, reward
from tdm_r1.algorithms.protocol import Batch
from tdm_r1.algorithms.rollout import Draw, Renoised, Rollout, roll_out
from tdm_r1.algorithms.settings import BatchConfig
from tdm_r1.algorithms.tdm_r1_release import OLD, OLD_DECAY, TDMR1Release, arrival
from tdm_r1.config.run import validate
from tdm_r1.core import flow, losses, release
from tdm_r1.core.advantages import group_advantages
from tdm_r1.errors import UserError
from tdm_r1.models.protocol import Conditioning
from tdm_r1.models.roles import Roles
from tdm_r1.models.specification import Average, Role, trailing, warm_up
from tdm_r1.train.run import Run

RANDOM = torch.Generator().manual_seed(0)


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=RANDOM, dtype=torch.float64)


# ------------------------------------------------------------------------------------------ formulas


def test_the_velocity_back_to_x_s_is_the_conditional_one_and_finite_at_t_1():
    x_s, eps = normal(50, 3), normal(50, 3)
    s = torch.rand(50, generator=RANDOM, dtype=torch.float64) * 0.9
    t = s + 0.01 + (0.98 - s) * torch.rand(50, generator=RANDOM, dtype=torch.float64)
    x_t = flow.renoise(x_s, eps, s, t)
    found = release.velocity_back_to(x_s, eps, s, t)
    torch.testing.assert_close(found, flow.conditional_velocity(x_t, eps, s, t), atol=1e-10, rtol=1e-10)
    at_1 = release.velocity_back_to(x_s, eps, s, torch.ones(50, dtype=torch.float64))
    torch.testing.assert_close(at_1, eps - x_s / (1 - s)[:, None])


def test_the_clean_target_is_the_velocity_that_predicts_the_clean_image():
    clean, x_t, t = normal(9, 4), normal(9, 4), torch.linspace(0.1, 1, 9, dtype=torch.float64)
    v = release.clean_target(clean, x_t, t)
    torch.testing.assert_close(flow.x0_from_v(v, x_t, t), clean)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_times_are_uniform_before_the_shift(shift: float):
    low = torch.tensor([0.0, 0.25, 0.55, 0.9]).repeat_interleave(20_000)
    t = release.unshifted_uniform(low, shift=shift, gap=0.02, noise=torch.Generator().manual_seed(1))
    u = t / (shift - (shift - 1) * t)  # the shift undone
    share = ((u - low - 0.02) / (1 - low - 0.02)).reshape(4, -1)
    assert ((share > -1e-5) & (share < 1 + 1e-5)).all()
    torch.testing.assert_close(share.mean(1), torch.full((4,), 0.5), atol=0.01, rtol=0)
    torch.testing.assert_close(share.var(1), torch.full((4,), 1 / 12), atol=0.002, rtol=0)


@pytest.mark.parametrize(
    ("advantage", "loss_phi", "held"),
    [
        (1.0, 0.90, True),  # better, and explained better by more than the clip
        (1.0, 0.97, False),
        (1.0, 1.10, False),  # better, and moved the wrong way: it keeps its gradient
        (-1.0, 1.10, True),
        (-1.0, 1.03, False),
        (-1.0, 0.90, False),
        (0.0, 0.90, False),
        (0.0, 1.10, False),
    ],
)
def test_the_ratio_holds_what_went_far_enough_its_way(advantage: float, loss_phi: float, held: bool):
    one = [torch.tensor([value], dtype=torch.float64) for value in (loss_phi, 1.0, advantage)]
    assert bool(losses.held_by_ratio(*one, 0.05)) is held


@pytest.mark.parametrize(("advantage", "loss_phi", "moved"), [(1, 0.9, 1), (1, 1.1, 0), (-1, 1.1, 1), (-1, 0.9, 0)])
def test_distance_holds_what_moved_its_way_where_phi_is_far(advantage: float, loss_phi: float, moved: int):
    one = [torch.tensor([value], dtype=torch.float64) for value in (loss_phi, 1.0, advantage)]
    for distance, far in ((0.06, True), (0.05, False), (0.01, False)):
        held = release.held_by_distance(*one, torch.tensor([distance], dtype=torch.float64), 0.05)
        assert bool(held) is bool(moved and far)
    assert not release.held_by_distance(
        *(torch.zeros(1, dtype=torch.float64) for _ in range(3)), torch.ones(1), 0.05
    ).any()


def test_the_slope_is_that_of_the_group_preference():
    loss_phi, loss_ref, advantage = normal(12), normal(12), normal(12)
    slope = losses.group_slope(loss_phi, loss_ref, advantage, 4, 7.0)
    sums = (advantage * (loss_phi - loss_ref)).reshape(3, 4).sum(1).requires_grad_(True)
    (by_sum,) = torch.autograd.grad(losses.group_preference(sums, beta=7.0 / 4).sum(), sums)
    torch.testing.assert_close(slope, (by_sum / (7.0 / 4)).repeat_interleave(4))


def test_guidance_is_a_reward_beside_the_kl():
    fake, cond, uncond = normal(3, 4), normal(3, 4), normal(3, 4)
    guided = uncond + 4.5 * (cond - uncond)
    whole, teacher = release.kl_direction(fake, cond, uncond, guidance=4.5, weight=1.0)
    torch.testing.assert_close(teacher, guided)
    torch.testing.assert_close(whole, fake - guided)
    bare, _ = release.kl_direction(fake, cond, uncond, guidance=4.5, weight=0.0)
    torch.testing.assert_close(bare, fake - cond)
    part, _ = release.kl_direction(fake, cond, uncond, guidance=4.5, weight=0.3)
    torch.testing.assert_close(part, 0.3 * whole + 0.7 * bare)


def test_advantages_by_the_batchs_deviation_and_clipped():
    rewards = torch.tensor([[0.0, 1.0, 0.0, 1.0], [0.4, 0.4, 0.4, 0.4], [0.0, 0.0, 0.0, float("nan")]]).double()
    rewards[2] = torch.tensor([0.0, 9.0, 0.0, float("nan")])
    out = group_advantages(rewards, deviation="batch", clip=1.5).advantage
    valid = rewards[~rewards.isnan()]
    std = (valid - valid.mean()).square().mean().sqrt()
    torch.testing.assert_close(out[0], (rewards[0] - 0.5) / std)
    assert not out[1].any()
    torch.testing.assert_close(out[2], torch.tensor([-3 / float(std), 1.5, -3 / float(std), 0.0]).double())


# ------------------------------------------------------------------------------------------ whole gradients


@dataclass
class Case:
    """The algorithm, a rollout with advantages, and how to call a role's velocity."""

    algorithm: TDMR1Release
    rollout: Rollout
    advantage: Tensor

    def draws_of(self, fit: Callable[[], object]) -> list[Renoised]:
        """What ``fit`` draws while it runs."""
        found: list[Draw] = []
        real = self.algorithm.draw
        self.algorithm.draw = lambda *args, **more: found.append(real(*args, **more)) or found[-1]  # type: ignore[method-assign]
        fit()
        self.algorithm.draw = real  # type: ignore[method-assign]
        return [draw.all() for draw in found]

    def gradient(self, role: Role) -> list[Tensor]:
        found = [p.grad.clone() if p.grad is not None else torch.zeros_like(p) for p in self.parameters(role)]
        for p in self.parameters(role):
            p.grad = None
        return found

    def parameters(self, role: str) -> list:
        return self.algorithm.roles.parameters(role)

    def v(self, role: str, draw: Renoised, text: Conditioning | None = None) -> Tensor:
        with self.algorithm.roles.use(role) as velocity:
            return velocity(draw.x_t, draw.t, self.rollout.conditioning if text is None else text)

    @property
    def empty(self) -> Conditioning:
        return self.algorithm.empty.expand(len(self.rollout))


SETTINGS = {
    "default": {},
    "holds": {"clip": 1e-6, "distance_limit": 1e-6, "anchor": 0.3, "beta": 30.0},
    "ours": {
        "fake_target": "point",
        "loss": "linear",
        "clip": None,
        "distance_limit": None,
        "step_weights": "equal",
        "shared_noise": False,
        "kl": "guided",
        "normalizer": "kl",
        "reference": "dynamic",
    },
    "blocks": {"time_block": 2, "rewarded_steps": 1},
}


def stir(roles: Roles, names: list[str]) -> None:
    with torch.no_grad():
        for k, name in enumerate(names):
            for p in roles.parameters(name):
                p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(k)))


def mixture_case(settings: dict, folder: Path) -> Case:
    found = experiment(TDMR1Release, TEACHER, batch=SMALL, release=settings)
    roles = found.roles
    stir(roles, [str(s.name) for s in roles.specs])
    batch = batch_of(24, 6)
    return case_of(found.algorithm, batch, reward)


def sd3_case(settings: dict, folder: Path) -> Case:
    model = {"path": str(tiny_models.sd3(folder / "sd3", dual=True)), "device": "cpu", "resolution": 16}
    config = {
        "algorithm": "tdm_r1_release",
        "model": model | {"lora": {"rank": 4}},
        "batch": {"prompts": 2, "group": 4, "micro_batch": 4},
        "sampler": {"solver": "dpm"},
        "release": settings,
        "reward": "jpeg_compressibility",
        "output": str(folder),
    }
    run = Run(validate(config))
    stir(run.roles, [str(s.name) for s in run.roles.specs])
    text = run.embed(["a red circle"] * 4 + ["two squares"] * 4)
    x_1 = torch.randn(8, *run.backbone.latent_shape, generator=torch.Generator().manual_seed(5))
    batch = Batch(text, x_1, 4, torch.Generator().manual_seed(6))
    return case_of(run.algorithm, batch, lambda x: x.mean((1, 2, 3)).double())


def case_of(algorithm: TDMR1Release, batch: Batch, score: Callable[[Tensor], Tensor]) -> Case:
    a = algorithm
    rollout = roll_out(
        a.roles, Role.GENERATOR, batch.conditioning, batch.x_1, a.sampler, batch.noise, micro_batch=a.micro_batch
    )
    scores = score(rollout.trajectory.final)
    advantage = group_advantages(scores.reshape(-1, batch.group), deviation="batch", clip=5.0).advantage.flatten()
    return Case(a, rollout, advantage.to(batch.x_1))


WORLDS = {"mixture": mixture_case, "sd3": sd3_case}


def weigh(a: Tensor) -> Tensor:
    return a.reshape(-1, 1, 1, 1)


def loss_of_fake(case: Case, index: Tensor, draw: Renoised) -> Tensor:
    c, t = case.algorithm.config, weigh(draw.t)
    v, teacher = case.v(Role.FAKE, draw), case.v(Role.TEACHER, draw).detach()
    x0 = case.rollout.trajectory.clean[index[0]]
    if c.fake_target == "clean":  # in x0: |x0_fake - x0_hat|^2 / t^2
        error = ((draw.x_t - t * v - x0) / t).square()
    else:
        error = losses.denoising(v, draw.x_t, draw.eps, draw.s, draw.t)
    per_sample = error.flatten(1).mean(1) if error.ndim > 1 else error
    return (per_sample + c.fake_anchor * (v - teacher).square().flatten(1).mean(1)).mean() / c.trained_steps


def loss_of_surrogate(case: Case, draw: Renoised) -> Tensor:
    """Sample by sample, in plain Python."""
    a, c, steps = case.algorithm, case.algorithm.config, case.algorithm.sampler.steps
    target = flow.conditional_velocity(draw.x_t.double(), draw.eps.double(), draw.s.double(), draw.t.double())
    v, ref = case.v(Role.SURROGATE, draw), case.v(a.reference, draw).detach()
    old = case.v(OLD, draw).detach() if c.clip else v.detach()
    l_phi, l_ref, l_old = ((u - target).square().flatten(1).mean(1) for u in (v, ref, old))
    gap = (v - ref).square().flatten(1).mean(1)
    total, free = torch.zeros((), dtype=torch.float64), l_phi.detach()
    for i, A in enumerate(case.advantage.tolist()):
        group = range(i // a.group * a.group, (i // a.group + 1) * a.group)
        block = range(i // a.block * a.block, (i // a.block + 1) * a.block)
        inside = sum(float(case.advantage[j]) * float(free[j] - l_ref[j]) for j in group)
        slope = 1 / (1 + torch.tensor(-c.beta / a.group * inside).exp()) if c.loss == "sigmoid" else 0.5
        ratio, moved = float((l_old[i] - free[i]).exp()), float(l_ref[i] - free[i])
        held = bool(c.clip) and (ratio > 1 + (c.clip or 0) if A > 0 else ratio < 1 - (c.clip or 0))
        far = sum(float(gap[j].detach()) for j in block) / len(block)
        held = held or (c.distance_limit is not None and far > c.distance_limit and A * moved > 0)
        weight = (int(draw.index[i]) + 1) / steps if c.step_weights == "late" else 1.0
        total = total + (0.0 if held else 1.0) * weight * slope * A * l_phi[i] + c.anchor * gap[i]
    return total / len(case.advantage) / c.trained_steps


def loss_of_generator(case: Case, index: Tensor, for_kl: Renoised, for_reward: Renoised) -> Tensor:
    """As the release puts it: w times guided TDM, and (1 - w) times the unguided KL and the reward."""
    a, c, here = case.algorithm, case.algorithm.config, case.rollout.trajectory
    i = int(index[0])

    def x0(v: Tensor, draw: Renoised) -> Tensor:
        return draw.x_t - weigh(draw.t) * v

    with a.roles.use(Role.GENERATOR) as velocity:
        x, t = here.points[i], here.grid[i].to(here.points).expand(len(here.points[i]))
        output = x - weigh(t) * velocity(x, t, case.rollout.conditioning)
    with torch.no_grad():
        cond, uncond = (x0(case.v(Role.TEACHER, for_kl, text), for_kl) for text in (None, case.empty))
        teacher = uncond + c.teacher_guidance * (cond - uncond)
        fake = x0(case.v(Role.FAKE, for_kl), for_kl)
        norm = weigh((output - teacher).abs().flatten(1).mean(1).clamp_min(c.normalizer_floor))
        w = c.tdm_weight
        if c.rewarded_steps is not None and i >= c.rewarded_steps:
            d = w * (fake - teacher) / norm
        else:
            d = (fake - teacher if c.kl == "guided" else w * (fake - teacher) + (1 - w) * (fake - cond)) / norm
            phi_c, phi_u = (x0(case.v(Role.SURROGATE, for_reward, text), for_reward) for text in (None, case.empty))
            phi = phi_u + c.surrogate_guidance * (phi_c - phi_u)
            ref = x0(case.v(a.reference, for_reward), for_reward)
            own = weigh((output - phi).abs().flatten(1).mean(1).clamp_min(c.normalizer_floor))
            d = d - (1 - w) * (phi - ref) / (own if c.normalizer == "each" else norm)
    return (output * d).flatten(1).mean(1).mean() / c.trained_steps


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("world", WORLDS)
def test_gradients_are_those_of_the_losses_written_out(world: str, settings: str, tmp_path: Path):
    case = WORLDS[world](SETTINGS[settings], tmp_path)
    a, noise = case.algorithm, torch.Generator().manual_seed(9)
    for step in (0, 2):
        index = torch.full((len(case.rollout),), step)
        fits: dict[Role, tuple[Callable[[], object], Callable[..., Tensor]]] = {
            Role.FAKE: (
                lambda i=index: a.fit_fake(case.rollout, i, noise),
                lambda d, i=index: loss_of_fake(case, i, d),
            ),
            Role.SURROGATE: (
                lambda: a.fit_surrogate(case.rollout, case.advantage, noise),
                lambda d: loss_of_surrogate(case, d),
            ),
            Role.GENERATOR: (
                lambda i=index: a.fit_generator(case.rollout, i, noise),
                lambda d, e, i=index: loss_of_generator(case, i, d, e),
            ),
        }
        for role, (fit, by_hand) in fits.items():
            draws = case.draws_of(fit)
            found = case.gradient(role)
            expected = torch.autograd.grad(by_hand(*draws), case.parameters(role), allow_unused=True)
            scale = max(float(g.abs().max()) for g in expected if g is not None)
            assert scale > 1e-7 or settings == "holds", role
            for mine, theirs in zip(found, expected, strict=True):
                torch.testing.assert_close(mine, theirs if theirs is not None else mine * 0, atol=1e-6, rtol=1e-4)
        for other in case.algorithm.roles.specs:
            assert all(p.grad is None for p in case.parameters(other.name))


def test_the_draws_are_shared_as_they_should_be():
    case = mixture_case({"time_block": 3}, Path())
    a, noise = case.algorithm, torch.Generator().manual_seed(3)
    index = a.draw_steps(24, noise)
    assert (index.reshape(-1, 3) == index[::3, None]).all()
    drawn = torch.cat([a.draw_steps(24, noise)[::3] for _ in range(2000)])
    torch.testing.assert_close(drawn.bincount() / len(drawn), torch.tensor([0.1, 0.2, 0.3, 0.4]), atol=0.01, rtol=0)
    x_s = case.rollout.trajectory.at(index + 1)
    draw = a.draw(index, x_s, 0.55, noise, shared=True).all()
    assert (draw.t.reshape(-1, 3) == draw.t[::3, None]).all()
    assert len(draw.t.unique()) == 8
    assert (draw.eps.reshape(4, 6, -1) == draw.eps.reshape(4, 6, -1)[:, :1]).all()
    assert len(a.draw(index, x_s, 0.55, noise).all().eps.flatten(1)[:, 0].unique()) == 24
    u = draw.t / (3 - 2 * draw.t)
    assert (u >= torch.maximum(torch.tensor(0.55), 1 - (index + 1) / 4) + 0.0199).all()
    torch.testing.assert_close(draw.s, flow.few_step_grid(4, 3.0).float()[index + 1])
    torch.testing.assert_close(draw.x_t, flow.renoise(x_s, draw.eps, draw.s, draw.t))


def test_the_step_arrives_by_euler_whatever_the_solver():
    trajectory = mixture_case({}, Path()).rollout.trajectory
    for step in range(4):
        index = torch.full((24,), step)
        clean, x_s = arrival(trajectory, index)
        torch.testing.assert_close(clean, trajectory.clean[step])
        torch.testing.assert_close(x_s, trajectory.points[step + 1], atol=1e-6, rtol=1e-5)  # solved by Euler here


def test_an_iteration_is_one_update_of_each_role():
    found = experiment(TDMR1Release, TEACHER, batch=SMALL, release={"trained_steps": 3})
    calls: list[tuple[str, int]] = []
    for name in ("fit_fake", "fit_generator"):
        real = getattr(found.algorithm, name)

        def noted(rollout, index, noise, real=real, name=name):
            assert (index == index[0]).all()
            calls.append((name, int(index[0])))
            return real(rollout, index, noise)

        setattr(found.algorithm, name, noted)
    metrics = found.run(1)[0]
    fakes, generators = ([step for n, step in calls if n == name] for name in ("fit_fake", "fit_generator"))
    assert fakes == generators
    assert len(set(fakes)) == 3
    assert [o.updates for o in found.algorithm.optimizers.values()] == [1, 1, 1]
    assert {"fake/grad_norm", "surrogate/held_by_ratio", "surrogate/preference_accuracy", "generator/reward_part"} <= (
        metrics.keys()
    )


def test_averages_follow_with_their_ramps():
    found = experiment(TDMR1Release, TEACHER, batch=SMALL)
    specs = {spec.name: spec for spec in found.roles.specs}
    assert specs[OLD].average == Average(Role.SURROGATE, OLD_DECAY, trailing)
    assert [round(specs[OLD].average.decay_after(n), 6) for n in (1, 2, 250, 300, 900)] == [
        0.001,
        0.002,
        0.25,
        0.3,
        0.3,
    ]
    assert specs[Role.GENERATOR_EMA].average == Average(Role.GENERATOR, 0.9, warm_up)
    assert [round(specs[Role.GENERATOR_EMA].average.decay_after(n), 4) for n in (1, 10, 1000)] == [0.1818, 0.55, 0.9]
    for n in (1, 2, 3):
        before = {name: found.roles.state(name) for name in (OLD, Role.GENERATOR_EMA)}
        found.run(1)
        for name, source in ((OLD, Role.SURROGATE), (Role.GENERATOR_EMA, Role.GENERATOR)):
            decay, now = specs[name].average.decay_after(n), found.roles.state(source)
            for key, p in found.roles.state(name).items():
                torch.testing.assert_close(p, decay * before[name][key] + (1 - decay) * now[key])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch": {"group": 1}}, "batch.group = 1"),
        ({"batch": {"group": 6, "trained": 2}}, "batch.trained = 2"),
        ({"release": {"trained_steps": 5}}, "release.trained_steps = 5"),
        ({"batch": {"group": 16, "micro_batch": 8}}, "batch.micro_batch = 8"),
        ({"batch": {"group": 6}, "release": {"time_block": 4}}, "release.time_block = 4"),
    ],
)
def test_settings_that_cannot_run_are_refused(settings: dict, message: str):
    with pytest.raises(UserError, match=message):
        validate({"algorithm": "tdm_r1_release"} | settings)


def test_a_group_of_settings_given_in_part_keeps_its_own_defaults():
    config = validate({"algorithm": "tdm_r1_release", "release": {"surrogate": {"learning_rate": 0.5}}}).release
    assert (config.surrogate.learning_rate, config.surrogate.betas) == (0.5, (0.9, 0.999))
    assert (config.generator.betas, config.generator.weight_decay) == ((0.0, 0.999), 1e-4)
    assert BatchConfig().trained is None
