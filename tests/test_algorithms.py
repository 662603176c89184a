"""TDM and TDM-R1 on the mixture world: fake scores, skipped groups, state, balance, metrics, declarations."""

from __future__ import annotations

import math
import time
from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from mixture_world import (
    NAMES,
    SMALL,
    TEACHER,
    Experiment,
    batch_of,
    conditioning,
    experiment,
    finished,
    gradients,
    reward,
    with_sgd,
)
from tdm_r1.algorithms.metrics import Stopwatch, Sums, mean_of_each
from tdm_r1.algorithms.protocol import Batch
from tdm_r1.algorithms.rollout import Rollout
from tdm_r1.algorithms.settings import BalanceConfig
from tdm_r1.algorithms.tdm import TDM
from tdm_r1.algorithms.tdm_r1 import TDMR1, Balance
from tdm_r1.config.run import validate
from tdm_r1.models.protocol import Conditioning
from tdm_r1.models.specification import AddedDelta, Average, Role


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


def test_groups_without_a_difference_teach_the_surrogate_nothing_and_move_the_averages():
    found = experiment(TDMR1, TEACHER, batch=SMALL)
    with torch.no_grad():
        for p in found.roles.parameters(Role.SURROGATE):
            p.add_(0.5)
    before, ema = gradients(found, Role.SURROGATE), gradients(found, Role.SURROGATE_EMA)
    b = batch_of(24, 6)
    metrics = finished(found.algorithm.step(b), lambda x: torch.full((24,), 21.37))
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
    algorithm.tdm.fit_generator = lambda r, n, part, m: sizes["generator"].append(r) or generator(r, n, part, m)
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


def test_the_surrogate_may_learn_from_fewer_samples_than_the_generator():
    """Its extremes; its accuracy is measured on whole groups all the same."""
    found = experiment(TDMR1, TEACHER, batch=SMALL, surrogate={"trained_share": 0.3})
    learned, measured, moved = [], [], []
    surrogate, tdm = found.algorithm.surrogate, found.algorithm.tdm
    fit, measure, generator = surrogate.fit, surrogate.measure, tdm.fit_generator
    surrogate.fit = lambda r, a, rows, n: learned.append((rows, a)) or fit(r, a, rows, n)
    surrogate.measure = lambda r, a, n, part: measured.append(a) or measure(r, a, n, part)
    tdm.fit_generator = lambda r, n, part, m: moved.append(len(r)) or generator(r, n, part, m)
    found.run(1)
    rows, advantage = learned[0]
    assert len(rows) == 8
    whole = measured[0].reshape(4, 6)
    assert bool((whole != 0).all())
    groups = advantage.reshape(4, 6) != 0
    assert torch.equal(groups, (whole == whole.amax(1, keepdim=True)) | (whole == whole.amin(1, keepdim=True)))
    assert moved == [24]


@pytest.mark.parametrize("loss", ["anchored", "preference"])
def test_the_static_reference_is_asked_once(loss: str):
    """What the KL part has of the teacher is what the surrogate would ask it for: the same update."""
    moved = []
    for known in (True, False):
        found = with_sgd(experiment(TDMR1, TEACHER, batch=SMALL, surrogate={"loss": loss}))
        with torch.no_grad():
            for p in found.roles.parameters(Role.SURROGATE_EMA):
                p.add_(0.3)
        tdm, part = found.algorithm.tdm, found.algorithm.reward_part
        asks, use = [], found.roles.use
        found.roles.use = lambda role, asks=asks, use=use: asks.append(role) or use(role)

        def asked(x_t, t, c, v_teacher, known=known, part=part):
            return part(x_t, t, c, v_teacher if known else None)

        tdm.fit_generator(tdm.roll_out(batch_of(24)), torch.Generator().manual_seed(0), asked)
        moved.append(found.roles.state(Role.GENERATOR))
        assert asks.count(Role.TEACHER) == (1 if known else 2)
    for name, p in moved[0].items():
        torch.testing.assert_close(p, moved[1][name])


