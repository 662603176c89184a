"""Pictures with known brightness, and rewards that score them, fail, die or hang."""

from __future__ import annotations

import os
import time

import numpy as np

from tdm_r1.errors import UserError
from tdm_r1.tasks import Prompt

GREYS = (0, 51, 102, 153, 204, 255)
IMAGES = np.stack([np.full((8, 8, 3), v, np.uint8) for v in GREYS])
TEXTS = [f"prompt {i}" for i in range(len(GREYS))]
METADATA: list[dict] = [{"i": i} for i in range(len(GREYS))]
PROMPTS = [Prompt(t, m) for t, m in zip(TEXTS, METADATA, strict=True)]
SCORES = [v / 255 for v in GREYS]


def brightness(images, prompts, metadata):
    return images.mean((1, 2, 3)) / 255


def raises(images, prompts, metadata):
    raise RuntimeError("out of memory")


def dies_on_two(images, prompts, metadata):
    if any(m["i"] == 2 for m in metadata):
        os.kill(os.getpid(), 9)
    return brightness(images, prompts, metadata)


def hangs_on_three(images, prompts, metadata):
    if any(m["i"] == 3 for m in metadata):
        time.sleep(600)
    return brightness(images, prompts, metadata)


def refuses(images, prompts, metadata):
    raise UserError("prompt 0 has no target")


def here(name: str) -> str:
    return f"{__file__}:{name}"
