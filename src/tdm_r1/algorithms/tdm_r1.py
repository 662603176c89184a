"""TDM-R1: reinforcing a few-step generator with non-differentiable rewards (arXiv 2603.07700, Algorithm 1).

`TDMR1.step` is Algorithm 1, read top-down. Departures from the print, with their derivations in `docs/method.md`:
the minus of Eq. 16 is restored in Eq. 9; the KL part of Eq. 11 has its own sign; the reward's gradient is the
difference of the surrogate's and the reference's scores. Beside the paper's surrogate loss there is the anchored one
(ours), by name; the surrogate's change of weights may be added to the generator's (ours; `RoleSpec.added`); and the
reward's part may be limited (ours; `Balance`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..core.advantages import group_advantages
from ..models.protocol import Conditioning
from ..models.roles import Roles
from ..models.specification import AddedDelta, Average, Role, RoleSpec
from . import tdm
from .controller import Controller
from .metrics import Stopwatch, mean_of_each
from .optimizer_settings import OptimizerConfig
from .protocol import Algorithm, Batch, Evaluations, Step
from .rollout import Rollout
from .settings import AlgorithmSettings, BalanceConfig, check_tdm_r1
from .surrogate import Surrogate, trained_of_group
from .tdm import TDM

LIMIT_RATE = 0.1  # the strength's step in log scale, for `balance.limit`: at most 10 % an iteration; ours
STRENGTH_LEAST = 0.01  # ours


class TDMR1(Algorithm):
    """Algorithm 1. Samples of one prompt (a group) are consecutive rows throughout."""

    check = staticmethod(check_tdm_r1)

    def __init__(self, roles: Roles, empty: Conditioning, settings: AlgorithmSettings) -> None:
        super().__init__(roles, empty, settings)
        self.trained = settings.batch.trained_of_group
        self.tdm = TDM(roles, empty, settings)
        self.surrogate = Surrogate(roles, self.tdm, settings)
        self.balance = Balance(settings.balance)

    def step(self, batch: Batch) -> Step:
        """One iteration of Algorithm 1 on P prompts with groups of G samples."""
        noise, seconds = batch.noise, Stopwatch()

        # 1. Roll the generator out along its deterministic trajectory, keeping every x_{t_k}; the run scores x_0.
        with seconds("rollout"):
            rollout = self.tdm.roll_out(batch)
        rewards = yield rollout.trajectory.final

        # 2. Advantages inside each group. The trajectory is deterministic: r_i is exact for every x_{t_k}^i.
        of_groups = rewards.reshape(-1, batch.group)
        every, groups = group_advantages(of_groups), group_advantages(of_groups, keep=self.surrogate.trained)
        rows = groups.used.flatten().nonzero()[:, 0]
        advantage = groups.advantage.flatten().to(batch.x_1)
        metrics = groups.metrics(rewards)

        # 3. The surrogate learns the preference at drawn (k, t, noise), t >= t_k (Eq. 8, 9, 18), and
        # 4. the reference follows it. Phi is measured on fresh groups before it learns from them.
        with seconds("surrogate"):
            metrics |= self.surrogate.measure(rollout, every.advantage.flatten().to(advantage), noise, self.reward_part)
            draws = range(self.surrogate.config.draws)
            metrics |= mean_of_each([self.surrogate.fit(rollout, advantage, rows, noise) for _ in draws])

        # 5. The fake score follows the generator's own samples (Eq. 1): the first of each group, not its extremes.
        first = torch.arange(len(rollout)).reshape(-1, batch.group)[:, : self.trained].flatten()
        rollout = rollout.rows(first)
        rewarded = len(rollout)
        with seconds("rollout"):  # and those that no reward is asked for: KL alone holds the generator there
            rollout = Rollout.join([rollout, *self.tdm.roll_out_for_kl(batch)])
        with seconds("fake"):
            fits = range(self.tdm.config.fake_steps)
            metrics |= mean_of_each([self.tdm.fit_fake(rollout, noise) for _ in fits])

        # 6. The generator moves along reward and KL (Eq. 10, 11).
        with seconds("generator"):
            metrics |= self.tdm.fit_generator(rollout, noise, self.reward_part, rewarded)
        parts = ("reward_part", "kl_part", "kl_reward_cosine")
        self.balance.update(*(metrics[f"generator/{name}"] for name in parts))
        self.roles.weaken(Role.SURROGATE_EMA, self.balance.strength)
        scales = {"generator/reward_scale": self.balance.scale, "generator/reward_strength": self.balance.strength}
        return metrics | scales | seconds.read()

    def reward_part(self, x_t: Tensor, t: Tensor, c: Conditioning, v_teacher: Tensor | None = None) -> Tensor:
        """Eq. 10: lambda times the surrogate's direction."""
        return self.balance.scale * self.surrogate.direction(x_t, t, c, v_teacher)

    def state(self) -> dict[str, Any]:
        return {
            "tdm": self.tdm.state(),
            "surrogate": self.surrogate.state(),
            "balance": self.balance.state(),
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        self.tdm.load_state(state["tdm"])
        self.surrogate.load_state(state["surrogate"])
        self.balance.load_state(state["balance"])
        self.roles.weaken(Role.SURROGATE_EMA, self.balance.strength)

    # -------------------------------------------------------------------------------------- declarations

    @staticmethod
    def declare_roles(settings: AlgorithmSettings) -> tuple[RoleSpec, ...]:
        """TDM's roles; phi, its average that is used, and its slower average where that is the reference."""
        c = settings.surrogate
        added = AddedDelta(Role.SURROGATE_EMA, c.added_delta) if c.added_delta else None
        exported = AddedDelta(Role.SURROGATE_EMA, c.added_delta_exported) if c.added_delta_exported else None
        weights = "full" if settings.model.roles == "full" else c.weights
        averages = {Role.SURROGATE_EMA: c.ema_decay}
        if c.reference == "dynamic":
            averages[Role.REFERENCE] = c.reference_decay
        phi = partial(RoleSpec, host="teacher", weights=weights)
        exports = {Role.SURROGATE_EMA: "lora_surrogate"}
        return (
            *tdm.declared(settings, added, exported),
            phi(Role.SURROGATE, trained=True, starts_from="surrogate_lora"),
            *(
                phi(role, average=Average(Role.SURROGATE, decay), exported_as=exports.get(role))
                for role, decay in averages.items()
            ),
        )

    @staticmethod
    def optimizer_settings(settings: AlgorithmSettings) -> dict[str, OptimizerConfig]:
        return TDM.optimizer_settings(settings) | {Role.SURROGATE: settings.surrogate.optimizer}

    @staticmethod
    def evaluations(settings: AlgorithmSettings) -> dict[str, Evaluations]:
        b, c = settings.batch, settings.surrogate
        trained = b.prompts * b.trained_of_group
        anchored = c.loss == "anchored"
        baseline = int(anchored and c.baseline == "fake")
        split = not anchored and trained_of_group(settings) > b.micro_batch  # a group then takes two passes
        frozen = 1 + baseline + 2 * split
        learned = c.draws * b.prompts * trained_of_group(settings)
        measured = min(c.measured_groups, b.prompts) * b.group
        reward = 1 if c.reference == "static" else 2  # the static reference is the teacher, which the KL part has
        return tdm.evaluations(settings, trained, reward=reward, beside=b.kl_prompts) | {
            "surrogate": Evaluations(frozen * learned, learned, Role.SURROGATE),
            "diagnostics": Evaluations((1 + baseline + 1 + 2) * measured),
        }


class Balance:
    """The named policy that weighs reward against KL. Its state is two numbers, and they are logged.

    Rescaling every batch to the wanted ratio runs away: off-manifold students raise the KL part, and the rule raises
    the reward with it. The controllers move by little an iteration and stay within bounds.
    """

    def __init__(self, config: BalanceConfig) -> None:
        self.config = config
        self.controller = Controller(config.scale, config.rate, config.bounds)
        self.limiter = Controller(1.0, LIMIT_RATE, (STRENGTH_LEAST, 1.0))

    @property
    def scale(self) -> float:
        """Lambda of Eq. 10."""
        return self.controller.value * self.strength

    @property
    def strength(self) -> float:
        """A factor of at most 1, on lambda and on the weight of what is added to the generator: below 1 while more of
        the reward's part opposes the KL part than ``limit`` allows. Phi itself is learned at full strength."""
        return self.limiter.value

    def update(self, reward_part: float, kl_part: float, cosine: float) -> None:
        """Moves the scale towards the wanted ratio of the last update's two parts, and the strength to the limit.

        Args:
            cosine: between the two parts; below 0 they oppose each other.
        """
        if not 0 < reward_part < math.inf or not math.isfinite(kl_part + cosine):
            return  # nothing to weigh, or an update that was left out
        if self.config.policy == "ratio":
            self.controller.update(math.log(self.config.ratio * max(kl_part, 1e-12) / reward_part))
        elif self.config.limit is not None:
            opposed = reward_part * max(-cosine, 1e-12)
            self.limiter.update(math.log(self.config.limit / opposed))

    def state(self) -> dict[str, Any]:
        return {"scale": self.controller.state(), "strength": self.limiter.state()}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Goes on with what is controlled, unless the run now has another start. A fixed scale is a setting."""
        if self.config.policy == "ratio":
            self.controller.load_state(state["scale"] if "strength" in state else state)  # older ones are that alone
        elif self.config.limit is not None and "strength" in state:
            self.limiter.load_state(state["strength"])