@pytest.mark.parametrize("micro_batch", [30, 7])
def test_kl_alone_moves_the_samples_without_reward(micro_batch: int):
    """The reward's part is asked of the first rows alone, and no others are moved by it."""
    grids = {}
    for name in ("rows", "zeros"):
        found = with_sgd(experiment(TDMR1, TEACHER, batch=SMALL | {"micro_batch": micro_batch}))
        tdm, asked = found.algorithm.tdm, []

        def part(x_t: Tensor, t: Tensor, c: Conditioning, v_teacher: Tensor, asked=asked) -> Tensor:
            asked.append(len(x_t))
            return torch.full_like(x_t, 3.0)

        whole = Rollout.join([tdm.roll_out(batch_of(24)), tdm.roll_out(batch_of(6, seed=1))])
        seen = 0

        def masked(x_t: Tensor, t: Tensor, c: Conditioning, v_teacher: Tensor) -> Tensor:
            nonlocal seen
            rows = torch.arange(seen, seen + len(x_t))
            seen += len(x_t)
            return torch.where(rows < 24, 3.0, 0.0).reshape(-1, 1, 1, 1) * torch.ones_like(x_t)

        noise = torch.Generator().manual_seed(4)
        metrics = (
            tdm.fit_generator(whole, noise, part, 24) if name == "rows" else tdm.fit_generator(whole, noise, masked)
        )
        grids[name] = gradients(found, Role.GENERATOR), metrics
        assert sum(asked) == (24 if name == "rows" else 0)
    for n, p in grids["rows"][0].items():
        torch.testing.assert_close(p, grids["zeros"][0][n])
    assert grids["rows"][1]["generator/reward_part"] == pytest.approx(
        grids["zeros"][1]["generator/reward_part"] * 30 / 24
    )


def test_samples_without_reward_are_for_fake_score_and_generator_alone():
    found = experiment(TDMR1, TEACHER, batch=SMALL)
    seen: dict[str, int] = {}
    for name in ("fit_fake", "fit_generator"):
        real = getattr(found.algorithm.tdm, name)
        setattr(
            found.algorithm.tdm, name, lambda r, *a, real=real, name=name: seen.update({name: len(r)}) or real(r, *a)
        )
    fit = found.algorithm.surrogate.fit
    found.algorithm.surrogate.fit = lambda r, *a: seen.update(surrogate=len(r)) or fit(r, *a)
    b, more = batch_of(24, 6), batch_of(5, seed=1)
    finished(found.algorithm.step(replace(b, kl=more.conditioning, kl_x_1=more.x_1)), reward)
    assert seen == {"surrogate": 24, "fit_fake": 29, "fit_generator": 29}


def _first_batch(found: Experiment) -> Batch:
    noise = torch.Generator().manual_seed(0)
    return Batch(conditioning(24), torch.randn(24, 2, 1, 1, generator=noise), 6, noise)


@pytest.mark.parametrize("kind", NAMES, ids=lambda kind: kind.__name__)
def test_an_algorithm_goes_on_from_its_state(kind):
    settings = {"balance": {"policy": "ratio", "rate": 0.5}, "batch": SMALL, "tdm": {"fake_scores": "two"}}
    settings |= {"dgpo": {"time_low": 0.0}}
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


def test_the_controller_moves_slowly_towards_the_ratio_and_stays_in_bounds():
    config = BalanceConfig(policy="ratio", scale=4.0, ratio=2.0, rate=0.1, bounds=(3.5, 5.0))
    balance = Balance(config)
    balance.update(1.0, 1.0, -1.0)  # 1:1, wanted 2:1
    assert balance.scale == pytest.approx(4.0 * math.exp(0.1 * math.log(2)))
    balance.update(1.0, 100.0, -1.0)
    balance.update(1.0, 100.0, -1.0)
    balance.update(1.0, 100.0, -1.0)
    assert balance.scale == 5.0
    assert one_step(1.0, 1e6) == pytest.approx(4.0 * math.exp(0.1))  # by at most the rate, either way
    assert one_step(1.0, 1e-6) == pytest.approx(4.0 * math.exp(-0.1))
    assert one_step(3.0, 1.0) == pytest.approx(4.0 * math.exp(0.1 * math.log(2 / 3)))
    for _ in range(9):
        balance.update(1.0, 1e-9, -1.0)
    assert balance.scale == 3.5
    before = balance.scale
    balance.update(0.0, 1.0, -1.0)  # nothing to weigh
    assert balance.scale == before
    fixed = Balance(BalanceConfig(scale=4.0, limit=None))
    fixed.update(1.0, 50.0, -1.0)
    assert fixed.scale == 4.0


def one_step(reward_part: float, kl_part: float) -> float:
    balance = Balance(BalanceConfig(policy="ratio", scale=4.0, ratio=2.0, rate=0.1, bounds=(0.1, 50.0)))
    balance.update(reward_part, kl_part, -1.0)
    return balance.scale


def test_a_controlled_scale_goes_on_unless_another_start_is_set():
    saved = Balance(BalanceConfig(policy="ratio", scale=4.0))
    saved.controller.value = 7.0
    for config, expected in (
        (BalanceConfig(policy="ratio", scale=4.0), 7.0),
        (BalanceConfig(policy="ratio", scale=5.0), 5.0),
        (BalanceConfig(policy="fixed", scale=4.0), 4.0),
    ):
        balance = Balance(config)
        balance.load_state(saved.state())
        assert balance.scale == expected


