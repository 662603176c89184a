"""The parts of the algorithms on the mixture world: draws, gradients, optimizer, balance, metrics, declarations."""

from __future__ import annotations

import math
import time
from collections import Counter

import pytest
import torch
from torch import Tensor, nn

from mixture_world import TEACHER, Experiment, Mixture, experiment, reward
from tdm_r1.algorithms.metrics import Stopwatch, Sums, mean_of_each
from tdm_r1.algorithms.optimizer import Optimizer
from tdm_r1.algorithms.protocol import Batch
from tdm_r1.algorithms.rollout import Draw, Rollout, draw_points, draw_times, roll_out
from tdm_r1.algorithms.settings import BalanceConfig, OptimizerConfig
from tdm_r1.algorithms.surrogate import Probe, preference_accuracy, whole_groups
from tdm_r1.algorithms.tdm import TDM
from tdm_r1.algorithms.tdm_r1 import TDMR1, Balance
from tdm_r1.core import flow
from tdm_r1.core.solvers import Trajectory
from tdm_r1.errors import UserError
from tdm_r1.models.protocol import Conditioning
from tdm_r1.models.specification import AddedDelta, Average, Role

SMALL = {"prompts": 4, "group": 6, "micro_batch": 24}


def conditioning(n: int) -> Conditioning:
    return Conditioning.of(embeds=torch.zeros(1, 1)).expand(n)


def batch_of(n: int, group: int = 1, seed: int = 0) -> Batch:
    noise = torch.Generator().manual_seed(seed)
    return Batch(conditioning(n), torch.randn(n, 2, 1, 1, generator=noise), group, noise, reward)


def rollout_of(n: int, steps: int = 4, shift: float = 3.0) -> Rollout:
    """Trajectories whose point i is i everywhere."""
    points = torch.arange(steps + 1.0)[:, None, None, None, None].expand(steps + 1, n, 2, 1, 1)
    return Rollout(Trajectory(flow.few_step_grid(steps, shift), points, points[:-1]), conditioning(n))


# ------------------------------------------------------------------------------------------ rollout and draws


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
    draw = draw_points(rollout_of(12), torch.Generator().manual_seed(0), group_size=4)
    for values in (draw.index, draw.s, draw.t, draw.eps.flatten(1)[:, 0]):
        groups = values.reshape(3, 4)
        assert (groups == groups[:, :1]).all()
    assert len(draw.t.unique()) == 3
    alone = draw_points(rollout_of(12), torch.Generator().manual_seed(0))
    assert len(alone.t.unique()) == 12


@pytest.mark.parametrize(("points", "expected"), [("all", {0, 1, 2, 3}), ("earlier", {0, 1, 2}), ("final", {3})])
def test_points_of_the_trajectory(points: str, expected: set[int]):
    rollout = rollout_of(400)
    draw = draw_points(rollout, torch.Generator().manual_seed(0), points=points)  # type: ignore[arg-type]
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
    draw = draw_points(rollout_of(2000, steps, shift), torch.Generator().manual_seed(0))
    assert (draw.t > draw.s).all()
    assert (draw.t < 1).all()
    assert draw.s.max() > 0.99


# ------------------------------------------------------------------------------------------ gradients


def gradients(found: Experiment, role: Role) -> dict[str, Tensor]:
    """What one update would be, with SGD of rate 1 in place of AdamW."""
    return {n: p.detach().clone() for n, p in found.roles.weights(role).items()}


def with_sgd(found: Experiment) -> Experiment:
    algorithm = found.algorithm
    optimizers = [*(algorithm.tdm if isinstance(algorithm, TDMR1) else algorithm).optimizers.values()]
    if isinstance(algorithm, TDMR1):
        optimizers.append(algorithm.surrogate.optimizer)
    for optimizer in optimizers:
        optimizer.config = optimizer.config.model_copy(update={"max_grad_norm": 1e9})
        optimizer.adamw = torch.optim.SGD(optimizer.parameters, lr=1.0)
        optimizer.schedule = torch.optim.lr_scheduler.LambdaLR(optimizer.adamw, lambda done: 1.0)
    return found


