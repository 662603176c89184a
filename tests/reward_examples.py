"""Pictures with known brightness, and rewards that score them, fail, die or hang."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from tdm_r1.errors import UserError
from tdm_r1.rewards.scores import Scores
from tdm_r1.tasks.protocol import Prompt

GREYS = (0, 51, 102, 153, 204, 255)
IMAGES = np.stack([np.full((8, 8, 3), v, np.uint8) for v in GREYS])
TEXTS = [f"prompt {i}" for i in range(len(GREYS))]
METADATA: list[dict] = [{"i": i} for i in range(len(GREYS))]
PROMPTS = [Prompt(t, m) for t, m in zip(TEXTS, METADATA, strict=True)]
SCORES = [v / 255 for v in GREYS]


def brightness(images, prompts, metadata):
    return images.mean((1, 2, 3)) / 255


def graded(images, prompts, metadata):
    scores = brightness(images, prompts, metadata)
    return Scores(scores, {"strict": (scores > 0.5).astype(float)})


def raises(images, prompts, metadata):
    raise RuntimeError("out of memory")


def dies_on_two(images, prompts, metadata):
    if any(m["i"] == 2 for m in metadata):
        time.sleep(0.5)  # the pool has heard who took this chunk
        os.kill(os.getpid(), 9)
    return brightness(images, prompts, metadata)


def hangs_on_three(images, prompts, metadata):
    if any(m["i"] == 3 for m in metadata):
        time.sleep(600)
    return brightness(images, prompts, metadata)


def interrupted_at_three(images, prompts, metadata):
    if any(m["i"] == 3 for m in metadata):
        raise KeyboardInterrupt
    return brightness(images, prompts, metadata)


def dies_between_batches(images, prompts, metadata):
    threading.Timer(0.3, os._exit, (1,)).start()
    return brightness(images, prompts, metadata)


def exits(images, prompts, metadata):
    sys.exit(3)


def refuses(images, prompts, metadata):
    raise UserError("prompt 0 has no target")


def loads_once(name):
    """As `registry.load_reward`, in one process alone: later ones find the file that ``name`` names."""
    if Path(name).exists():
        raise OSError("no memory is left")
    Path(name).touch()
    return dies_on_two


def loads_for_ever(name):
    time.sleep(600)


def dies_loading(name):
    os._exit(1)


def here(name: str) -> str:
    return f"{__file__}:{name}"


def named(images, prompts, metadata):
    return np.full(len(images), float(os.environ["WHO"]))


named_again = named


def scored_twice(reward, between: Callable[[], object] = lambda: None) -> tuple[Scores, Scores]:
    """All pictures, then the first two, with something done in between; the reward is closed."""
    try:
        scores = reward(IMAGES, TEXTS, METADATA)
        between()
        return scores, reward(IMAGES[:2], TEXTS[:2], METADATA[:2])
    finally:
        reward.close()
