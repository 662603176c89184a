"""What the algorithms need of a text-to-image flow model, and classifier-free guidance on top of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from peft import LoraConfig
from torch import Tensor, nn

from ..core import processes


@dataclass(frozen=True)
class Conditioning:
    """What a transformer reads of the prompts of B samples.

    Each distinct prompt is kept once. Indices are on the CPU, so that a GPU waits for none of them.

    Args:
        tensors: by names that the model's family chooses, [P, ...] each. Integer tensors (lengths) stay on the CPU.
        index: int64 [B], the prompt of each sample.
    """

    tensors: Mapping[str, Tensor]
    index: Tensor

    @classmethod
    def of(cls, **tensors: Tensor) -> Conditioning:
        """One sample for each prompt."""
        return cls(tensors, torch.arange(len(next(iter(tensors.values())))))

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, name: str) -> Tensor:
        """A tensor of every sample, [B, ...]."""
        return self.tensors[name][self.index]

    @property
    def device(self) -> torch.device:
        return next(t.device for t in self.tensors.values() if t.is_floating_point())

    def rows(self, index: Tensor) -> Conditioning:
        """The conditioning of the samples at ``index`` [N] (int64), repeats allowed."""
        return Conditioning(self.tensors, self.index[index.cpu()])

    def expand(self, n: int) -> Conditioning:
        """A single sample's conditioning for ``n`` samples, without copying."""
        return Conditioning(self.tensors, self.index.expand(n))

    def first_prompt(self) -> Conditioning:
        """One sample with the first prompt, whether or not any sample has it."""
        return Conditioning(self.tensors, torch.zeros(1, dtype=torch.int64))

    def to(self, device: torch.device | str) -> Conditioning:
        """The same on ``device``; integers stay."""
        moved = {name: t.to(device) if t.is_floating_point() else t for name, t in self.tensors.items()}
        return Conditioning(moved, self.index)

    def compact(self) -> Conditioning:
        """The same with no prompt that no sample has; one stays where there are no samples."""
        used, index = self.index.unique(return_inverse=True)
        used = used if len(used) else torch.zeros(1, dtype=torch.int64)
        if len(used) == len(next(iter(self.tensors.values()))):
            return self
        return Conditioning({name: t[used] for name, t in self.tensors.items()}, index)

    @staticmethod
    def join(parts: Sequence[Conditioning]) -> Conditioning:
        """Several one after the other; sequences [P, L, ...] are padded with zeros to the longest."""
        parts = [part.compact() for part in parts]
        counts = torch.tensor([0, *(len(next(iter(part.tensors.values()))) for part in parts)]).cumsum(0)
        index = torch.cat([part.index + offset for part, offset in zip(parts, counts[:-1], strict=True)])
        return Conditioning({n: _cat([part.tensors[n] for part in parts]) for n in parts[0].tensors}, index)


def _cat(tensors: Sequence[Tensor]) -> Tensor:
    if tensors[0].ndim > 1:
        longest = max(t.shape[1] for t in tensors)
        tensors = [F.pad(t, (0, 0) * (t.ndim - 2) + (0, longest - t.shape[1])) for t in tensors]
    return torch.cat(list(tensors))


Velocity = Callable[[Tensor, Tensor, Conditioning], Tensor]
"""``velocity(x_t, t, conditioning)``: x_t [B, C, H, W], t [B] in [0, 1]; returns v, float32 [B, C, H, W]."""


class Backbone(Protocol):
    """What the algorithms need of a text-to-image flow model. `pipeline.PipelineBackbone` has most of it."""

    transformer: nn.Module
    latent_shape: tuple[int, int, int]

    def encode(self, prompts: Sequence[str]) -> list[Conditioning]:
        """Each prompt's conditioning, of one sample, in main memory."""

    def velocity_of(self, transformer: nn.Module) -> Velocity:
        """The velocity field of ``transformer``, which is this backbone's or a copy of it."""

    def decode(self, latents: Tensor) -> np.ndarray:
        """Latents [B, C, H, W] to images, uint8 [B, H, W, 3]."""

    def save_lora(self, folder: Path, weights: dict[str, Tensor], config: LoraConfig) -> Path:
        """Writes an adapter's weights for diffusers; returns the file."""


def in_parts(velocity: Velocity, size: int, *, most: int | None = None) -> Velocity:
    """The same on at most ``size`` samples at a time: passes without gradient are bounded as those with one are.

    Args:
        most: samples of the process that has most; its own if None.
    """

    def joined(x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        if max(most or 0, len(x_t)) <= size:
            return velocity(x_t, t, conditioning)
        parts = processes.in_step(torch.arange(len(x_t)).split(size), most or len(x_t), size)
        return torch.cat([velocity(x_t[rows], t[rows], conditioning.rows(rows)) for rows in parts])

    return joined


def guided(velocity: Velocity, empty: Conditioning, scale: float) -> Velocity:
    """Classifier-free guidance, v_u + scale (v_c - v_u), both halves in one batch; scale 1 means none.

    ``empty`` is the conditioning of the one unconditional prompt (arXiv 2207.12598; 1 + w there is ``scale``).
    """
    both = guided_and_not(velocity, empty, scale)
    return velocity if scale == 1 else lambda x_t, t, conditioning: both(x_t, t, conditioning)[0]


def guided_and_not(
    velocity: Velocity, empty: Conditioning, scale: float
) -> Callable[[Tensor, Tensor, Conditioning], tuple[Tensor, Tensor]]:
    """What `guided` gives, and v_c, which it computes on the way."""

    def both(x_t: Tensor, t: Tensor, conditioning: Conditioning) -> tuple[Tensor, Tensor]:
        if scale == 1:
            return (v_c := velocity(x_t, t, conditioning)), v_c
        halves = Conditioning.join([empty.expand(len(x_t)), conditioning])
        v_u, v_c = velocity(torch.cat([x_t, x_t]), torch.cat([t, t]), halves).chunk(2)
        return v_u + scale * (v_c - v_u), v_c

    return both