SURROGATES = {
    "anchored": {"loss": "anchored"},
    "preference": {"loss": "preference", "beta": 30.0},
    "anchor": {"loss": "preference", "beta": 30.0, "trust_region": "anchor", "anchor_weight": 0.1},
}


@pytest.mark.parametrize("name", SURROGATES)
@pytest.mark.parametrize("micro_batch", [13, 6, 5, 1])
def test_micro_batches_change_no_gradient(name: str, micro_batch: int):
    """Where a group (6) is larger than a micro-batch too: its sum is inside the sigmoid."""
    found = {}
    for size in (24, micro_batch):
        one = with_sgd(
            experiment(TDMR1, TEACHER, batch=SMALL | {"micro_batch": size}, surrogate=SURROGATES[name] | {"draws": 1})
        )
        with torch.no_grad():  # phi has left its reference, so that the sigmoid's slope differs between groups
            for p in one.roles.parameters(Role.SURROGATE):
                p.add_(0.1)
        metrics = one.run(1)[0]
        found[size] = {role: gradients(one, role) for role in (Role.SURROGATE, Role.FAKE, Role.GENERATOR)} | metrics
    whole, parts = found[24], found[micro_batch]
    for key, value in whole.items():
        if key in (Role.SURROGATE, Role.FAKE, Role.GENERATOR):
            for n, p in value.items():
                torch.testing.assert_close(parts[key][n], p, atol=1e-5, rtol=1e-4)
        elif not key.startswith("seconds") and not math.isnan(value):
            assert parts[key] == pytest.approx(value, rel=2e-3, abs=1e-5), key


def fitted(surrogate: dict, advantage: Tensor) -> tuple[Mixture, Draw, dict[str, float], dict[str, Tensor]]:
    """Phi, away from its reference, before one step along its gradient; the draw; the metrics; and phi after it."""
    one = with_sgd(experiment(TDMR1, TEACHER, batch=SMALL, surrogate=surrogate))
    with torch.no_grad():
        for p in one.roles.parameters(Role.SURROGATE):
            p.add_(0.1)
    before = Mixture(TEACHER)
    before.load_state_dict(gradients(one, Role.SURROGATE))
    phi, rollout = one.algorithm.surrogate, one.algorithm.tdm.roll_out(batch_of(24))
    metrics = phi.fit(rollout, advantage, torch.arange(24), torch.Generator().manual_seed(5))
    draw = phi.draw(rollout, torch.Generator().manual_seed(5), 6)
    return before, draw, metrics, gradients(one, Role.SURROGATE)


@pytest.mark.parametrize("trust_region", ["none", "anchor", "clip"])
def test_the_preference_gradient_is_that_of_the_printed_loss(trust_region: str):
    """Against the loss written out for all groups at once."""
    region = {"trust_region": trust_region, "anchor_weight": 0.3, "clip": 0.02}
    config = {"loss": "preference", "beta": 30.0, "reference": "static"} | region
    advantage = torch.randn(4, 6, generator=torch.Generator().manual_seed(3))
    advantage = (advantage - advantage.mean(1, keepdim=True)).flatten()
    by_hand, draw, metrics, after = fitted(config, advantage)
    before = by_hand.state_dict()

    def velocity_of(law) -> Tensor:
        return law.velocity(draw.x_t.flatten(1), draw.t).reshape(draw.x_t.shape)

    def loss_of(v: Tensor) -> Tensor:
        sigma = (draw.t**2 - ((1 - draw.t) / (1 - draw.s)) ** 2 * draw.s**2).sqrt()
        ratio = (sigma / draw.t)[:, None, None, None]
        x_t, t = draw.x_t, draw.t[:, None, None, None]
        weight = 1 / (1 - ratio**2 + (1 - t).clamp_min(0.1) ** 2)
        return (weight * (draw.eps - ratio * (x_t + (1 - t) * v)) ** 2).flatten(1).mean(1)

    v_phi, v_ref = velocity_of(by_hand.law()), velocity_of(TEACHER).detach()
    change = loss_of(v_phi) - loss_of(v_ref)
    if trust_region == "clip":  # the better ones count down to -0.02, the worse ones up to 0.02
        assert 0 < int((change.abs() > 0.02).sum()) < 24
        change = torch.where(advantage > 0, change.clamp(min=-0.02), change.clamp(max=0.02))
    sums = ((1 - draw.s) * advantage * change).reshape(4, 6).mean(1)
    loss = -nn.functional.logsigmoid(-30.0 * sums).mean()
    distance = (v_phi - v_ref).square().mean()
    (loss + 0.3 * distance if trust_region == "anchor" else loss).backward()
    assert metrics["surrogate/loss"] == pytest.approx(float(loss.detach()), rel=1e-4)
    assert metrics["surrogate/distance_from_reference"] == pytest.approx(float(distance.detach()), rel=1e-4)
    assert metrics["surrogate/saturation"] == float((30.0 * sums.abs() > 4).float().mean())
    for name, p in by_hand.named_parameters():
        torch.testing.assert_close(after[name], before[name] - p.grad, atol=1e-5, rtol=1e-3)


