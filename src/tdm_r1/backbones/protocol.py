"""What the algorithms need of a text-to-image flow model, and classifier-free guidance on top of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from peft import LoraConfig
from torch import Tensor, nn


@dataclass(frozen=True)
class Conditioning:
    """What the transformer reads of the prompts.

    embeds: [B, L, D]. pooled: [B, P], where the model has such. lengths: [B] int64 on the CPU, where prompts differ in
    length: tokens of each that count, the others are padding.
    """

    embeds: Tensor
    pooled: Tensor | None = None
    lengths: Tensor | None = None

    def __len__(self) -> int:
        return len(self.embeds)

    def rows(self, index: Tensor) -> Conditioning:
        """The conditioning of the prompts at ``index`` [N] (int64), repeats allowed."""
        pooled = None if self.pooled is None else self.pooled[index]
        return Conditioning(self.embeds[index], pooled, None if self.lengths is None else self.lengths[index.cpu()])

    def expand(self, n: int) -> Conditioning:
        """A single prompt's conditioning for ``n`` samples, without copying."""
        pooled = None if self.pooled is None else self.pooled.expand(n, -1)
        return Conditioning(
            self.embeds.expand(n, -1, -1), pooled, None if self.lengths is None else self.lengths.expand(n)
        )

    def to(self, device: torch.device | str) -> Conditioning:
        """The same on ``device``; lengths stay."""
        return Conditioning(
            self.embeds.to(device), None if self.pooled is None else self.pooled.to(device), self.lengths
        )

    @staticmethod
    def join(parts: Sequence[Conditioning]) -> Conditioning:
        """Several one after the other, padded to the longest."""
        longest = max(c.embeds.shape[1] for c in parts)
        embeds = torch.cat([F.pad(c.embeds, (0, 0, 0, longest - c.embeds.shape[1])) for c in parts])
        pooled = [c.pooled for c in parts if c.pooled is not None]
        lengths = [c.lengths for c in parts if c.lengths is not None]
        return Conditioning(embeds, torch.cat(pooled) if pooled else None, torch.cat(lengths) if lengths else None)


Velocity = Callable[[Tensor, Tensor, Conditioning], Tensor]
"""``velocity(x_t, t, conditioning)``: x_t [B, C, H, W], t [B] in [0, 1]; returns v, float32 [B, C, H, W]."""


class Backbone(Protocol):
    """What the algorithms need of a text-to-image flow model."""

    transformer: nn.Module
    latent_shape: tuple[int, int, int]

    def encode(self, prompts: Sequence[str]) -> list[Conditioning]: ...

    def velocity_of(self, transformer: nn.Module) -> Velocity: ...

    def decode(self, latents: Tensor) -> np.ndarray: ...

    def save_lora(self, folder: Path, weights: dict[str, Tensor], config: LoraConfig) -> Path: ...


def in_parts(velocity: Velocity, size: int) -> Velocity:
    """The same on at most ``size`` samples at a time: what needs no gradient is bounded as what needs one is."""

    def joined(x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        if len(x_t) <= size:
            return velocity(x_t, t, conditioning)
        parts = torch.arange(len(x_t), device=x_t.device).split(size)
        return torch.cat([velocity(x_t[rows], t[rows], conditioning.rows(rows)) for rows in parts])

    return joined


def guided(velocity: Velocity, empty: Conditioning, scale: float) -> Velocity:
    """Classifier-free guidance, v_u + scale (v_c - v_u), both halves in one batch; scale 1 means none.

    ``empty`` is the conditioning of the one unconditional prompt (arXiv 2207.12598; 1 + w there is ``scale``).
    """
    if scale == 1:
        return velocity

    def combined(x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        both = Conditioning.join([empty.expand(len(x_t)), conditioning])
        v_u, v_c = velocity(torch.cat([x_t, x_t]), torch.cat([t, t]), both).chunk(2)
        return v_u + scale * (v_c - v_u)

    return combined
