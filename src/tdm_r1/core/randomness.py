"""Explicit random generators derived from (seed, step, purpose), so that resuming and re-ordering change nothing."""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


def numpy_rng(seed: int, step: int, purpose: str) -> np.random.Generator:
    """A NumPy generator that depends on its three arguments alone."""
    return np.random.default_rng([seed, step, zlib.crc32(purpose.encode())])


def torch_rng(seed: int, step: int, purpose: str, device: torch.device | str = "cpu") -> torch.Generator:
    """A torch generator that depends on its first three arguments alone."""
    return torch.Generator(device).manual_seed(int(numpy_rng(seed, step, purpose).integers(2**62)))


@dataclass(frozen=True)
class Normal:
    """Standard normal noise of many samples, made where it is asked for.

    A sample's noise depends on the key and the sample's number alone: every process has that of its own samples without
    making the others'.

    Args:
        key: see `drawn`.
        shape: of one sample.
        shared: consecutive samples that have the same noise.
    """

    key: int
    shape: tuple[int, ...]
    shared: int = 1

    @classmethod
    def drawn(cls, generator: torch.Generator, shape: tuple[int, ...], *, shared: int = 1) -> Normal:
        """With the next key of a generator."""
        return cls(int(torch.randint(2**62, (), generator=generator)), shape, shared)

    def __getitem__(self, rows: Tensor) -> Tensor:
        """The noise of the samples numbered in ``rows`` [N], float32 [N, *shape] on the CPU."""
        noise, generator = torch.empty(len(rows), *self.shape), torch.Generator()
        for own, number in zip(noise, (rows // self.shared).tolist(), strict=True):
            own.normal_(generator=generator.manual_seed(_mixed(self.key + number)))
        return noise

    def first(self, n: int) -> Tensor:
        """The noise of the first ``n`` samples."""
        return self[torch.arange(n)]


def _mixed(value: int) -> int:
    """A seed whose every bit depends on every bit of ``value``: the finalizer of SplitMix64 (Steele et al. 2014)."""
    value = (value + 0x9E3779B97F4A7C15) % 2**64
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    value = (value ^ (value >> 27)) * 0x94D049BB133111EB % 2**64
    return (value ^ (value >> 31)) % 2**63
