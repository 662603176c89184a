"""Rewards in Ray actors fail as those in worker processes do (`test_rewards.py`)."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from reward_examples import (
    IMAGES,
    METADATA,
    PROMPTS,
    SCORES,
    TEXTS,
    dies_loading,
    here,
    loads_for_ever,
    loads_once,
    scored_twice,
)
from tdm_r1.config.load import load_recipe
from tdm_r1.errors import UserError
from tdm_r1.rewards.ray_actors import RayActors
from tdm_r1.rewards.registry import load_reward
from tdm_r1.rewards.scorer import Scorer
from tdm_r1.rewards.settings import ScoringConfig
from tdm_r1.train.build import task_and_scorer

ray = pytest.importorskip("ray")
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::ResourceWarning")]
EXAMPLES = {"env_vars": {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])}}


def test_an_environment_of_no_reward_is_refused():
    scoring = {"backend": "ray", "workers": 1, "environments": {"hpsv3": {"pip": ["hpsv3"]}}}
    with pytest.raises(UserError, match=r"scoring.environments has 'hpsv3': the reward is made of mini"):
        task_and_scorer(load_recipe("mini").override({"scoring": scoring}))


def test_an_address_without_ray_is_named():
    config = ScoringConfig(backend="ray", workers=1, ray_address="auto")
    with pytest.raises(UserError, match=r"scoring.ray_address = 'auto': no Ray answers there"):
        RayActors(here("brightness"), load_reward, config, {})(IMAGES, TEXTS, METADATA)


def test_a_run_may_have_a_ray_of_its_own():
    scorer = Scorer("jpeg_compressibility", ScoringConfig(backend="ray", workers=1))
    try:
        with ThreadPoolExecutor(1) as thread:  # a run's first batch is scored in one that ends
            thread.submit(scorer, IMAGES, PROMPTS).result()
        time.sleep(1)
        scores = scorer(IMAGES, PROMPTS)
    finally:
        scorer.close()
    assert ray.is_initialized()
    ray.shutdown()
    np.testing.assert_array_equal(
        scores.values, Scorer("jpeg_compressibility", ScoringConfig())(IMAGES, PROMPTS).values
    )


@pytest.fixture(scope="module")
def local_ray() -> Iterator[None]:
    """One Ray for all: it takes seconds to start."""
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


def actors(name: str, *, load=load_reward, workers: int = 1, timeout: float = 20.0, chunk: int = 2, patience=60.0):
    config = ScoringConfig(backend="ray", workers=workers, timeout=timeout, chunk=chunk, load_timeout=patience)
    return RayActors(name, load, config, EXAMPLES)


@pytest.mark.parametrize(
    ("name", "lost", "told"),
    [
        ("dies_on_two", [2, 3], ["the actor died"]),
        ("hangs_on_three", [2, 3], ["no score within 2 seconds"]),
        ("raises", range(6), ["RuntimeError: out of memory"]),
    ],
)
def test_actors_keep_order_and_lose_only_the_chunk(local_ray: None, name: str, lost: list[int], told: list[str]):
    reward = actors(here(name), workers=2, timeout=2.0)
    scores, again = scored_twice(reward)
    expected = np.array([math.nan if i in lost else s for i, s in enumerate(SCORES)])
    np.testing.assert_allclose(scores.values, expected)
    assert len(scores.failures) == len(told)
    assert all(why in failure for why, failure in zip(told, scores.failures, strict=True))
    np.testing.assert_allclose(again.values, SCORES[:2] if 0 not in lost else [math.nan] * 2)


def test_an_actor_that_dies_between_batches_is_replaced(local_ray: None):
    reward = actors(here("dies_between_batches"), chunk=6)
    try:
        for _ in range(2):
            np.testing.assert_allclose(reward(IMAGES, TEXTS, METADATA).values, SCORES)
            time.sleep(1)  # it dies meanwhile
        np.testing.assert_allclose(reward(IMAGES, TEXTS, METADATA).values, SCORES)
    finally:
        reward.close()


def test_a_user_error_of_the_reward_ends_the_run(local_ray: None):
    reward = actors(here("refuses"))
    try:
        with pytest.raises(UserError, match="prompt 0 has no target"):
            reward(IMAGES, TEXTS, METADATA)
    finally:
        reward.close()


def test_a_reward_that_cannot_be_loaded_ends_the_run(local_ray: None):
    reward = actors(here("nobody"))
    try:
        with pytest.raises(UserError, match=r"could not be loaded: .*has no function 'nobody'"):
            reward(IMAGES, TEXTS, METADATA)
    finally:
        reward.close()


def test_a_replacement_that_cannot_be_loaded_costs_samples_not_the_run(local_ray: None, tmp_path: Path):
    reward = actors(str(tmp_path / "loaded"), load=loads_once)
    scores, again = scored_twice(reward, (tmp_path / "loaded").unlink)  # mended
    np.testing.assert_allclose(scores.values, [*SCORES[:2], *[math.nan] * 4])
    assert [why.split(":")[0] for why in scores.failures] == [
        "the actor died",
        "a new actor could not load the reward",
    ]
    np.testing.assert_allclose(again.values, SCORES[:2])


@pytest.mark.parametrize(
    ("load", "patience", "why"),
    [
        (loads_for_ever, 2.0, "no actor was ready within 2 seconds"),
        (dies_loading, 60.0, "the actor died as it loaded the reward"),
    ],
)
def test_loading_that_hangs_or_dies_is_told(local_ray: None, load, patience: float, why: str):
    reward = actors("x", load=load, chunk=6, patience=patience)
    try:
        scores = reward(IMAGES, TEXTS, METADATA)
    finally:
        reward.close()
    assert np.isnan(scores.values).all()
    assert why in scores.failures[0]


def test_gpus_that_are_not_there_are_named(local_ray: None):
    config = ScoringConfig(backend="ray", workers=2, gpus=64)
    with pytest.raises(UserError, match=r"scoring.gpus = 64 with scoring.workers = 2: that is 128 GPUs .* Ray has"):
        RayActors(here("brightness"), load_reward, config, {})(IMAGES, TEXTS, METADATA)


def test_each_reward_of_a_sum_has_its_own_environment(local_ray: None):
    settings = ScoringConfig(
        backend="ray",
        workers=1,
        environments={here("named"): {"env_vars": {"WHO": "0.25"}}, here("named_again"): {"env_vars": {"WHO": "0.5"}}},
    )
    scorer = Scorer(f"{here('named')} + {here('named_again')}", settings)
    try:
        assert scorer(IMAGES, PROMPTS).values.tolist() == [0.75] * 6
    finally:
        scorer.close()
    assert scorer.parallel == 1
