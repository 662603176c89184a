"""Flow-GRPO: policy gradients through a stochastic sampler (arXiv 2505.05470).

Written from a description of github.com/yifan123/flow_grpo, not from its code.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..core import flow, losses, processes, sde
from ..core.randomness import Normal
from ..models.protocol import Conditioning, guided, in_parts
from ..models.roles import Roles
from ..models.specification import Role
from .metrics import Stopwatch, Sums, mean_of_each
from .policy import Policy
from .protocol import Batch, Evaluations, Step
from .rollout import micro_batches
from .settings import AlgorithmSettings


@dataclass(frozen=True)
class Walk:
    """Trajectories whose last step alone has no noise. points: [K + 1, B, ...]. log_likelihood: [K - 1, B]."""

    points: Tensor
    log_likelihood: Tensor


class FlowGRPO(Policy):
    """All steps of the sampler but the last are trained."""

    name = "flow_grpo"

    def __init__(self, roles: Roles, empty: Conditioning, settings: AlgorithmSettings) -> None:
        super().__init__(roles, empty, settings)
        self.config = settings.flow_grpo
        self.grid = flow.few_step_grid(self.sampler.steps, self.sampler.shift)

    def step(self, batch: Batch) -> Step:
        """One iteration: samples, scores, ``updates`` updates on as many parts of them."""
        seconds, text = Stopwatch(), batch.conditioning
        with seconds("rollout"):
            walk = self.walk(text, batch.x_1, batch.noise)
        rewards = yield walk.points[-1]
        advantage, metrics = self.advantages(batch, rewards)
        with seconds("generator"):
            used = advantage.cpu().nonzero()[:, 0]  # samples without advantage are left out
            order = used[torch.randperm(len(used), generator=batch.noise)]
            parts = [part for part in order.chunk(self.config.updates) if len(part)]
            metrics |= mean_of_each([self.fit(walk, text, advantage, part) | self.update() for part in parts])
        return metrics | seconds.read()

    @torch.no_grad()  # the trajectory is data
    def walk(self, text: Conditioning, x_1: Tensor, noise: torch.Generator) -> Walk:
        """Samples from noise ``x_1`` [B, C, H, W] by the SDE, with the likelihood of each step."""
        n, own = len(x_1), processes.mine(torch.arange(len(x_1)))
        x, text, likelihoods = x_1[own], text.rows(own), []
        points = [x]
        with self.roles.use(Role.GENERATOR) as velocity:
            field = guided(velocity, self.empty, self.sampler.guidance)
            v = in_parts(field, self.micro_batch, most=processes.most(n))
            for k in range(self.sampler.steps):
                u, eps = v(x, self.time(k, x), text), Normal.drawn(noise, x.shape[1:])[own].to(x)
                if k == self.sampler.steps - 1:  # not trained: without noise, which few steps would leave in the image
                    points.append(x + u * flow.expand(self.time(k + 1, x) - self.time(k, x), x))
                    break
                mean, _, deviation = self.mean_of(u, x, k)
                x = mean + deviation * eps
                points.append(x)
                likelihoods.append(sde.log_likelihood(x, mean, deviation))
        walked = (processes.gather(torch.stack(a, 1), n).transpose(0, 1) for a in (points, likelihoods))
        return Walk(*walked)

    def fit(self, walk: Walk, text: Conditioning, advantage: Tensor, rows: Tensor) -> dict[str, float]:
        """Accumulates the gradient of PPO's clipped loss (arXiv 1707.06347, Eq. 7) and the KL to the start."""
        c, sums, trained = self.config, Sums(), self.sampler.steps - 1
        share = 1 / (len(rows) * trained)
        for k in range(trained):
            for part in micro_batches(rows, self.micro_batch):
                x, after, of, a = walk.points[k, part], walk.points[k + 1, part], text.rows(part), advantage[part]
                mean_ref, *_ = self.mean_of(self.guided_velocity(Role.REFERENCE, x, k, of, grad=False), x, k)
                with self.roles.use(Role.GENERATOR):
                    v = self.guided_velocity(Role.GENERATOR, x, k, of, grad=True)
                    mean, scale, deviation = self.mean_of(v, x, k)
                    new = sde.log_likelihood(after, mean, deviation)
                    loss, ratio = losses.clipped_policy(new, walk.log_likelihood[k, part], a, c.clip)
                    kl = losses.squared_error(mean, mean_ref) / (2 * scale**2)
                    ((loss + c.kl_weight * kl).sum() * share).backward()
                held = (ratio - 1).abs() > c.clip
                for name, value in {"loss": loss, "kl": kl, "outside_clip": held}.items():
                    sums.add(f"generator/{name}", value.sum(), share)
        return sums.read()

    def guided_velocity(self, role: str, x: Tensor, k: int, text: Conditioning, *, grad: bool) -> Tensor:
        """Guidance's unconditional half is held constant, as in Flow-GRPO."""
        scale, t = self.sampler.guidance, self.time(k, x)
        with self.roles.use(role) as velocity, torch.set_grad_enabled(grad):
            v = velocity(x, t, text)
            if scale == 1:
                return v
        v_uncond = self.velocity(role, x, t, self.empty.expand(len(x)))
        return v_uncond + scale * (v - v_uncond)

    def mean_of(self, v: Tensor, x: Tensor, k: int) -> tuple[Tensor, float, Tensor]:
        """Mean of the step from grid[k], the SDE's noise scale there, and the step's deviation."""
        t, s = self.grid[k], self.grid[k + 1]
        scale = sde.noise_scale(t, self.grid[1], self.config.noise_level)
        deviation = scale * (t - s).sqrt()
        t, s, scale, deviation = (a.to(x.device, flow.widen(x).dtype) for a in (t, s, scale, deviation))
        return sde.step_mean(v, x, t, s, scale), float(scale), deviation

    def time(self, k: int, x: Tensor) -> Tensor:
        """grid[k] for every sample, [B]."""
        return self.grid[k].to(x.device, flow.widen(x).dtype).expand(len(x))

    # -------------------------------------------------------------------------------------- declarations

    @classmethod
    def updates(cls, settings: AlgorithmSettings) -> int:
        return settings.flow_grpo.updates

    @classmethod
    def evaluations(cls, settings: AlgorithmSettings) -> dict[str, Evaluations]:
        b, s = settings.batch, settings.sampler
        samples, halves = b.prompts * b.group, 1 if s.guidance == 1 else 2
        trained = (s.steps - 1) * samples
        return {
            "rollout": Evaluations(halves * s.steps * samples, at_once=halves),
            "generator": Evaluations((2 * halves - 1) * trained, trained, Role.GENERATOR),
        }
