"""TDM-R1: reinforcing a few-step generator with non-differentiable rewards (arXiv 2603.07700, Algorithm 1).

`TDMR1.step` is Algorithm 1, read top-down. Departures from the print, with their derivations in `docs/method.md`:
the minus of Eq. 16 is restored in Eq. 9; the KL part of Eq. 11 has its own sign; the reward's gradient is the
difference of the surrogate's and the reference's scores. Beside the paper's surrogate loss stands the anchored one
(ours), by name; and the generator may carry the surrogate's change of weights on top of its own (ours;
`roles.Carried`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from torch import Tensor, nn

from .. import flow, losses
from ..advantages import group_advantages
from ..backbones import Conditioning, in_parts
from ..roles import Role, Roles
from ..settings import SHAPES_CHECKPOINT
from .tdm import TDM, Draw, Optimizer, OptimizerConfig, RewardPart, Rollout, SamplerConfig, TDMConfig


class SurrogateConfig(BaseModel):
    """How the surrogate reward is learned from group preferences."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    weights: Literal["lora", "full"] = Field(
        "lora",
        json_schema_extra=SHAPES_CHECKPOINT,
        description="lora: an adapter on the backbone, published. full: a transformer of its own, as are its averages; "
        "it learns more and costs three copies; ours, docs/log.md. With model.roles = full it is full anyway.",
    )
    loss: Literal["anchored", "preference"] = Field(
        "anchored", description="anchored: a convex regression, ours. preference: the paper's Eq. 9 and 18."
    )
    reference: Literal["dynamic", "static", "fake"] = Field(
        "static", description="dynamic: EMA of phi (the paper). static: phi's start. fake: the fake score."
    )
    baseline: Literal["reference", "fake"] = Field(
        "fake", description="What the anchored target is measured from; fake makes it exact. Ours, docs/log.md."
    )
    trust_region: Literal["none", "clip", "anchor"] = Field(
        "none", description="Of the preference loss: clip of the log-ratio, or a quadratic anchor to the reference."
    )
    clip: float = Field(
        1e-3, gt=0, description="Largest gain |l_phi - l_ref| that still gives gradient (trust_region clip). Ours."
    )
    anchor_weight: float = Field(10.0, ge=0, description="Weight of |v_phi - v_ref|^2 (trust_region anchor). Ours.")
    beta: float = Field(100.0, gt=0, description="Published; tied to losses that are means over dimensions.")
    kappa: float = Field(1.0, gt=0, description="Scale of the anchored target. Ours.")
    measured_groups: int = Field(2, ge=0, description="Fresh groups a step that phi is measured on first. Ours.")
    draws: int = Field(4, ge=1, description="(k, t, noise) draws, each an update, per rollout. Ours, docs/log.md.")
    points: Literal["all", "final"] = Field(
        "all", description="Trajectory points that phi learns from: every x_{t_k} (the paper), or x_0 alone."
    )
    time_range: tuple[float, float] = Field(
        (0.0, 1.0), description="Noise levels at which phi is trained and used; outside, the KL part acts alone. Ours."
    )
    shared_noise: bool = Field(True, description="One t, k and noise per group. From a neighbour (DGPO).")
    reference_decay: float = Field(0.995, ge=0, lt=1, description="EMA decay of the dynamic reference. Ours.")
    ema_decay: float = Field(0.99, ge=0, lt=1, description="EMA of phi whose direction is used. Ours, docs/log.md.")
    carried: float = Field(
        0.0,
        ge=0,
        description="Weight at which generator and fake score act with the averaged phi's change of weights on top of "
        "their own; 0 is the paper. Ours, docs/method.md.",
    )
    carried_exported: float | None = Field(
        None,
        gt=0,
        description="The same for the averaged generator, which is evaluated and exported; training knows nothing of "
        "it. None: as carried. Ours, docs/log.md.",
    )
    optimizer: OptimizerConfig = OptimizerConfig(learning_rate=3e-4, betas=(0.9, 0.99))

    @field_validator("time_range")
    @classmethod
    def _ordered(cls, value: tuple[float, float]) -> tuple[float, float]:
        low, high = value
        if not 0 <= low < high <= 1:
            raise ValueError("give two noise levels, 0 <= low < high <= 1")
        return value

    @model_validator(mode="after")
    def _carries_in_training(self) -> SurrogateConfig:
        if self.carried_exported and not self.carried:
            raise ValueError(
                f"surrogate.carried_exported = {self.carried_exported} with carried = 0: what is exported carries what "
                "training carries; set surrogate.carried, or carried_exported to null"
            )
        return self

    @model_validator(mode="after")
    def _averages_differ(self) -> SurrogateConfig:
        if self.reference == "dynamic" and self.ema_decay >= self.reference_decay:
            raise ValueError(
                f"surrogate.ema_decay = {self.ema_decay} with reference_decay = {self.reference_decay}: the reward is "
                "the averaged phi against its dynamic reference, a slower average; lower ema_decay"
            )
        return self


