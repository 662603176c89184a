"""The mini worlds together, told apart by a spec's ``tag``: six families of shapes (`world`), and `signs`.

Both have the same functions: ``make_spec``, ``noisy_spec``, ``prompt_of``, ``all_specs``, ``make_scene``, ``render``.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from . import signs, world

TASKS = (*world.TASKS, *signs.TASKS)


def world_of(tag: str) -> Any:
    """The module that ``tag`` belongs to. Raises ValueError on an unknown one."""
    for module in (world, signs):
        if tag in module.TASKS:
            return module
    raise ValueError(f"unknown task {tag!r}: known are {', '.join(TASKS)}")


def prompt_of(spec: dict) -> str:
    return world_of(spec["tag"]).prompt_of(spec)


def noisy_spec(spec: dict, rng: np.random.Generator) -> dict:
    """A caption's spec: what is drawn, or something else at the world's rates."""
    return world_of(spec["tag"]).noisy_spec(spec, rng)


def picture(spec: dict, rng: np.random.Generator) -> np.ndarray:
    """A fresh render that obeys ``spec``, uint8 [64, 64, 3]."""
    module = world_of(spec["tag"])
    return module.render(module.make_scene(spec, rng))


def render_specs(specs: list[dict], seed: int) -> np.ndarray:
    """Fresh renders that obey ``specs``, uint8 [B, 64, 64, 3]. Item i depends on ``seed`` and i alone."""
    return np.stack([picture(s, np.random.default_rng([seed, i])) for i, s in enumerate(specs)])


def modules_of(tags: Iterable[str]) -> list[Any]:
    """The distinct worlds of ``tags``."""
    return list(dict.fromkeys(world_of(tag) for tag in tags))