def test_the_anchored_gradient_is_that_of_its_loss():
    """kappa A (eps* - eps_base) is what phi's change regresses onto."""
    config = {"loss": "anchored", "baseline": "reference", "reference": "static", "kappa": 0.7}
    advantage = torch.linspace(-1, 1, 24)
    by_hand, draw, metrics, after = fitted(config, advantage)
    before = by_hand.state_dict()
    x_t, t = draw.x_t.flatten(1), draw.t[:, None]
    v_phi, v_ref = by_hand.law().velocity(x_t, draw.t), TEACHER.velocity(x_t, draw.t)
    sigma = (draw.t**2 - ((1 - draw.t) / (1 - draw.s)) ** 2 * draw.s**2).sqrt()
    ratio = (sigma / draw.t)[:, None]
    weight = 1 / (1 - ratio**2 + (1 - t).clamp_min(0.1) ** 2)
    residual = draw.eps.flatten(1) - ratio * (x_t + (1 - t) * v_ref)
    change = ratio * (1 - t) * (v_phi - v_ref)
    loss = (weight * (change - 0.7 * advantage[:, None] * residual) ** 2).mean()
    loss.backward()
    assert metrics["surrogate/loss"] == pytest.approx(float(loss.detach()), rel=1e-4)
    distance = float((v_phi - v_ref).detach().square().mean())
    assert metrics["surrogate/distance_from_reference"] == pytest.approx(distance, rel=1e-4)
    for name, p in by_hand.named_parameters():
        torch.testing.assert_close(after[name], before[name] - p.grad, atol=1e-5, rtol=1e-3)


def test_the_clip_holds_samples_that_have_gone_far_enough():
    """With a clip of nothing, only samples that went the wrong way give gradient."""
    moved = {}
    for clip in (1e-9, 1e9):
        config = {"loss": "preference", "beta": 1.0, "trust_region": "clip", "clip": clip}
        one = with_sgd(experiment(TDMR1, TEACHER, batch=SMALL, surrogate=config))
        with torch.no_grad():
            for p in one.roles.parameters(Role.SURROGATE):
                p.add_(0.1)
        rollout = one.algorithm.tdm.roll_out(batch_of(24))
        advantage = torch.tensor([1.0, -1.0]).repeat(12)
        before = gradients(one, Role.SURROGATE)
        one.algorithm.surrogate.fit(rollout, advantage, torch.arange(24), torch.Generator().manual_seed(0))
        moved[clip] = sum(
            float((p.detach() - before[n]).abs().sum()) for n, p in one.roles.weights(Role.SURROGATE).items()
        )
    assert 0 < moved[1e-9] != pytest.approx(moved[1e9], rel=0.05)


