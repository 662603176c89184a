"""JPEG (in)compressibility, the rewards of DDPO (Black et al. 2023, arXiv 2305.13301): they need no model."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from PIL import Image

QUALITY = 95


def incompressibility(images: np.ndarray, prompts: list[str], metadata: list[dict[str, Any]]) -> np.ndarray:
    """Size of each picture (uint8 [B, H, W, 3]) as JPEG, in units of 1,000 bytes."""
    return np.array([_bytes(image) / 1000 for image in images])


def compressibility(images: np.ndarray, prompts: list[str], metadata: list[dict[str, Any]]) -> np.ndarray:
    """The negative of `incompressibility`."""
    return -incompressibility(images, prompts, metadata)


def _bytes(image: np.ndarray) -> int:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="JPEG", quality=QUALITY)
    return buffer.tell()
