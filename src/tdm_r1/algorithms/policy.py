"""What DGPO, Flow-GRPO and DiffusionNFT share: one model, trained on its own samples, against where it started."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..core.advantages import group_advantages
from ..models.protocol import Conditioning
from ..models.roles import Roles
from ..models.specification import EVALUATED, Average, Role, RoleSpec, trailing, warm_up
from .baseline_settings import PolicyConfig
from .optimizer import Optimizer
from .optimizer_settings import OptimizerConfig
from .protocol import Algorithm, Batch
from .rollout import Rollout, roll_out
from .settings import AlgorithmSettings, check_policy

OLD = "generator_old"  # an average of the policy that trails behind it


class Policy(Algorithm):
    """Sub-classes write `step`, and name their group of settings."""

    check = staticmethod(check_policy)
    name: ClassVar[str]

    def __init__(self, roles: Roles, empty: Conditioning, settings: AlgorithmSettings) -> None:
        super().__init__(roles, empty, settings)
        self.sampler, self.group = settings.sampler, settings.batch.group
        self.micro_batch = settings.batch.micro_batch // self.group * self.group
        self.policy: PolicyConfig = getattr(settings, self.name)
        total = settings.iterations * self.updates(settings)
        self.optimizer = Optimizer(roles.parameters(Role.GENERATOR), self.policy.optimizer, total=total)

    def roll_out(self, batch: Batch, role: str) -> Rollout:
        """Trajectories of ``role``, with the sampler's guidance."""
        b = batch
        return roll_out(
            self.roles,
            role,
            b.conditioning,
            b.x_1,
            self.sampler,
            b.noise,
            micro_batch=self.micro_batch,
            empty=self.empty,
        )

    def advantages(self, batch: Batch, rewards: Tensor) -> tuple[Tensor, dict[str, float]]:
        """Advantages [B] of rewards [B], 0 where a score is missing or a group is tied; metrics."""
        own = self.policy
        groups = group_advantages(rewards.reshape(-1, batch.group), deviation=own.deviation, clip=own.advantage_clip)
        return groups.advantage.flatten().to(batch.x_1), groups.metrics(rewards)

    def update(self) -> dict[str, float]:
        """One update of the policy; its averages follow."""
        metrics = {f"generator/{name}": value for name, value in self.optimizer.step().items()}
        self.roles.update_averages(Role.GENERATOR, updates=self.optimizer.updates)
        return metrics

    @torch.no_grad()  # a constant of every loss that it stands in
    def velocity(self, role: str, x_t: Tensor, t: Tensor, text: Conditioning) -> Tensor:
        """A role's velocity without gradient and without guidance."""
        with self.roles.use(role) as velocity:
            return velocity(x_t, t, text)

    def state(self) -> dict[str, Any]:
        return {"optimizer": self.optimizer.state()}

    def load_state(self, state: Mapping[str, Any]) -> None:
        self.optimizer.load_state(state["optimizer"])

    # -------------------------------------------------------------------------------------- declarations

    @classmethod
    def updates(cls, settings: AlgorithmSettings) -> int:
        """Updates of the policy in an iteration."""
        del settings
        return 1

    @classmethod
    def optimizer_settings(cls, settings: AlgorithmSettings) -> dict[str, OptimizerConfig]:
        return {Role.GENERATOR: getattr(settings, cls.name).optimizer}

    @classmethod
    def declare_roles(cls, settings: AlgorithmSettings) -> tuple[RoleSpec, ...]:
        ema = Average(Role.GENERATOR, getattr(settings, cls.name).ema_decay, warm_up)
        own = partial(RoleSpec, weights=settings.model.roles, starts_from="student_lora")
        return (
            own(Role.GENERATOR, trained=True),
            own(Role.GENERATOR_EMA, average=ema, exported_as=EVALUATED),
            start_of(settings),
        )


def start_of(settings: AlgorithmSettings) -> RoleSpec:
    """The policy's start, frozen: the base, or the LoRA on it that makes it a few-step model."""
    return RoleSpec(Role.REFERENCE, weights=settings.model.roles, starts_from="student_lora")


def old_of(settings: AlgorithmSettings, decay: float) -> RoleSpec:
    """An average of the policy that trails behind it, with a decay of at most ``decay``."""
    average = Average(Role.GENERATOR, decay, trailing)
    return RoleSpec(OLD, average=average, weights=settings.model.roles, starts_from="student_lora")