def test_each_fake_score_is_trained_on_its_points_and_asked_about_them():
    found = experiment(TDM, TEACHER, tdm={"fake_scores": "two"}, batch=SMALL)
    seen: dict[Role, list[Tensor]] = {Role.FAKE: [], Role.FAKE_FINAL: []}
    real = found.algorithm.fit_fake_at

    def noted(points, fake, rollout, noise):
        seen[fake].append(points)
        assert len(rollout) == 12
        return real(points, fake, rollout, noise)

    found.algorithm.fit_fake_at = noted  # type: ignore[method-assign]
    metrics = found.run(1)[0]
    assert seen == {Role.FAKE: ["earlier"] * 2, Role.FAKE_FINAL: ["final"] * 2}
    assert {"fake/loss", "fake_final/loss", "fake/learning_rate", "fake_final/grad_norm"} <= metrics.keys()
    x_t, t = torch.randn(4, 2, 1, 1), torch.full((4,), 0.6)
    with torch.no_grad():
        for p in found.roles.parameters(Role.FAKE_FINAL):
            p.add_(0.5)
        both = found.algorithm.fake_velocity(x_t, t, conditioning(4), torch.tensor([3, 0, 2, 3]))
        with found.roles.use(Role.FAKE) as earlier, found.roles.use(Role.FAKE_FINAL) as final:
            torch.testing.assert_close(both[[1, 2]], earlier(x_t, t, conditioning(4))[[1, 2]])
            torch.testing.assert_close(both[[0, 3]], final(x_t, t, conditioning(4))[[0, 3]])


def test_the_teacher_is_guided():
    """Eq. 2 with the teacher's guidance: it calls the teacher with both halves."""
    found = experiment(TDM, TEACHER, tdm={"teacher_guidance": 2.0}, batch=SMALL)
    sizes: list[int] = []
    real = found.roles._velocity_of

    def counted(transformer):
        velocity = real(transformer)

        def call(x_t, t, c):
            sizes.append(len(x_t))
            return velocity(x_t, t, c)

        return call

    found.roles._velocity_of = counted
    found.algorithm.fit_generator(found.algorithm.roll_out(batch_of(24)), torch.Generator().manual_seed(0))
    assert Counter(sizes) == {24: 6, 48: 1}  # rollout (4), the step, the fake score; the teacher


def test_the_reward_acts_at_the_surrogates_noise_levels_alone():
    found = experiment(TDMR1, TEACHER, surrogate={"time_range": (0.3, 0.8)}, balance={"scale": 2.5})
    with torch.no_grad():
        for p in found.roles.parameters(Role.SURROGATE_EMA):
            p.add_(0.3)
    x_t, t = torch.randn(11, 2, 1, 1), torch.linspace(0.05, 0.95, 11)
    part = found.algorithm.reward_part(x_t, t, conditioning(11))
    inside = (t >= 0.3) & (t <= 0.8)
    assert (part[inside].abs().sum((1, 2, 3)) > 0).all()
    assert not part[~inside].any()
    torch.testing.assert_close(part, 2.5 * found.algorithm.surrogate.direction(x_t, t, conditioning(11)))
    with torch.no_grad(), found.roles.use(Role.SURROGATE_EMA) as phi:
        x0_phi = flow.x0_from_v(phi(x_t, t, conditioning(11)), x_t, t)
    with torch.no_grad(), found.roles.use(Role.TEACHER) as teacher:
        x0_ref = flow.x0_from_v(teacher(x_t, t, conditioning(11)), x_t, t)
    torch.testing.assert_close(part[inside], 2.5 * (x0_ref - x0_phi)[inside])


@pytest.mark.parametrize(
    ("reference", "role"), [("static", Role.TEACHER), ("fake", Role.FAKE), ("dynamic", Role.REFERENCE)]
)
def test_the_reference_is_the_role_that_is_named(reference: str, role: Role):
    surrogate = {"reference": reference, "ema_decay": 0.5, "loss": "preference"}
    found = experiment(TDMR1, TEACHER, surrogate=surrogate)
    with torch.no_grad():
        for other in {Role.FAKE, Role.REFERENCE, Role.SURROGATE, Role.SURROGATE_EMA} & {
            s.name for s in found.roles.specs
        }:
            for p in found.roles.parameters(other):
                p.add_(0.1 * len(other))
    x_t, t = torch.randn(3, 2, 1, 1), torch.full((3,), 0.5)
    v = found.algorithm.surrogate.reference_velocity(x_t, t, conditioning(3))
    with torch.no_grad(), found.roles.use(role) as velocity:
        torch.testing.assert_close(v, velocity(x_t, t, conditioning(3)))


