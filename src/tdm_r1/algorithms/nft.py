"""DiffusionNFT: negative-aware fine-tuning on the forward process (arXiv 2509.16117).

An average of the policy makes the samples. Two velocities, one on either side of the average, learn to denoise them:
one the better samples, the other the worse. Written from a description of github.com/NVlabs/DiffusionNFT.
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

LEFT_OUT = 1  # steps of the sampler of which a sample is not trained at


class DiffusionNFT(Policy):
    """Nothing is shared inside a group but the advantage."""

    name = "nft"

    def __init__(self, roles: Roles, empty: Conditioning, settings: AlgorithmSettings) -> None:
        super().__init__(roles, empty, settings)
        self.config = settings.nft

    def step(self, batch: Batch) -> Step:
        """One iteration: samples, scores, one update."""
        seconds = Stopwatch()
        with seconds("rollout"):
            rollout = self.roll_out(batch, OLD)
        rewards = yield rollout.trajectory.final
        advantage, metrics = self.advantages(batch, rewards)
        with seconds("generator"):
            metrics |= self.fit(rollout, advantage, batch.noise)
            metrics |= self.update()
        return metrics | seconds.read()

    def fit(self, rollout: Rollout, advantage: Tensor, noise: torch.Generator) -> dict[str, float]:
        """Accumulates the gradient of 5 / b (r loss+ + (1 - r) loss-), 5 the advantages' bound.

        Each sample is trained at all noise levels of the sampler but one.
        """
        c, sums, n, x_0 = self.config, Sums(), len(rollout), rollout.trajectory.final
        grid = flow.few_step_grid(self.sampler.steps, self.sampler.shift)[:-1].to(x_0)
        clip = self.policy.advantage_clip
        r = 0.5 + advantage / (2 * clip)
        orders = torch.rand(n, self.sampler.steps, generator=noise).argsort(1)[:, LEFT_OUT:]
        share = 1 / (n * orders.shape[1])
        for index in orders.unbind(1):
            t, normal = grid[index], Normal.drawn(noise, x_0.shape[1:])
            for rows in rollout.micro_batches(self.micro_batch):
                x_t = flow.add_noise(x_0[rows], normal[rows].to(x_0), t[rows])
                text, at = rollout.conditioning.rows(rows), (x_t, t[rows])
                v_ref, v_old = (self.velocity(role, *at, text) for role in (Role.REFERENCE, OLD))
                with self.roles.use(Role.GENERATOR) as velocity:
                    v = velocity(*at, text)
                    better, worse = (
                        losses.normalized_error(side, *at, x_0[rows])
                        for side in (c.mixture * v + (1 - c.mixture) * v_old, (1 + c.mixture) * v_old - c.mixture * v)
                    )
                    gap = losses.squared_error(v, v_ref)
                    terms = clip / c.mixture * (r[rows] * better + (1 - r[rows]) * worse)
                    ((terms + c.kl_weight * gap).sum() * share).backward()
                sums.add("generator/loss", terms.sum(), share)
                sums.add("generator/distance_from_start", gap.sum(), share)
        return sums.read()

    # -------------------------------------------------------------------------------------- declarations

    @classmethod
    def declare_roles(cls, settings: AlgorithmSettings) -> tuple[RoleSpec, ...]:
        return (*super().declare_roles(settings), old_of(settings, settings.nft.old_decay))

    @classmethod
    def evaluations(cls, settings: AlgorithmSettings) -> dict[str, Evaluations]:
        b, s = settings.batch, settings.sampler
        samples, twice = b.prompts * b.group, 1 if s.guidance == 1 else 2
        trained = (s.steps - LEFT_OUT) * samples
        return {
            "rollout": Evaluations(twice * s.steps * samples, at_once=twice),
            "generator": Evaluations(2 * trained, trained, Role.GENERATOR),
        }
