"""What can be seen of any pictures, whatever they should show: blur, colour, flat pictures, sameness."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import numpy as np

Direction = Literal["up", "down", "same"]
"""Which way a metric is better; "same": far from the start's is worse, on either side."""

FLAT = 4.0  # deviation of a picture's luminance, in 8-bit levels, below which nothing is on it; ours
CHUNK = 64  # pictures at a time: they become 24 times as large on the way
CELLS = 8  # pictures of one prompt are compared as so many by so many means
LUMINANCE = np.array([0.299, 0.587, 0.114])  # ITU-R BT.601
DIRECTION: Mapping[str, Direction] = {
    "pictures/sharpness": "same",
    "pictures/saturation": "same",
    "pictures/flat": "down",
    "pictures/diversity": "up",
}


def measure(images: np.ndarray, images_per_prompt: int) -> dict[str, float]:
    """Means over pictures, uint8 [B, H, W, 3], of which consecutive runs of ``images_per_prompt`` share their prompt.

    sharpness: the mean step of luminance from pixel to pixel, in 8-bit levels. saturation: the mean spread of a pixel's
    three channels, of 1. flat: the share of pictures with hardly any contrast. diversity: the mean distance between
    coarse pictures of one prompt, in 8-bit levels; none where there is one a prompt.
    """
    starts = range(0, len(images), CHUNK)
    each = np.concatenate([_of_each(images[start : start + CHUNK]) for start in starts], axis=1)
    names = ("pictures/sharpness", "pictures/saturation", "pictures/flat")
    found = dict(zip(names, each.mean(1).tolist(), strict=True))
    if images_per_prompt > 1:
        found["pictures/diversity"] = _diversity(images, images_per_prompt)
    return found


def _of_each(images: np.ndarray) -> np.ndarray:
    """Sharpness, saturation and whether it is flat of every picture, [3, B]."""
    y = images @ LUMINANCE
    sharpness = (np.abs(np.diff(y, axis=1)).mean((1, 2)) + np.abs(np.diff(y, axis=2)).mean((1, 2))) / 2
    saturation = (images.max(-1).astype(np.float64) - images.min(-1)).mean((1, 2)) / 255
    return np.stack([sharpness, saturation, y.std((1, 2)) < FLAT])


def _diversity(images: np.ndarray, n: int) -> float:
    height, width = (side // CELLS * CELLS for side in images.shape[1:3])
    cells = images[:, :height, :width].reshape(len(images), CELLS, height // CELLS, CELLS, width // CELLS, 3)
    coarse = np.stack([cell.mean((1, 3)) for cell in cells]).reshape(-1, n, CELLS * CELLS * 3)
    pairs = np.abs(coarse[:, :, None] - coarse[:, None, :]).mean(-1)
    return float(pairs.sum((1, 2)).mean() / (n * (n - 1)))