def test_the_baseline_of_the_preference_loss_is_its_reference():
    x_t, t, index = torch.randn(3, 2, 1, 1), torch.full((3,), 0.5), torch.tensor([3, 3, 3])
    for loss, baseline, is_fake in (
        ("anchored", "fake", True),
        ("anchored", "reference", False),
        ("preference", "fake", False),
    ):
        found = experiment(TDMR1, TEACHER, surrogate={"loss": loss, "baseline": baseline})
        with torch.no_grad():
            for p in found.roles.parameters(Role.FAKE):
                p.add_(0.2)
        v_ref = found.algorithm.surrogate.reference_velocity(x_t, t, conditioning(3))
        v_base = found.algorithm.surrogate.baseline_velocity(x_t, t, conditioning(3), index, v_ref)
        assert (not torch.equal(v_base, v_ref)) == is_fake


def test_groups_without_a_difference_teach_the_surrogate_nothing_and_move_the_averages():
    found = experiment(TDMR1, TEACHER, batch=SMALL)
    with torch.no_grad():
        for p in found.roles.parameters(Role.SURROGATE):
            p.add_(0.5)
    before, ema = gradients(found, Role.SURROGATE), gradients(found, Role.SURROGATE_EMA)
    b = batch_of(24, 6)
    metrics = found.algorithm.step(Batch(b.conditioning, b.x_1, 6, b.noise, lambda x: torch.full((24,), 21.37)))
    assert metrics["reward/skipped_groups"] == 4
    assert metrics["reward/mean"] == pytest.approx(21.37)
    assert metrics["reward/group_std"] == pytest.approx(0, abs=1e-9)
    assert "surrogate/loss" not in metrics
    assert all(torch.equal(p, before[n]) for n, p in found.roles.weights(Role.SURROGATE).items())
    assert any(not torch.equal(p, ema[n]) for n, p in found.roles.weights(Role.SURROGATE_EMA).items())


def test_extremes_are_the_surrogates_and_the_first_the_generators():
    found = experiment(TDMR1, TEACHER, batch=SMALL | {"trained": 2})
    sizes: dict[str, list] = {"surrogate": [], "fake": [], "generator": []}
    algorithm = found.algorithm
    fit, fake, generator = algorithm.surrogate.fit, algorithm.tdm.fit_fake, algorithm.tdm.fit_generator
    algorithm.surrogate.fit = lambda r, a, rows, n: sizes["surrogate"].append((rows, a)) or fit(r, a, rows, n)
    algorithm.tdm.fit_fake = lambda r, n: sizes["fake"].append(r) or fake(r, n)
    algorithm.tdm.fit_generator = lambda r, n, part: sizes["generator"].append(r) or generator(r, n, part)
    found.run(1)
    rows, advantage = sizes["surrogate"][0]
    for group in advantage.reshape(4, 6):
        assert int((group != 0).sum()) == 2
        assert float(group.sum()) == pytest.approx(0, abs=1e-6)
    assert len(rows) == 8
    assert len(sizes["surrogate"]) == found.config.surrogate.draws
    assert [len(r) for r in sizes["fake"] + sizes["generator"]] == [8, 8, 8]
    whole = algorithm.tdm.roll_out(_first_batch(found))
    expected = whole.trajectory.final.reshape(4, 6, 2)[:, :2].reshape(8, 2)
    torch.testing.assert_close(sizes["fake"][0].trajectory.final.flatten(1), expected, atol=0.5, rtol=0)


def _first_batch(found: Experiment) -> Batch:
    noise = torch.Generator().manual_seed(0)
    return Batch(conditioning(24), torch.randn(24, 2, 1, 1, generator=noise), 6, noise, reward)


# ------------------------------------------------------------------------------------------ state


@pytest.mark.parametrize("kind", [TDM, TDMR1])
def test_an_algorithm_goes_on_from_its_state(kind):
    settings = {"balance": {"policy": "ratio", "rate": 0.5}, "batch": SMALL, "tdm": {"fake_scores": "two"}}
    straight, first, second = (experiment(kind, TEACHER, **settings) for _ in range(3))
    straight.run(4)
    first.run(2)
    second.algorithm.load_state(first.algorithm.state())
    for spec in first.roles.specs:
        second.roles.load(spec.name, first.roles.state(spec.name))
    second.iteration = 2
    second.run(2)
    for spec in straight.roles.specs:
        for n, p in straight.roles.weights(spec.name).items():
            torch.testing.assert_close(second.roles.weights(spec.name)[n], p, rtol=0, atol=0)