class BalanceConfig(BaseModel):
    """The weight of the reward's part of the generator's direction against the KL part."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    policy: Literal["fixed", "ratio"] = Field(
        "fixed", description="fixed: a guidance scale. ratio: a slow, bounded controller towards reward:KL = ratio."
    )
    scale: float = Field(4.0, ge=0, description="The guidance scale, and the controller's start. Ours, docs/log.md.")
    ratio: float = Field(2.0, gt=0, description="Published: reward:KL gradient 2:1.")
    rate: float = Field(0.02, gt=0, description="The controller's step in log scale. Ours.")
    bounds: tuple[float, float] = Field((0.5, 20.0), description="Bounds of the controlled scale. Ours.")


class Balance:
    """The named policy that weighs reward against KL. Its state is one number, and it is logged.

    Rescaling every batch to the wanted ratio runs away: off-manifold students raise the KL part, and the rule raises
    the reward with it. The controller moves by at most ``rate`` an iteration and stays within bounds.
    """

    def __init__(self, config: BalanceConfig) -> None:
        self.config = config
        self.scale = config.scale

    def state(self) -> dict[str, float]:
        return {"scale": self.scale, "start": self.config.scale}

    def load_state(self, state: dict[str, float]) -> None:
        """Goes on with the controlled scale, unless the run now asks for another start. A fixed scale is a setting."""
        if self.config.policy == "ratio" and state["start"] == self.config.scale:
            self.scale = state["scale"]

    def update(self, reward_part: float, kl_part: float) -> None:
        if self.config.policy == "fixed" or not reward_part > 0:
            return
        error = math.log(self.config.ratio * max(kl_part, 1e-12) / reward_part)
        low, high = self.config.bounds
        self.scale *= math.exp(self.config.rate * max(-1.0, min(1.0, error)))
        self.scale = max(low, min(high, self.scale))


Score = Callable[[Tensor], Tensor]
"""Decodes final latents [P*G, C, H, W] and scores them with the black box: rewards [P*G], NaN where missing."""


class TDMR1:
    """Algorithm 1. Samples of one prompt (a group) are consecutive rows throughout.

    Args:
        iterations: of the whole run; learning rates that decay are stretched to it.
        group_size: samples of a prompt that are rolled out and scored, G.
        trained: samples of each group that every update sees: its extremes in the surrogate's, any in the others'.
        micro_batch: samples that go through the network at once.
    """

    def __init__(
        self,
        roles: Roles,
        empty: Conditioning,
        sampler: SamplerConfig,
        tdm: TDMConfig,
        surrogate: SurrogateConfig,
        balance: BalanceConfig,
        *,
        iterations: int,
        group_size: int,
        trained: int,
        micro_batch: int,
    ) -> None:
        self.roles = roles
        self.config = surrogate
        self.group_size = group_size
        self.trained = trained
        self.tdm = TDM(roles, empty, sampler, tdm, iterations=iterations, micro_batch=micro_batch)
        updates = iterations * surrogate.draws
        self.surrogate = Optimizer(roles.parameters(Role.SURROGATE), surrogate.optimizer, total=updates)
        self.balance = Balance(balance)
        self.probe = Probe()

    def step(self, conditioning: Conditioning, x_1: Tensor, score: Score, noise: torch.Generator) -> dict[str, float]:
        """One iteration of Algorithm 1 on ``conditioning`` [P * G] and noise ``x_1`` [P * G, C, H, W]."""
        # 1. Roll the generator out along its deterministic trajectory, keeping every x_{t_k}; decode and score x_0.
        rollout = self.tdm.roll_out(conditioning, x_1, noise)
        rewards = score(rollout.trajectory.final)

        # 2. Advantages inside each group. The trajectory is deterministic: r_i is exact for every x_{t_k}^i.
        groups = group_advantages(rewards.reshape(-1, self.group_size), keep=self.trained)
        advantage, rows = groups.advantage.flatten(), groups.used.flatten().nonzero()[:, 0]
        metrics = {
            "reward/mean": float(rewards.nanmean()),
            "reward/missing": float(rewards.isnan().sum()),
            "reward/skipped_groups": float(groups.skipped_groups),
        }

        # 3. The surrogate learns the preference at drawn (k, t, noise), t >= t_k (Eq. 8, 9, 18), and
        # 4. the reference follows it. Phi is measured on fresh groups before it learns from them.
        metrics |= self.measure_surrogate(rollout, advantage, noise)
        for _ in range(self.config.draws):
            metrics |= self.fit_surrogate(rollout, advantage, rows, noise)
            self.update_reference()

        # 5. The fake score follows the generator's own samples (Eq. 1): the first of each group, not its extremes.
        rollout = rollout.rows(torch.arange(len(rollout)).reshape(-1, self.group_size)[:, : self.trained].flatten())
        for _ in range(self.tdm.config.fake_steps):
            metrics |= self.tdm.fit_fake(rollout, noise)

        # 6. The generator moves along reward and KL (Eq. 10, 11).
        metrics |= self.tdm.fit_generator(rollout, noise, self.reward_part)
        self.balance.update(metrics["generator/reward_part"], metrics["generator/kl_part"])
        return metrics | {"generator/reward_scale": self.balance.scale}

    # -------------------------------------------------------------------------------------- 3, 4

    def fit_surrogate(
        self, rollout: Rollout, advantage: Tensor, rows: Tensor, noise: torch.Generator
    ) -> dict[str, float]:
        """One update of phi on the samples in ``rows``, those that carry signal, at a fresh draw of (k, t, noise)."""
        draw = self._draw(rollout, noise, self.group_size if self.config.shared_noise else 1)
        if len(rows) == 0:
            return {}
        if self.config.loss == "anchored":
            metrics = self._fit_anchored(rollout, advantage, draw, rows)
        else:
            metrics = self._fit_preference(rollout, advantage, draw, rows)
        return metrics | {"surrogate/grad_norm": self.surrogate.step()}

    def _fit_anchored(self, rollout: Rollout, advantage: Tensor, draw: Draw, rows: Tensor) -> dict[str, float]:
        total, distance = 0.0, 0.0
        for part in rows.split(self.tdm.micro_batch):
            x_t, t, c = draw.x_t[part], draw.t[part], rollout.conditioning.rows(part)
            v_ref = self._reference_velocity(x_t, t, c)
            v_base = self._baseline_velocity(x_t, t, c, draw.index[part], v_ref)
            with self.roles.use(Role.SURROGATE) as velocity:
                v_phi = velocity(x_t, t, c)
                loss = losses.anchored_regression(
                    v_phi,
                    v_ref,
                    v_base,
                    x_t,
                    draw.eps[part],
                    draw.s[part],
                    t,
                    advantage[part],
                    kappa=self.config.kappa,
                )
                (loss.sum() / len(rows)).backward()
            total += float(loss.detach().sum()) / len(rows)
            distance += float((v_phi.detach() - v_ref).square().mean()) * len(part) / len(rows)
        return {"surrogate/loss": total, "surrogate/distance_from_reference": distance}

    def _fit_preference(self, rollout: Rollout, advantage: Tensor, draw: Draw, rows: Tensor) -> dict[str, float]:
        """The group sum stands inside the sigmoid: a first pass without gradient finds it, a second one follows the
        sigmoid's slope, so that a group in several micro-batches gives the exact gradient."""
        config, n_groups = self.config, len(rollout) // self.group_size
        group = torch.arange(len(rollout), device=advantage.device) // self.group_size
        parts = rows.split(self.tdm.micro_batch)
        with torch.no_grad():  # pass one: the value inside each group's sigmoid
            inside = torch.cat([self._preference_terms(rollout, advantage, draw, part)[0] for part in parts])
        sums = inside.new_zeros(n_groups).index_add(0, group[rows], inside)
        sums.requires_grad_(True)
        loss_of_groups = losses.group_preference(sums, beta=config.beta)
        (slope,) = torch.autograd.grad(loss_of_groups.sum(), sums)
        used = group[rows].unique()
        distance = 0.0
        for part in parts:
            with self.roles.use(Role.SURROGATE):
                terms, gap = self._preference_terms(rollout, advantage, draw, part)
                loss = (slope[group[part]] * terms).sum() / len(used)
                if config.trust_region == "anchor":
                    loss = loss + config.anchor_weight * gap.sum() / len(rows)
                loss.backward()
            distance += float(gap.detach().sum()) / len(rows)
        return {
            "surrogate/loss": float(loss_of_groups[used].detach().mean()),
            "surrogate/saturation": float(losses.saturation(config.beta * sums[used].detach())),
            "surrogate/distance_from_reference": distance,
        }

    def _preference_terms(self, rollout: Rollout, advantage: Tensor, draw: Draw, part: Tensor) -> tuple[Tensor, Tensor]:
        """(T - t_k) A_i (l_phi - l_ref) of the samples in ``part``, over the group size; and |v_phi - v_ref|^2."""
        x_t, eps, s, t = draw.x_t[part], draw.eps[part], draw.s[part], draw.t[part]
        c = rollout.conditioning.rows(part)
        v_ref = self._reference_velocity(x_t, t, c)
        with self.roles.use(Role.SURROGATE) as velocity:
            v_phi = velocity(x_t, t, c)
        loss_phi, loss_ref = (losses.denoising(v, x_t, eps, s, t) for v in (v_phi, v_ref))
        if self.config.trust_region == "clip":
            loss_phi = loss_ref + losses.clipped(loss_phi - loss_ref, advantage[part], self.config.clip)
        terms = losses.preference_terms(loss_phi, loss_ref, advantage[part], 1 - s) / self.group_size
        return terms, (v_phi - v_ref).square().flatten(1).mean(1)

    def _draw(self, rollout: Rollout, noise: torch.Generator, group_size: int) -> Draw:
        c = self.config
        return self.tdm.draw(rollout, noise, group_size=group_size, points=c.points, time_range=c.time_range)

    @torch.no_grad()  # a constant of the surrogate's loss
    def _reference_velocity(self, x_t: Tensor, t: Tensor, c: Conditioning) -> Tensor:
        with self.roles.use(self._reference_role()) as velocity:
            return velocity(x_t, t, c)

    @torch.no_grad()  # so is the baseline
    def _baseline_velocity(self, x_t: Tensor, t: Tensor, c: Conditioning, index: Tensor, v_ref: Tensor) -> Tensor:
        """What the anchored targets are measured from; the preference loss knows the reference alone."""
        anchored = self.config.loss == "anchored" and self.config.baseline == "fake"
        return self.tdm.fake_velocity(x_t, t, c, index) if anchored else v_ref

    def _reference_role(self) -> Role:
        match self.config.reference:
            case "fake":
                return Role.FAKE
            case "static":
                return Role.TEACHER
            case _:
                return Role.REFERENCE

    def update_reference(self) -> None:
        """ref <- EMA(phi), and the averaged phi whose direction the generator follows."""
        if self.config.reference == "dynamic":
            self.roles.average(Role.REFERENCE, Role.SURROGATE, self.config.reference_decay)
        self.roles.average(Role.SURROGATE_EMA, Role.SURROGATE, self.config.ema_decay)

    # -------------------------------------------------------------------------------------- 6

    @torch.no_grad()  # the reward's gradient is a stop-gradient in Eq. 11
    def reward_part(self, x_t: Tensor, t: Tensor, c: Conditioning) -> Tensor:
        """Eq. 10: lambda times the direction in which log p_phi(x_t)/p_ref(x_t) falls."""
        with self.roles.use(Role.SURROGATE_EMA) as velocity:
            x0_phi = flow.x0_from_v(velocity(x_t, t, c), x_t, t)
        x0_ref = flow.x0_from_v(self._reference_velocity(x_t, t, c), x_t, t)
        low, high = self.config.time_range
        used = flow.expand((t >= low) & (t <= high), x_t)
        return self.balance.scale * used * losses.reward_direction(x0_phi, x0_ref)

    # -------------------------------------------------------------------------------------- diagnostics

    @torch.no_grad()  # diagnostics only
    def measure_surrogate(self, rollout: Rollout, advantage: Tensor, noise: torch.Generator) -> dict[str, float]:
        """On groups that phi has not seen yet: how often its implicit reward orders a better and a worse sample
        rightly (.5 is chance). On a probe that stays the same: how far successive reward directions agree."""
        rows = torch.arange(len(rollout), device=advantage.device)[: self.config.measured_groups * self.group_size]
        advantage = advantage[rows]
        if not bool(advantage.any()):
            return {}
        draw = self._draw(rollout, noise, self.group_size)
        batch = self.tdm.micro_batch
        implicit = torch.cat([self._implicit_reward(rollout, draw, part) for part in rows.split(batch)])
        direction_of = in_parts(self.reward_part, batch)
        points = draw.x_t[rows], draw.t[rows], rollout.conditioning.rows(rows)
        return {
            "surrogate/preference_accuracy": preference_accuracy(implicit, advantage, self.group_size),
            "surrogate/direction_cosine": self.probe.cosine(*points, direction_of),
        }

    def _implicit_reward(self, rollout: Rollout, draw: Draw, part: Tensor) -> Tensor:
        """By how much phi's change, on top of what its targets start from, explains the samples in ``part`` better."""
        x_t, eps, s, t = draw.x_t[part], draw.eps[part], draw.s[part], draw.t[part]
        c = rollout.conditioning.rows(part)
        v_ref = self._reference_velocity(x_t, t, c)
        v_base = self._baseline_velocity(x_t, t, c, draw.index[part], v_ref)
        with self.roles.use(Role.SURROGATE_EMA) as velocity:
            v_phi = v_base + velocity(x_t, t, c) - v_ref
        return losses.denoising(v_base, x_t, eps, s, t) - losses.denoising(v_phi, x_t, eps, s, t)

    def state(self) -> dict:
        return {"tdm": self.tdm.state(), "surrogate": self.surrogate.state(), "balance": self.balance.state()}

    def load_state(self, state: dict) -> None:
        self.tdm.load_state(state["tdm"])
        self.surrogate.load_state(state["surrogate"])
        self.balance.load_state(state["balance"])


class Probe:
    """The first batch that it is shown, kept, to compare successive reward directions on."""

    def __init__(self) -> None:
        self._points: tuple[Tensor, Tensor, Conditioning] | None = None
        self._last: Tensor | None = None

    def cosine(self, x_t: Tensor, t: Tensor, c: Conditioning, direction_of: RewardPart) -> float:
        """Mean cosine between the direction now and at the last call; NaN at the first."""
        self._points = self._points or (x_t, t, c)
        direction = direction_of(*self._points).flatten(1)
        last, self._last = self._last, direction
        return math.nan if last is None else float(nn.functional.cosine_similarity(direction, last).mean())


def preference_accuracy(implicit: Tensor, advantage: Tensor, group_size: int) -> float:
    """Share of pairs inside a group with unlike advantages that ``implicit`` orders alike; .5 is chance."""
    r, a = implicit.reshape(-1, group_size), advantage.reshape(-1, group_size)
    better = a[:, :, None] > a[:, None, :] + 1e-6
    right = (r[:, :, None] > r[:, None, :]) & better
    return float(right.sum() / better.sum().clamp_min(1))
