"""The surrogate: its losses and gradients written out, its reference, its diagnostics."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from mixture_world import SMALL, TEACHER, Mixture, batch_of, conditioning, experiment, gradients, with_sgd
from tdm_r1.algorithms.rollout import Draw
from tdm_r1.algorithms.surrogate import Probe, preference_accuracy, whole_groups
from tdm_r1.algorithms.tdm_r1 import TDMR1
from tdm_r1.core import flow, losses
from tdm_r1.models.protocol import Conditioning
from tdm_r1.models.specification import Role

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
    draw = phi.draw(rollout, torch.Generator().manual_seed(5), 6).all()
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


@pytest.mark.parametrize("shared_noise", [True, False])
def test_the_surrogate_draws_at_its_noise_levels_one_for_each_group_or_sample(shared_noise: bool):
    config = {"shared_noise": shared_noise, "time_range": (0.4, 0.6), "points": "final"}
    found = experiment(TDMR1, TEACHER, batch=SMALL, surrogate=config)
    surrogate, drawn = found.algorithm.surrogate, []
    draw = surrogate.draw
    surrogate.draw = lambda *args: drawn.append(draw(*args)) or drawn[-1]
    rollout = found.algorithm.tdm.roll_out(batch_of(24))
    surrogate.fit(rollout, torch.linspace(-1, 1, 24), torch.arange(24), torch.Generator().manual_seed(0))
    (t,) = (d.t for d in drawn)
    assert ((t > 0.4) & (t < 0.6)).all()
    assert len(t.unique()) == (4 if shared_noise else 24)


@pytest.mark.parametrize("baseline", ["reference", "fake"])
def test_the_implicit_reward_is_how_much_better_phi_explains_a_sample(baseline: str):
    """l(base) - l(base + phi - ref), with what the targets start from as base."""
    found = experiment(TDMR1, TEACHER, surrogate={"loss": "anchored", "baseline": baseline, "reference": "static"})
    with torch.no_grad():
        for role, change in ((Role.SURROGATE_EMA, 0.1), (Role.FAKE, -0.2)):
            for p in found.roles.parameters(role):
                p.add_(change)
    surrogate, rollout = found.algorithm.surrogate, found.algorithm.tdm.roll_out(batch_of(5))
    drawn = surrogate.draw(rollout, torch.Generator().manual_seed(0), 1)
    draw = drawn.all()

    def velocity_of(role: Role) -> Tensor:
        with torch.no_grad(), found.roles.use(role) as velocity:
            return velocity(draw.x_t, draw.t, conditioning(5))

    phi, ref = velocity_of(Role.SURROGATE_EMA), velocity_of(Role.TEACHER)
    base = ref if baseline == "reference" else velocity_of(Role.FAKE)
    l_base, l_phi = (losses.denoising(v, draw.x_t, draw.eps, draw.s, draw.t) for v in (base, base + phi - ref))
    torch.testing.assert_close(surrogate._implicit_reward(rollout, drawn, torch.arange(5)), l_base - l_phi)


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


def test_the_probe_keeps_its_first_points_also_over_a_resume():
    probe, resumed = Probe(), Probe()
    points = [(torch.full((2, 2, 1, 1), float(i)), torch.zeros(2), conditioning(2)) for i in range(3)]

    def direction(x_t: Tensor, t: Tensor, c: Conditioning) -> Tensor:
        assert x_t.eq(0).all()
        return torch.tensor([[1.0, 0.0], [0.0, 1.0]]).reshape(2, 2, 1, 1)

    resumed.load_state(probe.state(), torch.device("cpu"))  # of a run that has not measured yet
    assert probe.cosines(lambda: points[0], direction).isnan().tolist() == [True, True]
    assert probe.cosines(lambda: points[1], direction).tolist() == pytest.approx([1.0, 1.0])
    resumed.load_state(probe.state(), torch.device("cpu"))
    for each in (probe, resumed):
        assert each.cosines(lambda: points[2], lambda *p: -direction(*p)).tolist() == pytest.approx([-1.0, -1.0])


def test_the_target_is_scaled_by_kappa():
    """Phi's first gradient is in proportion to kappa: at phi = ref the residual is the target alone."""
    moved = {}
    for value in (1.0, 0.25):
        surrogate = {"loss": "anchored", "draws": 1, "kappa": value}
        one = with_sgd(experiment(TDMR1, TEACHER, batch=SMALL, surrogate=surrogate))
        before = gradients(one, Role.SURROGATE)
        one.run(1)
        moved[value] = {n: p - before[n] for n, p in gradients(one, Role.SURROGATE).items()}
    for n, change in moved[1.0].items():
        assert float(change.abs().max()) > 1e-4
        torch.testing.assert_close(0.25 * change, moved[0.25][n], atol=1e-6, rtol=1e-3)


def test_one_pair_is_ordered_rightly_or_not():
    advantage = torch.tensor([1.0, -1.0])
    assert preference_accuracy(torch.tensor([0.2, 0.1]), advantage, 2) == 1
    assert preference_accuracy(torch.tensor([0.1, 0.2]), advantage, 2) == 0


def test_a_group_of_which_one_sample_is_used_comes_first():
    rows, group = torch.tensor([0, 4, 5]), torch.tensor([0, 1, 1])
    assert [part.tolist() for part in whole_groups(rows, group, 2)] == [[0], [4, 5]]
    assert [part.tolist() for part in whole_groups(rows, group, 3)] == [[0, 4, 5]]
    assert whole_groups(rows, group, 1) is None