# ------------------------------------------------------------------------------------------ optimizer


def optimizer(total: int = 8, **settings) -> tuple[nn.Parameter, Optimizer]:
    p = nn.Parameter(torch.zeros(3))
    return p, Optimizer([p], OptimizerConfig(**({"learning_rate": 1.0} | settings)), total=total)


def test_learning_rates_warm_up_and_fall():
    p, found = optimizer(warmup_steps=2, decay_share=0.5)
    rates = []
    for _ in range(9):  # one more than planned does no harm
        p.grad = torch.ones_like(p)
        rates.append(found.step()["learning_rate"])
    assert rates == pytest.approx([0.5, 1, 1, 1, 1, 0.75, 0.5, 0.25, 0])
    assert found.rate == 0
    _, constant = optimizer(warmup_steps=1)
    assert constant.rate == 1


def test_an_update_is_adamws_with_the_clipped_gradient():
    p, found = optimizer(warmup_steps=1, betas=(0.5, 0.9), weight_decay=0.1, max_grad_norm=1.0)
    q = nn.Parameter(torch.zeros(3))
    other = torch.optim.AdamW([q], lr=1.0, betas=(0.5, 0.9), weight_decay=0.1)
    for scale in (3.0, 0.1, 2.0):
        g = scale * torch.tensor([1.0, 2.0, 2.0])
        p.grad, q.grad = g.clone(), g * min(1.0, 1.0 / float(g.norm()))
        version = p._version
        metrics = found.step()
        other.step()
        assert metrics["grad_norm"] == pytest.approx(3 * scale)
        assert p.grad is None
        assert p._version > version
        torch.testing.assert_close(p, q, atol=1e-5, rtol=1e-4)


def test_updates_without_a_finite_gradient_are_skipped_and_five_in_a_row_stop():
    p, found = optimizer(warmup_steps=1)

    def update(value: float) -> None:
        p.grad = torch.full_like(p, value)
        found.step()

    for _ in range(4):
        update(math.nan)
    assert not p.any()
    update(1.0)
    assert p.all()
    for _ in range(4):
        update(math.inf)
    with pytest.raises(FloatingPointError, match=r"5 updates in a row.*earlier checkpoint"):
        update(math.nan)


def test_an_optimizer_goes_on_with_its_own_settings():
    p, first = optimizer(warmup_steps=4, betas=(0.5, 0.9))
    p.grad = torch.ones_like(p)
    first.step()
    q, second = optimizer(warmup_steps=8, betas=(0.1, 0.2), weight_decay=0.3)
    second.load_state(first.state())
    (group,) = second.adamw.param_groups
    assert (group["betas"], group["weight_decay"]) == ((0.1, 0.2), 0.3)
    assert second.rate == pytest.approx(2 / 8)
    assert second.adamw.state[q]["exp_avg"].any()


def test_eight_bits_need_bitsandbytes():
    pytest.importorskip("torch")
    try:
        import bitsandbytes  # noqa: F401
    except ImportError:
        with pytest.raises(UserError, match=r"pip install 'tdm-r1\[eight-bit\]'"):
            optimizer(eight_bit=True)


# ------------------------------------------------------------------------------------------ balance, metrics, groups


def test_the_controller_moves_slowly_towards_the_ratio_and_stays_in_bounds():
    config = BalanceConfig(policy="ratio", scale=4.0, ratio=2.0, rate=0.1, bounds=(3.5, 5.0))
    balance = Balance(config)
    balance.update(1.0, 1.0)  # 1:1, wanted 2:1
    assert balance.scale == pytest.approx(4.0 * math.exp(0.1 * math.log(2)))
    balance.update(1.0, 100.0)
    balance.update(1.0, 100.0)
    balance.update(1.0, 100.0)
    assert balance.scale == 5.0
    for _ in range(9):
        balance.update(1.0, 1e-9)
    assert balance.scale == 3.5
    before = balance.scale
    balance.update(0.0, 1.0)  # nothing to weigh
    assert balance.scale == before
    fixed = Balance(BalanceConfig(scale=4.0))
    fixed.update(1.0, 50.0)
    assert fixed.scale == 4.0


