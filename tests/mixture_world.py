"""A world of Gaussian mixtures whose velocities are exact, to drive the real algorithms with.

Each role is a mixture with its own parameters, computed exactly at every noise level. Samples are points of R^2.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from peft import LoraConfig
from torch import Tensor, nn

from tdm_r1.algorithms.dgpo import DGPO
from tdm_r1.algorithms.flow_grpo import FlowGRPO
from tdm_r1.algorithms.nft import DiffusionNFT
from tdm_r1.algorithms.protocol import Algorithm, Batch, Step
from tdm_r1.algorithms.rollout import roll_out
from tdm_r1.algorithms.tdm import TDM
from tdm_r1.algorithms.tdm_direct_rl import TDMDirectRL
from tdm_r1.algorithms.tdm_r1 import TDMR1
from tdm_r1.algorithms.tdm_r1_release import TDMR1Release
from tdm_r1.config.run import RunConfig, validate
from tdm_r1.core.toy import GaussianMixture
from tdm_r1.models.create import create_roles
from tdm_r1.models.protocol import Conditioning, Velocity
from tdm_r1.models.roles import Roles
from tdm_r1.models.specification import Role

TEACHER = GaussianMixture(torch.tensor([0.4, 0.6]), torch.tensor([[0.6, -0.4], [-0.4, 0.6]]), torch.tensor([0.5, 0.6]))
TARGET = torch.tensor([1.0, 1.0])
NAMES: dict[type[Algorithm], str] = {
    TDM: "tdm",
    TDMR1: "tdm_r1",
    TDMR1Release: "tdm_r1_release",
    DGPO: "dgpo",
    FlowGRPO: "flow_grpo",
    DiffusionNFT: "nft",
    TDMDirectRL: "tdm_direct_rl",
}
SMALL = {"prompts": 4, "group": 6, "micro_batch": 24}


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

    def run(self, iterations: int, score: Callable[[Tensor], Tensor] | None = None) -> list[dict[str, float]]:
        found = []
        for _ in range(iterations):
            noise = torch.Generator().manual_seed(self.iteration)
            b = self.config.batch
            n = b.prompts * b.group
            c = Conditioning.of(embeds=torch.zeros(1, 1)).expand(n)
            x_1 = torch.randn(n, 2, 1, 1, generator=noise)
            found.append(finished(self.algorithm.step(Batch(c, x_1, b.group, noise)), score or reward))
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
        )
        rollout = roll_out(
            self.roles, role, batch.conditioning, batch.x_1, self.config.sampler, batch.noise, micro_batch=n
        )
        return rollout.trajectory.final.flatten(1)


def finished(step: Step, score: Callable[[Tensor], Tensor]) -> dict[str, float]:
    """Runs an iteration to its end; its metrics.

    Args:
        score: of final latents [B, C, H, W]: float64 [B].
    """
    try:
        latents = next(step)
        while True:
            latents = step.send(score(latents))
    except StopIteration as end:
        metrics: dict[str, float] = end.value
        return metrics


def reward(latents: Tensor) -> Tensor:
    """Higher near TARGET: exp(reward) tilts the teacher's law to a known one."""
    return (-0.5 * (latents.flatten(1) - TARGET).square().sum(1)).double()


def experiment(kind: type[Algorithm], start: GaussianMixture, **settings: dict) -> Experiment:
    values: dict = {
        "algorithm": NAMES[kind],
        "iterations": 400,
        "model": {"roles": "full"},
        "batch": {"prompts": 16, "group": 16, "micro_batch": 256},
        "tdm": {
            "teacher_guidance": 1.0,
            "generator": {"learning_rate": 0.02, "betas": (0.5, 0.95)},
            "fake": {"learning_rate": 0.02, "betas": (0.5, 0.95)},
            "fake_scores": "one",
            "fake_steps": 2,
            "generator_ema_decay": 0.95,
        },
        "surrogate": {"points": "all", "time_range": (0.0, 1.0), "ema_decay": 0.99, "added_delta": 0.0},
        "balance": {"scale": 4.0, "limit": None},
    }
    for group, changes in settings.items():
        values[group] = values.get(group, {}) | changes
    config, backbone = validate(values), World(TEACHER)
    roles = create_roles(kind.declare_roles(config), backbone, LoraConfig())
    theta = {name: p.detach() for name, p in Mixture(start).named_parameters()}
    for spec in roles.specs:
        if spec.starts_from == "student_lora":
            roles.load(spec.name, theta)
    return Experiment(kind(roles, Conditioning.of(embeds=torch.zeros(1, 1)), config), roles, config)


def conditioning(n: int) -> Conditioning:
    return Conditioning.of(embeds=torch.zeros(1, 1)).expand(n)


def batch_of(n: int, group: int = 1, seed: int = 0) -> Batch:
    noise = torch.Generator().manual_seed(seed)
    return Batch(conditioning(n), torch.randn(n, 2, 1, 1, generator=noise), group, noise)


def gradients(found: Experiment, role: Role) -> dict[str, Tensor]:
    """What one update would be, with SGD of rate 1 in place of AdamW."""
    return {n: p.detach().clone() for n, p in found.roles.weights(role).items()}


def with_sgd(found: Any, rate: float = 1.0) -> Any:
    """An experiment, or a run, whose every update is one step along its gradient."""
    algorithm = found.algorithm
    optimizers = [*(algorithm.tdm if isinstance(algorithm, TDMR1) else algorithm).optimizers.values()]
    if isinstance(algorithm, TDMR1):
        optimizers.append(algorithm.surrogate.optimizer)
    for optimizer in optimizers:
        optimizer.config = optimizer.config.model_copy(update={"max_grad_norm": 1e9})
        optimizer.adamw = torch.optim.SGD(optimizer.parameters, lr=rate)
        optimizer.schedule = torch.optim.lr_scheduler.LambdaLR(optimizer.adamw, lambda done: 1.0)
    return found
