"""TDM with a direct RL loss: the paper's ablation (Fig. 4 and 5).

The few-step generator learns the reward by its own denoising loss (DGPO's), beside distillation, in place of a
surrogate's. It blurs, by the paper.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..models.protocol import Conditioning
from ..models.roles import Roles
from ..models.specification import Role, RoleSpec
from . import tdm
from .dgpo import DGPO, OLD_DECAY
from .metrics import Stopwatch, mean_of_each
from .optimizer_settings import OptimizerConfig
from .policy import old_of, start_of
from .protocol import Algorithm, Batch, Evaluations, Step
from .settings import AlgorithmSettings, check_direct
from .tdm import TDM


class TDMDirectRL(Algorithm):
    """TDM's step, with DGPO's gradient added to the generator's before its update.

    Optimizers and averages are TDM's: of DGPO's settings it reads those of the loss and of the advantage.
    """

    check = staticmethod(check_direct)

    def __init__(self, roles: Roles, empty: Conditioning, settings: AlgorithmSettings) -> None:
        super().__init__(roles, empty, settings)
        self.tdm, self.dgpo = TDM(roles, empty, settings), DGPO(roles, empty, settings)

    def step(self, batch: Batch) -> Step:
        """One iteration on P prompts with groups of G samples."""
        seconds, noise = Stopwatch(), batch.noise
        with seconds("rollout"):
            rollout = self.tdm.roll_out(batch)
        rewards = yield rollout.trajectory.final
        advantage, metrics = self.dgpo.advantages(batch, rewards)
        with seconds("fake"):
            fits = range(self.tdm.config.fake_steps)
            metrics |= mean_of_each([self.tdm.fit_fake(rollout, noise) for _ in fits])
        with seconds("generator"):
            direct = self.dgpo.fit(rollout, advantage, noise, weight=self.dgpo.config.direct_weight)
            metrics |= direct | self.tdm.fit_generator(rollout, noise)
        return metrics | seconds.read()

    def state(self) -> dict[str, Any]:
        return self.tdm.state()

    def load_state(self, state: Mapping[str, Any]) -> None:
        self.tdm.load_state(state)

    # -------------------------------------------------------------------------------------- declarations

    @staticmethod
    def declare_roles(settings: AlgorithmSettings) -> tuple[RoleSpec, ...]:
        return (*tdm.declared(settings), start_of(settings), old_of(settings, OLD_DECAY))

    @staticmethod
    def optimizer_settings(settings: AlgorithmSettings) -> dict[str, OptimizerConfig]:
        return TDM.optimizer_settings(settings)

    @staticmethod
    def evaluations(settings: AlgorithmSettings) -> dict[str, Evaluations]:
        direct = DGPO.evaluations(settings)["generator"]
        parts = tdm.evaluations(settings, settings.batch.prompts * settings.batch.group, reward=0)
        return parts | {"direct": Evaluations(direct.frozen, direct.trained, Role.GENERATOR)}