def test_a_controlled_scale_goes_on_unless_another_start_is_set():
    saved = Balance(BalanceConfig(policy="ratio", scale=4.0))
    saved.scale = 7.0
    for config, expected in (
        (BalanceConfig(policy="ratio", scale=4.0), 7.0),
        (BalanceConfig(policy="ratio", scale=5.0), 5.0),
        (BalanceConfig(policy="fixed", scale=4.0), 4.0),
    ):
        balance = Balance(config)
        balance.load_state(saved.state())
        assert balance.scale == expected


def test_metrics_are_summed_and_averaged():
    sums = Sums()
    sums.add("a", torch.tensor(2.0), 0.5)
    sums.add("b", torch.tensor(3.0, dtype=torch.float64))
    sums.add("a", torch.tensor(4.0, requires_grad=True), 0.25)
    assert sums.read() == {"a": 2.0, "b": 3.0}
    assert Sums().read() == {}
    assert mean_of_each([{"a": 1.0, "b": 2.0}, {"a": 3.0}, {}]) == {"a": 2.0, "b": 2.0}


def test_phases_are_timed():
    seconds = Stopwatch()
    for _ in range(2):
        with seconds("nap"):
            time.sleep(0.01)
    assert 0.02 <= seconds.read()["seconds/nap"] < 1


def test_groups_are_packed_whole():
    rows = torch.tensor([0, 1, 4, 5, 6, 9, 12, 13])
    group = torch.tensor([0, 0, 1, 1, 1, 2, 3, 3])
    assert [p.tolist() for p in whole_groups(rows, group, 5)] == [[0, 1, 4, 5, 6], [9, 12, 13]]
    assert [p.tolist() for p in whole_groups(rows, group, 3)] == [[0, 1], [4, 5, 6], [9, 12, 13]]
    assert whole_groups(rows, group, 2) is None


def test_preference_accuracy_counts_pairs_of_a_group():
    advantage = torch.tensor([1.0, 0.0, -1.0, 2.0, 2.0, 0.0])
    assert preference_accuracy(torch.tensor([3.0, 2.0, 1.0, 5.0, 5.0, 4.0]), advantage, 3) == 1.0
    assert preference_accuracy(torch.tensor([1.0, 2.0, 3.0, 5.0, 5.0, 4.0]), advantage, 3) == pytest.approx(2 / 5)
    assert preference_accuracy(torch.zeros(6), advantage, 3) == 0.0
    assert preference_accuracy(torch.arange(6.0), torch.zeros(6), 3) == 0.0


def test_the_probe_keeps_its_first_points():
    probe = Probe()
    points = [(torch.full((2, 2, 1, 1), float(i)), torch.zeros(2), conditioning(2)) for i in range(3)]

    def direction(x_t: Tensor, t: Tensor, c: Conditioning) -> Tensor:
        assert x_t.eq(0).all()
        return torch.tensor([[1.0, 0.0], [0.0, 1.0]]).reshape(2, 2, 1, 1)

    assert math.isnan(probe.cosine(*points[0], direction))
    assert probe.cosine(*points[1], direction) == pytest.approx(1.0)
    assert probe.cosine(*points[2], lambda *p: -direction(*p)) == pytest.approx(-1.0)


# ------------------------------------------------------------------------------------------ declarations


def test_tdm_declares_its_roles():
    config = experiment(TDM, TEACHER, tdm={"fake_scores": "two", "generator_ema_decay": 0.7}).config
    specs = {spec.name: spec for spec in TDM.declare_roles(config)}
    assert list(specs) == ["generator", "generator_ema", "fake", "fake_final"]
    assert [s.trained for s in specs.values()] == [True, False, True, True]
    assert specs["generator_ema"].average == Average("generator", 0.7)
    assert {n: s.exported_as for n, s in specs.items() if s.exported_as} == {
        "generator_ema": "lora",
        "fake": "lora_fake",
    }
    starts = [s.starts_from for s in specs.values()]
    assert starts == ["student_lora", "student_lora", "fake_lora", "fake_lora"]
    assert {s.host for s in specs.values()} == {"student"}
    assert {s.weights for s in specs.values()} == {"full"}


