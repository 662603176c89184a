"""What a reward is, and how one is found: by name, or as a user's own function."""

from __future__ import annotations

import importlib.util
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..tasks import Prompt

Reward = Callable[[np.ndarray, list[str], list[dict[str, Any]]], Sequence[float | None]]
"""``(images, prompts, metadata) -> scores``: images uint8 [B, H, W, 3]; a score of None or NaN is missing, not 0."""


def _mini() -> Reward:
    from ..mini.task import reward

    return reward


BUILT_IN: dict[str, Callable[[], Reward]] = {"mini": _mini}


def load_reward(name: str) -> Reward:
    """A reward by name, or a user's own as ``path/to/file.py:function``. Raises ValueError on anything else."""
    if name in BUILT_IN:
        return BUILT_IN[name]()
    path, colon, function = name.rpartition(":")
    if not colon or not path.endswith(".py"):
        known = ", ".join(BUILT_IN)
        raise ValueError(f"reward = {name!r} is not known: use one of {known}, or your own as my_rewards.py:function")
    file = Path(path)
    if not file.is_file():
        raise ValueError(f"reward = {name!r}: no such file {path!r}")
    spec = importlib.util.spec_from_file_location(f"tdm_r1_user_{file.stem}", file)
    if spec is None or spec.loader is None:
        raise ValueError(f"reward = {name!r}: {path!r} cannot be imported")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    reward = getattr(module, function, None)
    if not callable(reward):
        have = ", ".join(n for n in vars(module) if callable(getattr(module, n)) and not n.startswith("_"))
        raise ValueError(f"reward = {name!r}: {path} has no function {function!r}; it has: {have or 'none'}")
    return reward


def score(reward: Reward, images: np.ndarray, prompts: Sequence[Prompt]) -> Tensor:
    """Scores a batch, float32 [B], NaN where missing. Raises ValueError if the reward breaks its contract."""
    scores = reward(images, [p.text for p in prompts], [p.metadata for p in prompts])
    if len(scores) != len(images):
        raise ValueError(f"the reward returned {len(scores)} scores for {len(images)} pictures: one each is needed")
    values = [math.nan if s is None else float(s) for s in scores]
    return torch.tensor([v if math.isfinite(v) else math.nan for v in values], dtype=torch.float32)
