"""What can be seen of any pictures, whatever they should show: blur, colour, flat pictures, sameness."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

FLAT = 4.0  # deviation of a picture's luminance, in 8-bit levels, below which nothing is on it; ours
CELLS = 8  # pictures of one prompt are compared as so many by so many means
LUMINANCE = np.array([0.299, 0.587, 0.114])  # ITU-R BT.601
DIRECTION: Mapping[str, str] = {  # which way is better; "same": far from the start's is worse, on either side
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
    y = images @ LUMINANCE
    steps = (np.abs(np.diff(y, axis=1)).mean(), np.abs(np.diff(y, axis=2)).mean())
    spread = images.max(-1).astype(np.float64) - images.min(-1)
    found = {
        "pictures/sharpness": float(np.mean(steps)),
        "pictures/saturation": float(spread.mean() / 255),
        "pictures/flat": float((y.std((1, 2)) < FLAT).mean()),
    }
    if images_per_prompt > 1:
        found["pictures/diversity"] = _diversity(images, images_per_prompt)
    return found


def _diversity(images: np.ndarray, n: int) -> float:
    height, width = (side // CELLS * CELLS for side in images.shape[1:3])
    cells = images[:, :height, :width].reshape(len(images), CELLS, height // CELLS, CELLS, width // CELLS, 3)
    coarse = cells.mean((2, 4)).reshape(-1, n, CELLS * CELLS * 3)
    pairs = np.abs(coarse[:, :, None] - coarse[:, None, :]).mean(-1)
    return float(pairs.sum((1, 2)).mean() / (n * (n - 1)))
