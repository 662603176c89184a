"""The surrogate reward: a diffusion model phi learned from group preferences (steps 3 and 4 of Algorithm 1)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..core import flow, losses, processes
from ..models.protocol import Conditioning, Velocity, in_parts
from ..models.roles import Roles
from ..models.specification import Role
from .metrics import Sums
from .optimizer import Optimizer
from .rollout import Draw, Rollout, draw_points, micro_batches
from .settings import AlgorithmSettings
from .tdm import TDM, RewardPart


class Surrogate:
    """Phi, its reference and its optimizer.

    Args:
        tdm: whose fake score may be the reference or the baseline.
    """

    def __init__(self, roles: Roles, tdm: TDM, settings: AlgorithmSettings) -> None:
        self.roles, self.tdm, self.config = roles, tdm, settings.surrogate
        self.group_size, self.micro_batch = settings.batch.group, settings.batch.micro_batch
        self.trained = trained_of_group(settings)
        total = settings.iterations * self.config.draws
        self.optimizer = Optimizer(roles.parameters(Role.SURROGATE), self.config.optimizer, total=total)
        self.probe = Probe()

    def fit(self, rollout: Rollout, advantage: Tensor, rows: Tensor, noise: torch.Generator) -> dict[str, float]:
        """One update of phi on the samples in ``rows``, those that carry signal, at a fresh draw of (k, t, noise)."""
        draw = self.draw(rollout, noise, self.group_size if self.config.shared_noise else 1)
        metrics: dict[str, float] = {}
        if len(rows):
            fit = self._fit_anchored if self.config.loss == "anchored" else self._fit_preference
            metrics = fit(rollout, advantage, draw, rows)
            metrics |= {f"surrogate/{name}": value for name, value in self.optimizer.step().items()}
        self.roles.update_averages(Role.SURROGATE)  # the reference, where it is dynamic, and the phi that is used
        return metrics

    def _fit_anchored(self, rollout: Rollout, advantage: Tensor, draw: Draw, rows: Tensor) -> dict[str, float]:
        n, sums = len(rows), Sums()
        for part in micro_batches(rows, self.micro_batch):
            here, c = draw.rows(part), rollout.conditioning.rows(part)
            v_ref = self.reference_velocity(here.x_t, here.t, c)
            v_base = self.baseline_velocity(here.x_t, here.t, c, here.index, v_ref)
            with self.roles.use(Role.SURROGATE) as velocity:
                v_phi = velocity(here.x_t, here.t, c)
                loss = losses.anchored_regression(
                    v_phi,
                    v_ref,
                    v_base,
                    here.x_t,
                    here.eps,
                    here.s,
                    here.t,
                    advantage[part],
                    kappa=self.config.kappa,
                )
                (loss.sum() / n).backward()
            sums.add("surrogate/loss", loss.sum(), 1 / n)
            sums.add("surrogate/distance_from_reference", losses.squared_error(v_phi, v_ref).sum(), 1 / n)
        return sums.read()

    def _fit_preference(self, rollout: Rollout, advantage: Tensor, draw: Draw, rows: Tensor) -> dict[str, float]:
        """Eq. 8, 9 and 18. The group's sum stands inside the sigmoid. Groups that are larger than a micro-batch, or too
        few to give every process one, take a first pass without gradient that finds the sums, and a second that follows
        the sigmoid's slope there: so the gradient is exact."""
        group = torch.arange(len(rollout), device=rows.device) // self.group_size
        used = group[rows].unique()
        parts = self._whole_groups(rows, group, used)
        split = parts is None
        parts = list(micro_batches(rows, self.micro_batch)) if parts is None else parts
        sums_of_groups = self._sums_of_groups(rollout, advantage, draw, parts, group) if split else None
        slope = _slope(sums_of_groups, self.config.beta) if sums_of_groups is not None else None
        metrics = Sums()
        for part in parts:
            with self.roles.use(Role.SURROGATE):
                terms, gap = self._preference_terms(rollout, advantage, draw, part)
                if slope is not None:
                    loss = (slope[group[part]] * terms).sum()
                else:
                    sums = _sum_by(terms, group[part])
                    loss = losses.group_preference(sums, beta=self.config.beta).sum()
                    self._measure_loss(metrics, sums.detach(), len(used))
                loss = loss / len(used)
                if self.config.trust_region == "anchor":
                    loss = loss + self.config.anchor_weight * gap.sum() / len(rows)
                loss.backward()
            metrics.add("surrogate/distance_from_reference", gap.sum(), 1 / len(rows))
        if sums_of_groups is not None:  # every process has all of them
            self._measure_loss(metrics, sums_of_groups[used], len(used) * processes.count())
        return metrics.read()

    def _measure_loss(self, metrics: Sums, sums: Tensor, of: int) -> None:
        beta = self.config.beta
        metrics.add("surrogate/loss", losses.group_preference(sums, beta=beta).sum(), 1 / of)
        if len(sums):
            metrics.add("surrogate/saturation", losses.saturation(beta * sums), len(sums) / of)

    def _whole_groups(self, rows: Tensor, group: Tensor, used: Tensor) -> list[Tensor] | None:
        """This process's share of ``rows`` in parts that split no group; None if that cannot be, or leaves one idle."""
        parts = whole_groups(rows, group[rows], self.micro_batch)
        if parts is None or processes.count() == 1:
            return parts
        if len(used) < processes.count():
            return None
        own = rows[torch.isin(group[rows], processes.mine(used))]
        parts = whole_groups(own, group[own], self.micro_batch) or []
        return processes.in_step(parts, max(processes.gather_each(len(parts))), 1)

    @torch.no_grad()  # the value inside each group's sigmoid
    def _sums_of_groups(
        self, rollout: Rollout, advantage: Tensor, draw: Draw, parts: list[Tensor], group: Tensor
    ) -> Tensor:
        sums = advantage.new_zeros(len(rollout) // self.group_size)
        for part in parts:
            inside, _ = self._preference_terms(rollout, advantage, draw, part)
            sums.index_add_(0, group[part].to(sums.device), inside.to(sums))
        return processes.sum_of(sums)

    def _preference_terms(self, rollout: Rollout, advantage: Tensor, draw: Draw, part: Tensor) -> tuple[Tensor, Tensor]:
        """Of the samples in ``part``: (T - t_k) A_i (l_phi - l_ref) over a group's trained ones, |v_phi - v_ref|^2."""
        here, c = draw.rows(part), rollout.conditioning.rows(part)
        x_t, eps, s, t = here.x_t, here.eps, here.s, here.t
        v_ref = self.reference_velocity(x_t, t, c)
        with self.roles.use(Role.SURROGATE) as velocity:
            v_phi = velocity(x_t, t, c)
        loss_phi, loss_ref = (losses.denoising(v, x_t, eps, s, t) for v in (v_phi, v_ref))
        if self.config.trust_region == "clip":
            loss_phi = loss_ref + losses.clipped(loss_phi - loss_ref, advantage[part], self.config.clip)
        terms = losses.preference_terms(loss_phi, loss_ref, advantage[part], 1 - s) / self.trained
        return terms, (v_phi - v_ref).square().flatten(1).mean(1)

    def draw(self, rollout: Rollout, noise: torch.Generator, group_size: int) -> Draw:
        """Points and noise levels that phi is trained at."""
        c = self.config
        return draw_points(rollout, noise, group_size=group_size, points=c.points, time_range=c.time_range)

    @torch.no_grad()  # a constant of the surrogate's loss
    def reference_velocity(self, x_t: Tensor, t: Tensor, c: Conditioning) -> Tensor:
        """What phi's change is measured against: its start, its slow average or the fake score."""
        role = {"fake": Role.FAKE, "static": Role.TEACHER, "dynamic": Role.REFERENCE}[self.config.reference]
        with self.roles.use(role) as velocity:
            return velocity(x_t, t, c)

    @torch.no_grad()  # so is the baseline
    def baseline_velocity(self, x_t: Tensor, t: Tensor, c: Conditioning, index: Tensor, v_ref: Tensor) -> Tensor:
        """What the anchored targets are measured from; the preference loss has the reference alone."""
        fake = self.config.loss == "anchored" and self.config.baseline == "fake"
        return self.tdm.fake_velocity(x_t, t, c, index) if fake else v_ref

    @torch.no_grad()  # the reward's gradient is a stop-gradient in Eq. 11
    def direction(self, x_t: Tensor, t: Tensor, c: Conditioning, v_teacher: Tensor | None = None) -> Tensor:
        """Eq. 10: the direction in which log p_phi(x_t)/p_ref(x_t) falls, at the noise levels of phi's training.

        Args:
            v_teacher: the teacher's velocity where it is known: the static reference is the teacher.
        """
        with self.roles.use(Role.SURROGATE_EMA) as velocity:
            x0_phi = flow.x0_from_v(velocity(x_t, t, c), x_t, t)
        known = v_teacher if self.config.reference == "static" else None
        x0_ref = flow.x0_from_v(self.reference_velocity(x_t, t, c) if known is None else known, x_t, t)
        low, high = self.config.time_range
        return flow.expand((t >= low) & (t <= high), x_t) * losses.reward_direction(x0_phi, x0_ref)

    def state(self) -> dict[str, Any]:
        return {"optimizer": self.optimizer.state(), "probe": self.probe.state()}

    def load_state(self, state: Mapping[str, Any]) -> None:
        self.optimizer.load_state(state.get("optimizer", state))  # in older checkpoints that was all
        device = self.roles.parameters(Role.SURROGATE)[0].device
        self.probe.load_state(state.get("probe", {}), device)

    # -------------------------------------------------------------------------------------- diagnostics

    @torch.no_grad()  # diagnostics only
    def measure(
        self, rollout: Rollout, advantage: Tensor, noise: torch.Generator, part: RewardPart
    ) -> dict[str, float]:
        """On groups that phi was not trained on yet: how often its implicit reward orders a better and a worse sample
        rightly (0.5 is chance). On a probe that stays the same: the cosine of successive reward directions."""
        rows = torch.arange(len(rollout))[: self.config.measured_groups * self.group_size]
        advantage = advantage[rows]
        if not bool(advantage.any()):
            return {}
        draw = self.draw(rollout, noise, self.group_size)
        parts = [self._implicit_reward(rollout, draw, some) for some in micro_batches(rows, self.micro_batch)]
        implicit = processes.gather(torch.cat(parts), len(rows))
        accuracy = preference_accuracy(implicit, advantage, self.group_size)

        def points() -> tuple[Tensor, Tensor, Conditioning]:
            here = draw.rows(rows)
            return here.x_t, here.t, rollout.conditioning.rows(rows).compact()

        direction = in_parts(part, self.micro_batch, most=processes.most(len(rows)))
        cosine = float(self.probe.cosines(points, direction).mean())
        return {"surrogate/preference_accuracy": accuracy, "surrogate/direction_cosine": cosine}

    def _implicit_reward(self, rollout: Rollout, draw: Draw, part: Tensor) -> Tensor:
        """By how much phi's change, on top of what its targets start from, explains the samples in ``part`` better."""
        here, c = draw.rows(part), rollout.conditioning.rows(part)
        x_t, eps, s, t = here.x_t, here.eps, here.s, here.t
        v_ref = self.reference_velocity(x_t, t, c)
        v_base = self.baseline_velocity(x_t, t, c, here.index, v_ref)
        with self.roles.use(Role.SURROGATE_EMA) as velocity:
            v_phi = v_base + velocity(x_t, t, c) - v_ref
        return losses.denoising(v_base, x_t, eps, s, t) - losses.denoising(v_phi, x_t, eps, s, t)


def trained_of_group(settings: AlgorithmSettings) -> int:
    """Samples of a group that phi learns from."""
    return max(round(settings.surrogate.trained_share * settings.batch.trained_of_group), 2)


def whole_groups(rows: Tensor, group: Tensor, size: int) -> list[Tensor] | None:
    """``rows`` in parts of at most ``size`` that split no group; None if a group is larger. Groups are consecutive."""
    parts: list[list[Tensor]] = []
    room = 0
    for members in torch.split(rows, group.unique_consecutive(return_counts=True)[1].tolist()):
        if len(members) > size:
            return None
        if len(members) > room:
            parts.append([])
            room = size
        parts[-1].append(members)
        room -= len(members)
    return [torch.cat(part) for part in parts]


def _sum_by(terms: Tensor, group: Tensor) -> Tensor:
    """Sums of the terms of each group that occurs, [n]."""
    which, inverse = group.unique(return_inverse=True)
    return terms.new_zeros(len(which)).index_add(0, inverse.to(terms.device), terms)


def _slope(sums: Tensor, beta: float) -> Tensor:
    """d group_preference / d sum of each group."""
    sums = sums.detach().requires_grad_(True)
    (slope,) = torch.autograd.grad(losses.group_preference(sums, beta=beta).sum(), sums)
    return slope


class Probe:
    """The first batch that it is given, kept, to compare successive reward directions on; the same in every process."""

    def __init__(self) -> None:
        self._points: tuple[Tensor, Tensor, Conditioning] | None = None
        self._last: Tensor | None = None

    def cosines(self, points: Callable[[], tuple[Tensor, Tensor, Conditioning]], direction_of: Velocity) -> Tensor:
        """Cosine of each sample between the direction now and at the last call, [B]; NaN at the first.

        Args:
            points: gives x_t, t and the conditioning of the batch; asked once.
        """
        self._points = self._points or points()
        x_t, t, c = self._points
        own = processes.mine(torch.arange(len(x_t)))
        direction = processes.gather(direction_of(x_t[own], t[own], c.rows(own)).flatten(1), len(x_t))
        last, self._last = self._last, direction
        if last is None:
            return torch.full((len(direction),), math.nan)
        return nn.functional.cosine_similarity(direction, last.to(direction))

    def state(self) -> dict[str, Any]:
        if self._points is None:
            return {}
        x_t, t, c = self._points
        return {"x_t": x_t, "t": t, "index": c.index, "conditioning": dict(c.tensors), "last": self._last}

    def load_state(self, state: Mapping[str, Any], device: torch.device) -> None:
        if state:
            c = Conditioning(state["conditioning"], state["index"]).to(device)
            self._points, self._last = (state["x_t"].to(device), state["t"].to(device), c), state["last"]


def preference_accuracy(implicit: Tensor, advantage: Tensor, group_size: int) -> float:
    """Share of pairs inside a group with unlike advantages that ``implicit`` orders alike; 0.5 is chance."""
    r, a = implicit.reshape(-1, group_size), advantage.reshape(-1, group_size)
    better = a[:, :, None] > a[:, None, :] + 1e-6
    right = (r[:, :, None] > r[:, None, :]) & better
    return float(right.sum() / better.sum().clamp_min(1))
