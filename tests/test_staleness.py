"""Runs that score a batch while they learn from the one before it (`scoring.staleness`)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from threading import Event, Timer
from time import sleep

import pytest
import torch

from tdm_r1.config.run import RunConfig
from tdm_r1.errors import UserError
from tdm_r1.models.specification import Role
from tdm_r1.train.run import Run

pytestmark = pytest.mark.slow

Make = Callable[..., RunConfig]
STALE = {"scoring": {"staleness": 1}, "model": {"device": "cpu"}}  # a GPU's sums have no order


def weights(run: Run) -> torch.Tensor:
    """Those of everything that learns, in one row."""
    roles = (Role.GENERATOR, Role.FAKE, Role.SURROGATE, Role.SURROGATE_EMA)
    return torch.cat([p.detach().flatten() for role in roles for p in run.roles.state(role).values()])


def test_samples_come_from_the_weights_before_the_last_update(tiny_config: Make):
    make = partial(tiny_config, iterations=3, save_every=3)
    stale, fresh, by_hand = Run(make(**STALE)), Run(make(model={"device": "cpu"})), Run(make(model={"device": "cpu"}))
    for run in (stale, fresh):
        run.step()
    assert torch.equal(weights(stale), weights(fresh))
    for run in (stale, fresh):
        run.step()
        run.step()
    halves = by_hand.iterations
    first, second = halves.begin(0), halves.begin(1)
    halves.finish(first)
    third = halves.begin(2)
    halves.finish(second)
    halves.finish(third)
    assert torch.equal(weights(stale), weights(by_hand))
    assert not torch.equal(weights(stale), weights(fresh))


@pytest.mark.parametrize("staleness", [0, 1])
def test_a_batch_is_scored_while_the_one_before_it_is_learned_from(staleness: int, tiny_config: Make):
    learned, batches = Event(), []

    def reward(images, prompts, metadata):
        batches.append(len(images))
        if len(batches) == 2 and not learned.wait(30 if staleness else 0.1):
            raise TimeoutError("the run waits for this score before it learns")
        return images.mean((1, 2, 3))

    run = Run(tiny_config(iterations=3, save_every=3, scoring={"staleness": staleness}), reward=reward)
    finish = run.iterations.finish

    def finish_and_tell(begun):
        metrics = finish(begun)
        if begun.number == 0 and staleness:
            learned.set()
        return metrics

    run.iterations.finish = finish_and_tell  # type: ignore[method-assign]
    missing = [run.step()["reward/missing"] for _ in range(3)]
    assert missing == [0, 0 if staleness else 12, 0]
    assert run.scored == 36


def test_nothing_is_under_way_at_a_checkpoint_so_that_resume_is_exact(tiny_config: Make):
    make = partial(tiny_config, iterations=5, save_every=3, evaluation={"every": 0, "prompts": 2}, **STALE)
    straight, first = Run(make(name="straight")), Run(make(name="broken"))
    straight.fit()
    first.open()
    under_way = []
    for _ in range(3):
        first.step()
        under_way.append(first.ahead is not None)
    first.save()
    first.step()  # lost
    first.close()
    assert under_way == [True, True, False]
    assert first.ahead is None
    resumed = Run(make(name="broken"))
    resumed.fit(resume=True)
    assert torch.equal(weights(straight), weights(resumed))
    assert straight.scored == resumed.scored == 60


def test_what_has_been_begun_is_given_up_at_the_end(tiny_config: Make):
    go_on, calls = Event(), []

    def reward(images, prompts, metadata):
        calls.append(len(images))
        if len(calls) > 3:
            assert go_on.wait(30)
        return images.mean((1, 2, 3))

    run = Run(tiny_config(iterations=3, save_every=3, batch={"micro_batch": 4}, **STALE), reward=reward)
    run.step()
    assert run.ahead is not None
    Timer(0.2, go_on.set).start()
    run.close()
    assert run.ahead is None
    assert len(calls) == 4  # three of the first batch, and the one of the next that was being scored
    assert run.scored == 12


def test_an_algorithm_without_scores_is_never_ahead(tiny_config: Make):
    run = Run(tiny_config(algorithm="tdm", iterations=3, save_every=3, batch={"group": 1}, **STALE))
    run.step()
    assert run.ahead is None
    assert run.algorithm.optimizers[Role.GENERATOR].updates == 1


def test_a_checkpoint_in_between_is_gone_on_from_exactly(tiny_config: Make):
    run, again = (Run(tiny_config(iterations=4, save_every=4, **STALE)) for _ in range(2))
    run.open()
    run.step()
    assert run.ahead is not None
    run.save()
    again.load(run.checkpoints()[-1])
    for either in (run, again):
        either.step()
        either.step()
    assert torch.equal(weights(run), weights(again))


@pytest.mark.parametrize("staleness", [0, 1])
def test_after_an_error_nothing_is_scored_any_more(staleness: int, tiny_config: Make):
    calls: list[int] = []

    def reward(images, prompts, metadata):
        calls.append(len(images))
        if len(calls) == 4:
            raise UserError("the licence has run out")
        if len(calls) > 4:
            sleep(0.2)
        return images.mean((1, 2, 3))

    settings = {"batch": {"micro_batch": 4}, "scoring": {"staleness": staleness}}
    run = Run(tiny_config(iterations=3, save_every=3, **settings), reward=reward)
    run.step()
    with pytest.raises(UserError, match="run out"):
        run.step()
    run.close()
    at_the_end = len(calls)
    run.scoring.background.submit(len, ()).result()  # after all that was waiting
    assert len(calls) == at_the_end


def test_what_has_been_begun_is_given_up_if_the_next_cannot_begin(tiny_config: Make, monkeypatch):
    run = Run(tiny_config(iterations=3, save_every=3, **STALE))
    first = run.iterations.begin(0)
    run.ahead = first
    monkeypatch.setattr(run.backbone, "decode", lambda latents: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run.step()
    assert first.pending is not None
    assert all(future.done() for future in first.pending.futures)
    assert run.iteration == 0
