"""The reward layer: contracts, sums, what stops a run, worker processes."""

from __future__ import annotations

import math
import multiprocessing
import os
import signal
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from pebble import ProcessFuture

from reward_examples import (
    IMAGES,
    METADATA,
    PROMPTS,
    SCORES,
    TEXTS,
    dies_loading,
    exits,
    here,
    loads_for_ever,
    loads_once,
    raises,
    refuses,
    scored_twice,
)
from tdm_r1.errors import UserError
from tdm_r1.rewards.registry import load_reward
from tdm_r1.rewards.scorer import Scorer, Term, Watch, parse
from tdm_r1.rewards.scores import Scores, attempt, checked, joined
from tdm_r1.rewards.settings import ScoringConfig
from tdm_r1.rewards.workers import Workers

pytestmark = pytest.mark.slow

# ------------------------------------------------------------------------------------------ contract


def test_users_own_reward(tmp_path: Path):
    path = tmp_path / "mine.py"
    path.write_text("def brightness(images, prompts, metadata):\n    return images.mean((1, 2, 3)) / 255\n")
    assert load_reward(f"{path}:brightness")(IMAGES, TEXTS, METADATA).tolist() == pytest.approx(SCORES)
    with pytest.raises(ValueError, match="has no function 'darkness'; it has: brightness"):
        load_reward(f"{path}:darkness")


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ([None, 0.5, 1], [math.nan, 0.5, 1.0]),
        (np.array([math.inf, -math.inf, 2.0]), [math.nan, math.nan, 2.0]),
        (np.array([1e39, -1e39, 3e38]), [math.nan, math.nan, 3e38]),  # training is in float32
        (torch.tensor([1.0, math.nan, 2.0], dtype=torch.bfloat16), [1.0, math.nan, 2.0]),
        (torch.ones(3, requires_grad=True) * 2, [2.0, 2.0, 2.0]),
        (list(torch.tensor([1.0, 2.0, 3.0], dtype=torch.bfloat16)), [1.0, 2.0, 3.0]),
        ([torch.tensor([1.0]), torch.tensor([2.0]), torch.tensor([3.0])], [1.0, 2.0, 3.0]),
        (np.array([[1.0], [2.0], [3.0]]), [1.0, 2.0, 3.0]),
        ((v for v in (1.0, None, 3.0)), [1.0, math.nan, 3.0]),
        (([1.0, 2.0, 3.0], {}), [1.0, 2.0, 3.0]),  # Flow-GRPO's form
        ([True, False, True], [1.0, 0.0, 1.0]),
        (np.array([1.0, 2.0, 3.0], dtype=np.float16), [1.0, 2.0, 3.0]),
        (["0.5", "1", "nan"], [0.5, 1.0, math.nan]),
        (Scores(np.array([1.0, math.nan, 3.0]), {"a": np.array([0.0, 1.0, 2.0])}), [1.0, math.nan, 3.0]),
    ],
)
def test_missing_scores_are_nan(given, expected: list[float]):
    np.testing.assert_array_equal(checked(given, 3).values, expected)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([0.0, 1.0], r"scores of shape \(2,\) for 3 images"),
        (0.5, r"scores of shape \(\) for 3 images"),
        ({"a": [1.0, 2.0, 3.0]}, "returned a dict of a: return one score for each image"),
        ([[1.0, 2.0]] * 3, r"scores of shape \(3, 2\) for 3 images"),
        (Scores(np.zeros(3), {"a": np.zeros(2)}), r"values of the part 'a' of shape \(2,\) for 3 images"),
    ],
)
def test_broken_contracts_say_how(given, message: str):
    with pytest.raises(ValueError, match=message):
        checked(given, 3)


def test_an_async_reward_is_refused():
    async def scores(images, prompts, metadata):
        return [0.0] * len(images)

    assert "is an async function" in attempt(scores, IMAGES, TEXTS, METADATA).failures[0]


def test_a_reward_that_writes_into_its_images_changes_them_for_nobody():
    def darkens(images, prompts, metadata):
        images[:] = 0
        return images.mean((1, 2, 3))

    before = IMAGES.copy()
    assert not attempt(darkens, IMAGES, TEXTS, METADATA).values.any()
    np.testing.assert_array_equal(IMAGES, before)


def test_what_goes_wrong_costs_its_scores_and_is_told():
    scores = attempt(raises, IMAGES, TEXTS, METADATA)
    assert np.isnan(scores.values).all()
    assert len(scores.failures) == 1
    assert scores.failures[0].startswith("RuntimeError: out of memory (reward_examples.py:")
    assert attempt(exits, IMAGES, TEXTS, METADATA).failures[0].startswith("SystemExit: 3")
    with pytest.raises(UserError, match="no target"):  # wrong input is not a failure that passes
        attempt(refuses, IMAGES, TEXTS, METADATA)


