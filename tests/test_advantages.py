"""Group advantages, with missing scores and groups without signal."""

import math

import numpy as np
import pytest
import torch

from tdm_r1.core.advantages import group_advantages
from tdm_r1.core.groups import spread


def test_standardised_inside_each_group():
    out = group_advantages(torch.tensor([[1.0, 2.0, 3.0], [10.0, 10.0, 40.0]]))
    torch.testing.assert_close(out.advantage.mean(1), torch.zeros(2))
    torch.testing.assert_close(out.advantage.square().mean(1), torch.ones(2))
    torch.testing.assert_close(out.advantage[1], torch.tensor([-(0.5**0.5), -(0.5**0.5), 2**0.5]))
    assert out.skipped_groups == 0


def test_group_without_spread_is_skipped_and_counted():
    out = group_advantages(torch.tensor([[0.5, 0.5, 0.5], [0.0, 1.0, 0.0]]))
    assert out.skipped_groups == 1
    assert not out.advantage[0].any()
    assert not out.used[0].any()


@pytest.mark.parametrize("size", [2, 16, 24, 48])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_tied_group_is_skipped_at_any_scale_and_offset(size: int, dtype: torch.dtype):
    """In float32 the mean of 24 scores of 21.37 is not 21.37: rounding must not become an advantage."""
    offsets = [20.7, 21.37, *np.linspace(20, 23, 40), 1e-12, -3e7, 0.0]
    out = group_advantages(torch.tensor(offsets, dtype=dtype)[:, None].expand(-1, size))
    assert out.skipped_groups == len(offsets)
    assert not out.advantage.any()
    ulp = 2.0**-20  # of a float32 between 16 and 32, halved: a scorer's own rounding
    assert group_advantages(21 + ulp * (torch.arange(size) % 2)[None]).skipped_groups == 1


@pytest.mark.parametrize("scale", [1e-9, 1.0, 1e9])
def test_differences_are_signal_at_any_scale(scale: float):
    r = torch.tensor([[0.0, 1.0, 2.0], [5.0, 5.0, 5.001]]) * scale
    torch.testing.assert_close(group_advantages(r).advantage, group_advantages(r / scale).advantage)
    assert group_advantages(r).skipped_groups == 0
    assert spread(r.numpy())[1].all()


def test_missing_scores_are_masked_not_zero():
    with_missing = group_advantages(torch.tensor([[1.0, math.nan, 3.0, 5.0]]))
    without = group_advantages(torch.tensor([[1.0, 3.0, 5.0]]))
    torch.testing.assert_close(with_missing.advantage[:, [0, 2, 3]], without.advantage)
    assert with_missing.advantage[0, 1] == 0
    assert with_missing.used.tolist() == [[True, False, True, True]]


def test_group_with_too_few_scores_is_skipped():
    out = group_advantages(torch.tensor([[1.0, math.nan, math.nan], [math.nan] * 3]))
    assert out.skipped_groups == 2
    assert bool(out.advantage.isfinite().all())
    two_and_one = group_advantages(torch.tensor([[1.0, 2.0, math.nan], [1.0, math.nan, math.nan]]))
    assert two_and_one.used.tolist() == [[True, True, False], [False] * 3]
    assert two_and_one.skipped_groups == 1
    three_and_two = group_advantages(torch.tensor([[1.0, 2.0, 3.0], [1.0, 2.0, math.nan]]), min_valid=3)
    assert three_and_two.used.tolist() == [[True] * 3, [False] * 3]


def test_rounding_is_that_of_the_group_not_of_the_batch():
    out = group_advantages(torch.tensor([[1e9, 1e9 + 1e6], [0.0, 0.5]], dtype=torch.float64))
    assert out.used.all()


def test_shift_and_scale_of_the_reward_change_nothing():
    r = torch.rand(3, 8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(
        group_advantages(r).advantage, group_advantages(100 + 7 * r).advantage, atol=1e-3, rtol=0
    )


def test_extremes_of_a_group():
    r = torch.tensor([[0.0, 5.0, 1.0, 4.0, 2.0, 3.0], [math.nan, 9.0, 1.0, 5.0, 4.0, 3.0]])
    out = group_advantages(r, keep=4)
    assert out.used.tolist() == [
        [True, True, True, True, False, False],
        [False, True, True, True, False, True],
    ]
    torch.testing.assert_close(out.advantage.sum(1), torch.zeros(2), atol=1e-6, rtol=0)
    torch.testing.assert_close(out.advantage.square().sum(1), torch.full((2,), 4.0))  # of deviation 1 among themselves
    assert not out.advantage[~out.used].any()
    order = out.advantage[0, [0, 2, 3, 1]]
    assert bool((order.diff() > 0).all())
    torch.testing.assert_close(group_advantages(r, keep=6).advantage, group_advantages(r).advantage)
    odd = group_advantages(torch.tensor([[0.0, 0.0, 1.0, 1.0, 2.0, 2.0]]), keep=3)  # ties: the first in the batch
    assert odd.used.tolist() == [[True, False, False, False, True, True]]


def test_metrics_of_the_rewards():
    rewards = torch.tensor([[1.0, 3.0, 5.0, 7.0], [2.0, 2.0, math.nan, 2.0], [4.0, math.nan, math.nan, 8.0]])
    metrics = group_advantages(rewards).metrics(rewards.flatten())
    assert metrics == {
        "reward/mean": pytest.approx(float(rewards.nanmean())),
        "reward/group_std": pytest.approx((5**0.5 + 0 + 2) / 3),
        "reward/missing": 3,
        "reward/skipped_groups": 1,
    }


def test_a_group_with_one_score_has_a_spread_of_zero():
    std, differs = spread(np.array([[3.0, np.nan], [1, 5], [np.nan, np.nan]]))
    assert std.tolist() == [0, 2, 0]
    assert differs.tolist() == [False, True, False]


def test_two_samples_of_a_group_are_enough():
    out = group_advantages(torch.tensor([[0.0, 1.0, math.nan], [2.0, math.nan, math.nan]]), keep=2)
    torch.testing.assert_close(out.advantage, torch.tensor([[-1.0, 1.0, 0.0], [0.0, 0.0, 0.0]]))
