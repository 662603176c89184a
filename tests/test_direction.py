"""The direction of learning: the real algorithms, on a world of Gaussian mixtures whose velocities are exact.

Each role is a mixture with its own parameters, computed exactly at every noise level. So TDM has to bring the generator
to the teacher's law, and TDM-R1 to the law that the reward tilts it to.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from peft import LoraConfig
from torch import Tensor, nn

from tdm_r1.algorithms.protocol import Algorithm, Batch
from tdm_r1.algorithms.tdm import TDM
from tdm_r1.algorithms.tdm_r1 import TDMR1
from tdm_r1.config.run import RunConfig, validate
from tdm_r1.core.toy import GaussianMixture
from tdm_r1.models.create import create_roles
from tdm_r1.models.protocol import Conditioning, Velocity
from tdm_r1.models.roles import Roles
from tdm_r1.models.specification import Role

TEACHER = GaussianMixture(torch.tensor([0.4, 0.6]), torch.tensor([[0.6, -0.4], [-0.4, 0.6]]), torch.tensor([0.5, 0.6]))
TARGET = torch.tensor([1.0, 1.0])


class Mixture(nn.Module):
    """A Gaussian mixture in R^2 whose parameters can be trained."""

    def __init__(self, law: GaussianMixture) -> None:
        super().__init__()
        self.logits = nn.Parameter(law.weights.log())
        self.means = nn.Parameter(law.means.clone())
        self.log_stds = nn.Parameter(law.stds.log())

    def law(self) -> GaussianMixture:
        return GaussianMixture(self.logits.softmax(0), self.means, self.log_stds.exp())


class World:
    """A backbone whose transformer is a `Mixture`; its latents are points of R^2, [B, 2, 1, 1]."""

    latent_shape = (2, 1, 1)

    def __init__(self, law: GaussianMixture) -> None:
        self.transformer = Mixture(law)

    def encode(self, prompts: Sequence[str]) -> list[Conditioning]:
        return [Conditioning.of(embeds=torch.zeros(1, 1)) for _ in prompts]

    def velocity_of(self, transformer: nn.Module) -> Velocity:
        def velocity(x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
            assert len(conditioning) == len(x_t)
            points = x_t.flatten(1)
            return transformer.law().velocity(points, t.clamp_max(1 - 1e-4)).reshape(x_t.shape)

        return velocity

    def decode(self, latents: Tensor) -> np.ndarray:
        raise NotImplementedError("rewards see latents here")

    def save_lora(self, *args: object) -> None:
        raise NotImplementedError


@dataclass
class Experiment:
    """An algorithm on the world; ``start`` is the law of the generator before it learns."""

    algorithm: Algorithm
    roles: Roles
    config: RunConfig
    iteration: int = 0

    def run(self, iterations: int) -> list[dict[str, float]]:
        found = []
        for _ in range(iterations):
            noise = torch.Generator().manual_seed(self.iteration)
            b = self.config.batch
            n = b.prompts * b.group
            c = Conditioning.of(embeds=torch.zeros(1, 1)).expand(n)
            x_1 = torch.randn(n, 2, 1, 1, generator=noise)
            found.append(self.algorithm.step(Batch(c, x_1, b.group, noise, reward)))
            self.iteration += 1
        return found

    def samples(self, role: Role = Role.GENERATOR_EMA) -> Tensor:
        """[20000, 2] few-step samples."""
        noise = torch.Generator().manual_seed(10**6)
        n = 20_000
        batch = Batch(
            Conditioning.of(embeds=torch.zeros(1, 1)).expand(n),
            torch.randn(n, 2, 1, 1, generator=noise),
            1,
            noise,
            reward,
        )
        tdm = self.algorithm if isinstance(self.algorithm, TDM) else self.algorithm.tdm
        return tdm.roll_out(batch).trajectory.final.flatten(1)


def reward(latents: Tensor) -> Tensor:
    """Higher near TARGET: exp(reward) tilts the teacher's law to a known one."""
    return (-0.5 * (latents.flatten(1) - TARGET).square().sum(1)).double()


def experiment(kind: type[Algorithm], start: GaussianMixture, **settings: dict) -> Experiment:
    values: dict = {
        "algorithm": "tdm" if kind is TDM else "tdm_r1",
        "iterations": 400,
        "model": {"roles": "full"},
        "batch": {"prompts": 16, "group": 16, "micro_batch": 256},
        "tdm": {
            "teacher_guidance": 1.0,
            "generator": {"learning_rate": 0.02, "betas": (0.5, 0.95)},
            "fake": {"learning_rate": 0.02, "betas": (0.5, 0.95)},
            "fake_steps": 2,
            "generator_ema_decay": 0.95,
        },
    }
    for group, changes in settings.items():
        values[group] = values.get(group, {}) | changes
    config, backbone = validate(values), World(TEACHER)
    roles = create_roles(kind.declare_roles(config), backbone, LoraConfig())
    theta = {name: p.detach() for name, p in Mixture(start).named_parameters()}
    for role in (Role.GENERATOR, Role.GENERATOR_EMA):
        roles.load(role, theta)
    return Experiment(kind(roles, Conditioning.of(embeds=torch.zeros(1, 1)), config), roles, config)


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