def test_chunks_are_joined_in_order():
    a = Scores(np.array([1.0]), {"p": np.array([5.0])}, ("slow",))
    b = Scores(np.array([2.0, math.nan]), {}, ("slow", "dead"))
    both = joined([a, b])
    np.testing.assert_array_equal(both.values, [1.0, 2.0, math.nan])
    np.testing.assert_array_equal(both.parts["p"], [5.0, math.nan, math.nan])
    assert both.failures == ("slow", "dead")


# ------------------------------------------------------------------------------------------ sums


def test_sums_are_parsed():
    assert parse("ocr") == [Term("ocr", 1.0)]
    assert parse("ocr + 0.5*a.py:f + -2e-1 * http://x:1/+y") == [
        Term("ocr", 1.0),
        Term("a.py:f", 0.5),
        Term("http://x:1/+y", -0.2),
    ]
    for wrong, message in (("ocr + ", "is not a reward"), ("ocr + 2*ocr", "names 'ocr' twice")):
        with pytest.raises(UserError, match=message):
            parse(wrong)


def test_a_weighted_sum_and_its_breakdown():
    scorer = Scorer(f"{here('brightness')} + -0.5*jpeg_incompressibility", ScoringConfig())
    scores = scorer(IMAGES, PROMPTS)
    jpeg = np.array(load_reward("jpeg_incompressibility")(IMAGES, TEXTS, METADATA))
    np.testing.assert_allclose(scores.values, np.array(SCORES) - 0.5 * jpeg)
    np.testing.assert_allclose(scores.parts["jpeg_incompressibility"], jpeg)
    assert list(scores.parts) == [here("brightness"), "jpeg_incompressibility"]


def test_a_sample_that_lacks_a_term_lacks_the_sum():
    scorer = Scorer(f"{here('brightness')} + {here('raises')}", ScoringConfig())
    scores = scorer(IMAGES, PROMPTS)
    assert np.isnan(scores.values).all()
    np.testing.assert_allclose(scores.parts[here("brightness")], SCORES)
    assert scores.failures[0].startswith(here("raises"))


def test_normalised_sums_ignore_each_rewards_unit():
    """Scale and offset of a term play no part; a group without spread adds nothing; missing stays missing."""
    a, b = np.array([1.0, 2.0, 3.0, 7.0, 7.0, 7.0]), np.array([0.3, 0.1, math.nan, 4.0, 5.0, 6.0])
    scorer = Scorer(f"{here('brightness')} + 2*{here('raises')}", ScoringConfig(normalize="group"))
    total = scorer.total([Scores(a), Scores(b)], group_size=3).values
    np.testing.assert_allclose(total, scorer.total([Scores(1000 * a - 3), Scores(b / 7)], group_size=3).values)
    z = math.sqrt(1.5)
    np.testing.assert_allclose(total, [-z + 2, 0 - 2, math.nan, -2 * z, 0, 2 * z], atol=1e-12)
    np.testing.assert_allclose(scorer.total([Scores(a), Scores(b)]).values, a + 2 * b)  # no groups: raw
    missing = scorer.total([Scores(np.array([math.nan] * 3)), Scores(b[3:])], group_size=3).values
    np.testing.assert_array_equal(missing, [math.nan] * 3)


# ------------------------------------------------------------------------------------------ watching


def nothing(n: int = 4) -> Scores:
    return Scores(np.full(n, math.nan), {}, ("the server is gone",))


def test_a_reward_that_never_scores_stops_the_run_at_once():
    with pytest.raises(UserError, match=r"no score at all for 1 batch.*the server is gone"):
        Watch()(nothing(), 2)


def test_outages_are_survived_unless_they_last():
    watch = Watch()
    watch(Scores(np.arange(4.0)), 2)
    for _ in range(5):
        watch(nothing(), 2)
        watch(nothing(), 2)
        watch(Scores(np.array([math.nan, 1.0, 2.0, 3.0])), 2)
    watch(nothing(), 2)
    watch.require_any(nothing())
    with pytest.raises(UserError, match="for 3 batch"):
        watch.require_any(nothing())


def test_a_reward_without_differences_stops_the_run():
    watch = Watch()
    flat = Scores(np.array([1.0, 1.0, 0.0, math.nan]))  # groups differ, samples of a group do not
    for _ in range(9):
        watch(flat, 2)
    with pytest.raises(UserError, match=r"in 10 batches \(between 0 and 1"):
        watch(flat, 2)
    watch = Watch()
    for _ in range(9):
        watch(Scores(0.5 + 1e-9 * np.arange(4.0)), 2)
    with pytest.raises(UserError, match="identical scores"):  # rounding tells nothing, nor do groups without a score
        watch(Scores(np.array([math.nan, math.nan, 0.5, 0.5 + 1e-9])), 2)
    watch = Watch()
    for _ in range(9):
        watch(Scores(np.full(48, np.float32(21.37), dtype=np.float64)), 24)
    with pytest.raises(UserError, match="identical scores"):  # as the advantages have it
        watch(Scores(np.full(48, np.float32(20.7), dtype=np.float64)), 24)
    watch = Watch()
    watch(Scores(np.arange(4.0)), 2)
    for _ in range(20):  # once it told something, saturation is no mistake
        watch(flat, 2)


