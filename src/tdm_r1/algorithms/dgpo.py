"""DGPO: direct group preference optimisation of a flow model (arXiv 2510.08425), as its authors' code has it.

The model learns the preference of each group by its own denoising loss on final samples; TDM-R1's surrogate is the same
loss on another model. Written from a description of github.com/Luo-Yihong/DGPO, not from its code.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..core import flow, losses
from ..core.randomness import Normal
from ..models.protocol import Conditioning
from ..models.roles import Roles
from ..models.specification import Role, RoleSpec
from .metrics import Stopwatch, Sums
from .policy import OLD, Policy, old_of
from .protocol import Batch, Evaluations, Step
from .rollout import Rollout
from .settings import AlgorithmSettings

OLD_DECAY = 0.3  # of the average that the clip is taken against, at most


class DGPO(Policy):
    """Samples of one prompt (a group) are consecutive rows, and a micro-batch holds whole groups."""

    name = "dgpo"

    def __init__(self, roles: Roles, empty: Conditioning, settings: AlgorithmSettings) -> None:
        super().__init__(roles, empty, settings)
        self.config = settings.dgpo

    def step(self, batch: Batch) -> Step:
        """One iteration: samples, scores, one update."""
        seconds, late = Stopwatch(), self.optimizer.updates > self.config.roll_out_average_after
        with seconds("rollout"):
            rollout = self.roll_out(batch, OLD if late else Role.GENERATOR)
        rewards = yield rollout.trajectory.final
        advantage, metrics = self.advantages(batch, rewards)
        with seconds("generator"):
            metrics |= self.fit(rollout, advantage, batch.noise)
            metrics |= self.update()
        return metrics | seconds.read()

    def fit(self, rollout: Rollout, advantage: Tensor, noise: torch.Generator, weight: float = 1.0) -> dict[str, float]:
        """Accumulates ``weight`` times the gradient at ``draws`` noise levels; metrics.

        Of each sample w_g A_i l_i and ``kl_weight`` |v - v_ref|^2, where w_g is the sigmoid of its group.
        """
        c, sums, n = self.config, Sums(), len(rollout)
        x_0, times = rollout.trajectory.final, self.draw_times(noise)
        for time in times:
            t = time.to(x_0).expand(n)
            normal = Normal.drawn(noise, x_0.shape[1:], shared=self.group)
            for rows in rollout.micro_batches(self.micro_batch, group=self.group):
                text, a, eps = rollout.conditioning.rows(rows), advantage[rows], normal[rows].to(x_0)
                target, at = eps - x_0[rows], (flow.add_noise(x_0[rows], eps, t[rows]), t[rows])
                v_ref, v_old = (self.velocity(role, *at, text) for role in (Role.REFERENCE, OLD))
                with self.roles.use(Role.GENERATOR) as velocity:
                    v = velocity(*at, text)
                    loss, gap = losses.squared_error(v, target), losses.squared_error(v, v_ref)
                    with torch.no_grad():  # the sigmoid's slope and the clip are constants of the loss
                        loss_ref, loss_old = (losses.squared_error(u, target) for u in (v_ref, v_old))
                        slope = losses.group_slope(loss, loss_ref, a, self.group, c.beta)
                        held = losses.held_by_ratio(loss, loss_old, a, c.clip)
                    terms = slope * a * torch.where(held, loss.detach(), loss) + c.kl_weight * gap
                    (weight * terms.sum() / (n * len(times))).backward()
                share = 1 / (n * len(times))
                for name, value in {"loss": terms, "distance_from_start": gap, "held_by_ratio": held}.items():
                    sums.add(f"generator/{name}", value.sum(), share)
        return sums.read()

    def draw_times(self, noise: torch.Generator) -> Tensor:
        """Noise levels [M] of the sampler's grid, at least ``time_low`` before the shift, without repeats."""
        steps = self.sampler.steps
        known = torch.linspace(1, 0, steps + 1, dtype=torch.float64)[:-1]
        known = known[known >= self.config.time_low - 1e-9]
        drawn = known[torch.randperm(len(known), generator=noise)[: self.config.draws]]
        return flow.shift_time(drawn, self.sampler.shift)

    # -------------------------------------------------------------------------------------- declarations

    @classmethod
    def declare_roles(cls, settings: AlgorithmSettings) -> tuple[RoleSpec, ...]:
        return (*super().declare_roles(settings), old_of(settings, OLD_DECAY))

    @classmethod
    def evaluations(cls, settings: AlgorithmSettings) -> dict[str, Evaluations]:
        c, b, s = settings.dgpo, settings.batch, settings.sampler
        samples, twice = b.prompts * b.group, 1 if s.guidance == 1 else 2
        return {
            "rollout": Evaluations(twice * s.steps * samples, at_once=twice),
            "generator": Evaluations(2 * c.draws * samples, c.draws * samples, Role.GENERATOR),
        }
