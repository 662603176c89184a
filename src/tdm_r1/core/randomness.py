"""Explicit random generators derived from (seed, step, purpose), so that resuming and re-ordering change nothing."""

from __future__ import annotations

import zlib

import numpy as np
import torch


def numpy_rng(seed: int, step: int, purpose: str) -> np.random.Generator:
    """A NumPy generator that depends on its three arguments alone."""
    return np.random.default_rng([seed, step, zlib.crc32(purpose.encode())])


def torch_rng(seed: int, step: int, purpose: str, device: torch.device | str = "cpu") -> torch.Generator:
    """A torch generator that depends on its first three arguments alone."""
    return torch.Generator(device).manual_seed(int(numpy_rng(seed, step, purpose).integers(2**62)))
