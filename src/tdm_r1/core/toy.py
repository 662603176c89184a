"""A world of Gaussian mixtures with exact scores at every noise level: what the maths is tested against."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from . import flow


@dataclass(frozen=True)
class GaussianMixture:
    """``sum_m weights_m N(means_m, stds_m^2 I)`` over R^D: weights [M], means [M, D], stds [M]."""

    weights: Tensor
    means: Tensor
    stds: Tensor

    @classmethod
    def single(cls, mean: Tensor, std: float) -> GaussianMixture:
        """One Gaussian with ``mean`` [D]."""
        return cls(torch.ones(1, dtype=mean.dtype), mean[None], torch.tensor([std], dtype=mean.dtype))

    def noised(self, t: float) -> GaussianMixture:
        """The mixture of x_t = (1 - t) x_0 + t eps."""
        return GaussianMixture(self.weights, (1 - t) * self.means, ((1 - t) ** 2 * self.stds**2 + t**2).sqrt())

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        """[n, D] draws."""
        which = torch.multinomial(self.weights, n, replacement=True, generator=generator)
        noise = torch.randn(n, self.means.shape[1], generator=generator, dtype=self.means.dtype)
        return self.means[which] + self.stds[which, None] * noise

    def log_prob(self, x: Tensor) -> Tensor:
        """log density at ``x`` [B, D], [B]."""
        squared = (x[:, None] - self.means).square().sum(-1) / self.stds**2
        normaliser = x.shape[1] * (self.stds.log() + 0.5 * math.log(2 * math.pi))
        return torch.logsumexp(self.weights.log() - 0.5 * squared - normaliser, dim=1)

    def score(self, x: Tensor, t: Tensor | float = 0.0) -> Tensor:
        """Gradient of the log density of x_t at ``x`` [B, D], in closed form; ``t`` is a number or [B]."""
        t = flow.expand(t, x)[..., None] if isinstance(t, Tensor) and t.ndim else flow.expand(t, x)  # [B, 1, 1]
        means, stds = (1 - t) * self.means, ((1 - t) ** 2 * self.stds[:, None] ** 2 + t**2).sqrt()  # [B, M, D or 1]
        difference = means - x[:, None]
        squared = difference.square().sum(-1) / stds[..., 0] ** 2
        share = torch.softmax(self.weights.log() - 0.5 * squared - x.shape[1] * stds[..., 0].log(), dim=1)
        return (share[..., None] * difference / stds**2).sum(1)

    def velocity(self, x_t: Tensor, t: Tensor) -> Tensor:
        """The exact velocity at (x_t, t), t [B] below 1."""
        return flow.v_from_score(self.score(x_t, t), x_t, t)

    def clean(self, x_t: Tensor, t: Tensor) -> Tensor:
        """x0_hat = E[x_0 | x_t]."""
        return flow.x0_from_v(self.velocity(x_t, t), x_t, t)

    def tilted(self, target: Tensor, strength: float) -> GaussianMixture:
        """The mixture proportional to p(x) exp(-strength |x - target|^2 / 2): the RLHF optimum of that reward."""
        precision = 1 / self.stds**2
        total = precision + strength
        means = (precision[:, None] * self.means + strength * target) / total[:, None]
        d = self.means.shape[1]
        gap = (self.means - target).square().sum(-1)
        log_weight = self.weights.log() - 0.5 * gap * precision * strength / total + 0.5 * d * (precision / total).log()
        return GaussianMixture(torch.softmax(log_weight, 0), means, total.rsqrt())