# ------------------------------------------------------------------------------------------ worker processes


@pytest.mark.parametrize(
    ("name", "lost", "told"),
    [
        ("brightness", [], []),
        ("dies_on_two", [2, 3], ["the worker process died"]),
        ("hangs_on_three", [2, 3], ["no score within 2 seconds"]),
    ],
)
def test_workers_keep_order_and_lose_only_the_chunk(name: str, lost: list[int], told: list[str]):
    workers = Workers(here(name), load_reward, processes=2, timeout=2.0, chunk=2)
    scores, again = scored_twice(workers)
    expected = np.array([math.nan if i in lost else s for i, s in enumerate(SCORES)])
    np.testing.assert_allclose(scores.values, expected)
    assert len(scores.failures) == len(told)
    assert all(why in failure for why, failure in zip(told, scores.failures, strict=True))
    np.testing.assert_allclose(again.values, SCORES[:2])  # the pool goes on


def test_workers_say_why_a_reward_cannot_be_loaded():
    workers = Workers(here("nobody"), load_reward, processes=1, timeout=5.0, chunk=6)
    try:
        with pytest.raises(UserError, match=r"could not be loaded: .*has no function 'nobody'"):
            workers(IMAGES, TEXTS, METADATA)
    finally:
        workers.close()


def test_a_worker_that_dies_between_batches_is_replaced():
    workers = Workers(here("dies_between_batches"), load_reward, processes=1, timeout=20.0, chunk=6)
    try:
        np.testing.assert_allclose(workers(IMAGES, TEXTS, METADATA).values, SCORES)
        end = time.monotonic() + 60
        while workers.pool.active and time.monotonic() < end:
            time.sleep(0.05)  # until the pool has noticed
        np.testing.assert_allclose(workers(IMAGES, TEXTS, METADATA).values, SCORES)
    finally:
        workers.close()


def test_a_replacement_that_cannot_be_loaded_costs_samples_not_the_run(tmp_path: Path):
    workers = Workers(str(tmp_path / "loaded"), loads_once, processes=1, timeout=20.0, chunk=2)
    scores, again = scored_twice(workers, (tmp_path / "loaded").unlink)  # mended
    np.testing.assert_allclose(scores.values, [*SCORES[:2], *[math.nan] * 4])
    assert [why.split(":")[0] for why in scores.failures] == [
        "the worker process died (exit code -9)",
        "a new worker could not load the reward",
    ]
    np.testing.assert_allclose(again.values, SCORES[:2])


@pytest.mark.parametrize(
    ("load", "patience", "why"),
    [
        (loads_for_ever, 2.0, "no worker was ready within 4 seconds"),
        (dies_loading, 60.0, "died before they had anything to score"),
    ],
)
def test_loading_that_hangs_or_dies_is_told(load, patience: float, why: str):
    workers = Workers("x", load, processes=1, timeout=1.0, chunk=3, load_timeout=patience)
    try:
        scores = workers(IMAGES, TEXTS, METADATA)
        with pytest.raises(UserError, match="could not be loaded"):
            workers.start()
    finally:
        workers.close()
    assert np.isnan(scores.values).all()
    assert why in scores.failures[0]


def test_a_chunk_is_given_to_other_workers_where_the_idle_ones_had_died():
    """The pool hears of a death a moment later than the next batch may come."""
    workers = Workers(here("brightness"), load_reward, processes=1, timeout=20.0, chunk=2)
    try:
        workers.start()
        (worker,) = multiprocessing.active_children()
        os.kill(worker.pid, signal.SIGKILL)
        scores = workers(IMAGES, TEXTS, METADATA)
    finally:
        workers.close()
    np.testing.assert_allclose(scores.values, SCORES)
    assert scores.failures == ()


def test_a_chunk_that_died_with_its_worker_unseen_is_scored_again(monkeypatch: pytest.MonkeyPatch):
    """A worker may die between taking a chunk and saying so: the pool then believes for ever that it waits."""
    monkeypatch.setattr("tdm_r1.rewards.workers.PROBE_AFTER", 0.2)
    workers = Workers(here("brightness"), load_reward, processes=1, timeout=20.0, chunk=2)
    schedule, lost = workers._schedule, [ProcessFuture()]

    def unseen(work, *args):
        task = schedule(work, *args)
        return replace(task, future=lost.pop()) if lost else task

    monkeypatch.setattr(workers, "_schedule", unseen)
    try:
        scores = workers(IMAGES, TEXTS, METADATA)
    finally:
        workers.close()
    np.testing.assert_allclose(scores.values, SCORES)


def test_batches_are_scored_at_once_where_no_reward_is_in_this_process():
    assert Scorer(here("brightness"), ScoringConfig()).parallel == 1
    assert Scorer(here("brightness"), ScoringConfig(workers=3)).parallel == 3
    assert Scorer("mini", ScoringConfig(workers=3), reward=raises).parallel == 1
    assert Scorer("http://127.0.0.1:1", ScoringConfig(workers=2)).parallel == 2