def test_tdm_r1_declares_its_roles():
    surrogate = {"weights": "full", "added_delta": 1.0, "added_delta_exported": 1.6, "reference": "dynamic"}
    surrogate |= {"ema_decay": 0.9, "reference_decay": 0.99}
    config = experiment(TDMR1, TEACHER).config
    config = config.override({"model.roles": "lora"} | {f"surrogate.{k}": v for k, v in surrogate.items()})
    specs = {spec.name: spec for spec in TDMR1.declare_roles(config)}
    assert list(specs) == ["generator", "generator_ema", "fake", "surrogate", "surrogate_ema", "reference"]
    assert [s.name for s in specs.values() if s.trained] == ["generator", "fake", "surrogate"]
    assert [s.host for s in specs.values()] == ["student"] * 3 + ["teacher"] * 3
    assert [s.weights for s in specs.values()] == ["lora"] * 3 + ["full"] * 3
    assert specs["surrogate_ema"].average == Average("surrogate", 0.9)
    assert specs["reference"].average == Average("surrogate", 0.99)
    added = {n: s.added for n, s in specs.items() if s.added}
    once, more = AddedDelta("surrogate_ema", 1.0), AddedDelta("surrogate_ema", 1.6)
    assert added == {"generator": once, "generator_ema": more, "fake": once}
    plain = config.override({"surrogate.added_delta": 0.0, "surrogate.added_delta_exported": None})
    plain = plain.override({"surrogate.reference": "static"})
    specs = {spec.name: spec for spec in TDMR1.declare_roles(plain)}
    assert not any(spec.added for spec in specs.values())
    assert "reference" not in specs


@pytest.mark.parametrize(
    "settings",
    [
        {"surrogate": {"loss": "anchored"}},
        {"surrogate": {"loss": "anchored", "baseline": "reference", "draws": 2}, "tdm": {"teacher_guidance": 2.0}},
        {"surrogate": {"loss": "preference"}, "batch": SMALL | {"trained": 4}},
        {"surrogate": {"loss": "preference", "measured_groups": 9}, "batch": SMALL | {"micro_batch": 5}},
        {"surrogate": {"loss": "preference"}, "batch": SMALL | {"micro_batch": 6}},
        {"tdm": {"fake_scores": "two", "fake_steps": 3}, "sampler": {"steps": 2}},
    ],
)
@pytest.mark.parametrize("kind", [TDM, TDMR1])
def test_what_an_iteration_costs_is_declared(kind, settings: dict):
    found = experiment(kind, TEACHER, **({"batch": SMALL} | settings))
    found.run(1)  # the probe of the diagnostics is there from the second iteration on, as in the declaration
    counts = {False: 0, True: 0}
    real = found.roles._velocity_of

    def counted(transformer):
        velocity = real(transformer)

        def call(x_t, t, c):
            counts[torch.is_grad_enabled()] += len(x_t)
            return velocity(x_t, t, c)

        return call

    found.roles._velocity_of = counted
    metrics = found.run(1)[0]
    declared = kind.evaluations(found.config)
    parts = ["rollout", "fake score", "generator"] + (["surrogate", "diagnostics"] if kind is TDMR1 else [])
    assert list(declared) == sorted(declared, key=parts.index)
    assert set(declared) == set(parts)
    phases = {"rollout", "fake", "generator"} | ({"score", "surrogate"} if kind is TDMR1 else set())
    assert phases <= {name.removeprefix("seconds/") for name in metrics}
    assert counts[True] == sum(part.trained for part in declared.values())
    assert counts[False] == sum(part.frozen for part in declared.values())
    roles = {name: part.role for name, part in declared.items() if part.role}
    expected = {"fake score": "fake", "generator": "generator"} | ({"surrogate": "surrogate"} if kind is TDMR1 else {})
    assert roles == expected
