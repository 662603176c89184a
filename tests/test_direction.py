"""The direction of learning: the real algorithms, on a world of Gaussian mixtures whose velocities are exact.

TDM has to bring the generator to the teacher's law, and TDM-R1 to the law that the reward tilts it to.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from mixture_world import TARGET, TEACHER, Mixture, experiment
from tdm_r1.algorithms.tdm import TDM
from tdm_r1.algorithms.tdm_r1 import TDMR1
from tdm_r1.algorithms.tdm_r1_release import TDMR1Release
from tdm_r1.core.toy import GaussianMixture
from tdm_r1.models.specification import Role


def distance(samples: Tensor, law: GaussianMixture) -> float:
    """Energy distance between samples and a law's own: 0 where they are the same."""
    other = law.sample(4000, torch.Generator().manual_seed(1))
    some = samples[:4000]
    cross = torch.cdist(some, other).mean()
    return float(2 * cross - torch.cdist(some, some).mean() - torch.cdist(other, other).mean())


def moved(law: GaussianMixture, by: Sequence[float]) -> GaussianMixture:
    return GaussianMixture(law.weights, law.means + torch.tensor(by), 0.8 * law.stds)


@pytest.mark.parametrize("solver", ["euler", "dpm"])
@pytest.mark.parametrize("fake_scores", ["one", "two"])
def test_tdm_brings_the_generator_to_the_teachers_law(solver: str, fake_scores: str):
    found = experiment(TDM, moved(TEACHER, (0.9, 0.7)), sampler={"solver": solver}, tdm={"fake_scores": fake_scores})
    before = distance(found.samples(), TEACHER)
    found.run(250)
    assert before > 1
    assert distance(found.samples(), TEACHER) < 0.06


def test_tdm_r1_brings_the_generator_to_the_tilted_law():
    """With the exact surrogate, p_phi ~ p_ref exp(reward), at weight 1 the fixed point of Eq. 10 is p_phi itself."""
    tilted = TEACHER.tilted(TARGET, strength=1.0)
    found = experiment(TDMR1, TEACHER, surrogate={"optimizer": {"learning_rate": 1e-12}}, balance={"scale": 1.0})
    exact = {name: p.detach() for name, p in Mixture(tilted).named_parameters()}
    for role in (Role.SURROGATE, Role.SURROGATE_EMA):
        found.roles.load(role, exact)
    before = distance(found.samples(), tilted)
    found.run(250)
    assert before > 0.1
    assert distance(found.samples(), tilted) < 0.02


LEARNED = {
    "anchored": {"loss": "anchored"},
    "anchored-reference": {"loss": "anchored", "baseline": "reference"},
    "preference": {"loss": "preference", "beta": 10.0},
    "preference-dynamic": {"loss": "preference", "beta": 100.0, "reference": "dynamic", "reference_decay": 0.995},
    "preference-anchor": {"loss": "preference", "beta": 10.0, "trust_region": "anchor", "anchor_weight": 0.1},
    "preference-clip": {"loss": "preference", "beta": 10.0, "trust_region": "clip", "clip": 0.5},
}


def test_the_released_algorithm_raises_the_reward():
    fast = {"learning_rate": 0.02, "betas": (0.5, 0.95)}
    release = {"generator": fast, "fake": fast, "surrogate": fast, "teacher_guidance": 1.0, "surrogate_guidance": 1.0}
    found = experiment(TDMR1Release, TEACHER, release=release | {"distance_limit": 0.5, "clip": 0.1})
    metrics = found.run(120)
    rewards = [row["reward/mean"] for row in metrics]
    assert np.mean(rewards[-10:]) > np.mean(rewards[:5]) + 0.3
    assert np.mean([row["surrogate/preference_accuracy"] for row in metrics]) > 0.52
    assert (found.samples().mean(0) > TEACHER.sample(20_000, torch.Generator().manual_seed(2)).mean(0) + 0.1).all()


@pytest.mark.parametrize("name", LEARNED)
def test_a_learned_surrogate_raises_the_reward(name: str):
    """From the teacher's law, with KL to it: the reward rises, and the generator goes where the reward points."""
    optimizer = {"learning_rate": 0.01, "betas": (0.9, 0.99)}
    surrogate = LEARNED[name] | {"optimizer": optimizer, "ema_decay": LEARNED[name].get("ema_decay", 0.9)}
    found = experiment(TDMR1, TEACHER, surrogate=surrogate, balance={"scale": 1.0})
    metrics = found.run(120)
    rewards = [row["reward/mean"] for row in metrics]
    accuracy = [row["surrogate/preference_accuracy"] for row in metrics]
    assert np.mean(rewards[-10:]) > np.mean(rewards[:5]) + 0.3
    assert np.mean(accuracy) > 0.52
    assert (found.samples().mean(0) > TEACHER.sample(20_000, torch.Generator().manual_seed(2)).mean(0) + 0.1).all()
