"""An algorithm: the generator learns to denoise the best sample of each group."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from pydantic import Field

from tdm_r1.algorithms.optimizer import Optimizer
from tdm_r1.algorithms.optimizer_settings import OptimizerConfig
from tdm_r1.algorithms.protocol import Algorithm, Batch, Step
from tdm_r1.algorithms.rollout import draw_points, roll_out
from tdm_r1.algorithms.settings import AlgorithmSettings
from tdm_r1.core import losses
from tdm_r1.models.protocol import Conditioning
from tdm_r1.models.roles import Roles
from tdm_r1.models.specification import Average, Role, RoleSpec
from tdm_r1.settings import Settings


class BestConfig(Settings):
    """Its own settings."""

    decay: float = Field(0.5, ge=0, lt=1)
    learning_rate: float = Field(1e-3, gt=0)


class BestOfGroup(Algorithm):
    """Named as outside.algorithm:BestOfGroup."""

    def __init__(self, roles: Roles, empty: Conditioning, settings: AlgorithmSettings) -> None:
        super().__init__(roles, empty, settings)
        own = OptimizerConfig(learning_rate=BestConfig(**settings.algorithm_settings).learning_rate)
        self.optimizer = Optimizer(roles.parameters(Role.GENERATOR), own, total=settings.iterations)

    @staticmethod
    def check(settings: AlgorithmSettings) -> None:
        BestConfig(**settings.algorithm_settings)

    @staticmethod
    def declare_roles(settings: AlgorithmSettings) -> tuple[RoleSpec, ...]:
        decay = BestConfig(**settings.algorithm_settings).decay
        return (
            RoleSpec(Role.GENERATOR, trained=True, starts_from="student_lora"),
            RoleSpec("slow", average=Average(Role.GENERATOR, decay), starts_from="student_lora", exported_as="lora"),
        )

    def step(self, batch: Batch) -> Step:
        s = self.settings
        rollout = roll_out(
            self.roles,
            Role.GENERATOR,
            batch.conditioning,
            batch.x_1,
            s.sampler,
            batch.noise,
            micro_batch=s.batch.micro_batch,
        )
        rewards = yield rollout.trajectory.final
        rewards = rewards.reshape(-1, batch.group)
        best = rollout.rows(rewards.argmax(1) + batch.group * torch.arange(len(rewards)))
        draw = draw_points(best, batch.noise, points="final").all()
        with self.roles.use(Role.GENERATOR) as velocity:
            v = velocity(draw.x_t, draw.t, best.conditioning)
            losses.denoising(v, draw.x_t, draw.eps, draw.s, draw.t).mean().backward()
        metrics = self.optimizer.step()
        self.roles.update_averages(Role.GENERATOR)
        return {"reward/mean": float(rewards.mean())} | metrics

    def state(self) -> dict[str, Any]:
        return self.optimizer.state()

    def load_state(self, state: Mapping[str, Any]) -> None:
        self.optimizer.load_state(state)