def test_the_balance_ignores_what_is_no_number_and_a_limit_beside_a_ratio():
    limited, ratio = Balance(BalanceConfig(limit=0.1)), Balance(BalanceConfig(policy="ratio", scale=4.0, limit=0.1))
    limited.update(1.0, 1.0, -0.5)
    assert limited.strength == pytest.approx(math.exp(-0.1))
    bad = ((math.nan, 1.0, -1.0), (math.inf, 1.0, -1.0), (1.0, math.nan, -1.0), (1.0, 1.0, math.nan), (0.0, 1.0, -1.0))
    for parts in bad:
        before = limited.strength, ratio.scale
        limited.update(*parts)
        ratio.update(*parts)
        assert (limited.strength, ratio.scale) == before
    ratio.update(1.0, 2.0, -1.0)
    assert ratio.strength == 1.0


def test_the_limit_is_of_what_opposes_the_kl_part():
    """A part of 0.3 with a cosine of -0.5 opposes by 0.15; one that points the KL part's way is not weakened."""
    balance = Balance(BalanceConfig(scale=8.0, limit=0.12))
    balance.update(0.3, 1.0, -0.5)
    assert balance.strength == pytest.approx((0.12 / 0.15) ** 0.1)
    assert balance.scale == pytest.approx(8.0 * balance.strength)
    balance.update(0.3, 1.0, -0.4)  # just at the limit
    assert balance.strength == pytest.approx((0.12 / 0.15) ** 0.1)
    balance.update(5.0, 1.0, 0.9)
    assert balance.strength == 1.0


def test_the_limit_weakens_the_reward_while_its_part_is_too_large_and_lets_it_recover():
    settings = {"batch": SMALL, "surrogate": {"ema_decay": 0.0}}
    far = experiment(TDMR1, TEACHER, balance={"scale": 3.0, "limit": 1e-30}, **settings)
    rows = far.run(3)
    weaker = [math.exp(-0.1 * k) for k in (1, 2, 3)]
    assert [row["generator/reward_strength"] for row in rows] == pytest.approx(weaker)
    assert [row["generator/reward_scale"] for row in rows] == pytest.approx([3 * w for w in weaker])
    near = experiment(TDMR1, TEACHER, balance={"scale": 3.0, "limit": 1e9}, **settings)
    near.algorithm.load_state(far.algorithm.state())
    assert near.algorithm.balance.strength == far.algorithm.balance.strength < 1
    assert near.run(4)[-1]["generator/reward_strength"] == 1.0
    free = experiment(TDMR1, TEACHER, balance={"scale": 3.0}, **settings)
    free.algorithm.load_state(far.algorithm.state())  # the limit is taken away: all of it again
    assert free.algorithm.balance.strength == 1.0


def test_a_balance_of_before_there_was_a_limit_goes_on():
    balance = Balance(BalanceConfig(policy="ratio", scale=4.0))
    balance.load_state({"scale": 7.0, "start": 4.0})
    assert balance.scale == 7.0


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


def test_the_surrogates_weights_are_its_own_setting_unless_every_role_is_full():
    for roles, weights, expected in (("lora", "lora", "lora"), ("lora", "full", "full"), ("full", "lora", "full")):
        config = validate({"model": {"roles": roles}, "surrogate": {"weights": weights, "added_delta": 0.0}})
        specs = {spec.name: spec for spec in TDMR1.declare_roles(config)}
        assert specs[Role.SURROGATE].weights == specs[Role.SURROGATE_EMA].weights == expected
        assert specs[Role.GENERATOR].weights == specs[Role.FAKE].weights == roles


@pytest.mark.parametrize(
    "settings",
    [
        {"surrogate": {"loss": "anchored"}},
        {"surrogate": {"loss": "anchored", "baseline": "reference", "draws": 2}, "tdm": {"teacher_guidance": 2.0}},
        {"surrogate": {"loss": "preference"}, "batch": SMALL | {"trained": 4}},
        {"surrogate": {"loss": "preference", "measured_groups": 9}, "batch": SMALL | {"micro_batch": 5}},
        {"surrogate": {"loss": "preference"}, "batch": SMALL | {"micro_batch": 6}},
        {"surrogate": {"trained_share": 1.0, "reference": "fake"}},
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
    if kind is TDMR1:
        assert metrics["generator/reward_scale"] == found.algorithm.balance.scale
    phases = {"rollout", "fake", "generator"} | ({"surrogate"} if kind is TDMR1 else set())
    assert phases <= {name.removeprefix("seconds/") for name in metrics}
    assert counts[True] == sum(part.trained for part in declared.values())
    assert counts[False] == sum(part.frozen for part in declared.values())
    roles = {name: part.role for name, part in declared.items() if part.role}
    expected = {"fake score": "fake", "generator": "generator"} | ({"surrogate": "surrogate"} if kind is TDMR1 else {})
    assert roles == expected
