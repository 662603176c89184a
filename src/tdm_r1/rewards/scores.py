"""What a reward gives back: one score a sample, by name what it is made of, and what could not be scored."""

from __future__ import annotations

import inspect
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import UserError


@dataclass(frozen=True)
class Scores:
    """Scores of B samples.

    Args:
        values: float64 [B], NaN where a score is missing. Missing is not 0: the sample is masked out of its group.
        parts: a breakdown by name, each float64 [B]; for people to read, training does not use it.
        failures: why scores are missing, one line for each thing that went wrong.
    """

    values: np.ndarray
    parts: Mapping[str, np.ndarray] = field(default_factory=dict)
    failures: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.values)


Reward = Callable[[np.ndarray, list[str], list[dict[str, Any]]], Scores | Sequence[float | None] | np.ndarray]
"""``(images, prompts, metadata) -> scores``: images uint8 [B, H, W, 3]; a score of None or NaN is missing, not 0."""


def missing(n: int, why: str) -> Scores:
    """No score for any of ``n`` samples."""
    return Scores(np.full(n, np.nan), {}, (why,))


def checked(given: Any, n: int) -> Scores:
    """What a reward gave for ``n`` samples, as Scores; what no float32 can hold becomes missing.

    Tensors of any kind, columns [n, 1], generators and flow_grpo's ``(scores, info)`` are taken as what they mean.
    Raises ValueError if there is not one number for each sample.
    """
    if inspect.iscoroutine(given):
        given.close()
        raise ValueError("the reward is an async function: give an ordinary one")
    if isinstance(given, Mapping):
        raise ValueError(f"the reward returned a dict of {', '.join(map(str, given))}: return one score for each image")
    if isinstance(given, tuple) and len(given) == 2 and isinstance(given[1], Mapping):
        given = given[0]
    given = given if isinstance(given, Scores) else Scores(_column(given, n, "scores"))
    parts = {name: _column(part, n, f"values of the part {name!r}") for name, part in given.parts.items()}
    return Scores(_column(given.values, n, "scores"), parts, tuple(given.failures))


def _column(values: Any, n: int, what: str) -> np.ndarray:
    given = _numbers(list(values) if inspect.isgenerator(values) else values)
    if given.shape not in ((n,), (n, 1)):
        raise ValueError(f"the reward returned {what} of shape {given.shape} for {n} images: one each is needed")
    column = np.array([np.nan if v is None else float(v) for v in given.reshape(n)], dtype=np.float64)
    column[~(np.abs(column) <= np.finfo(np.float32).max)] = np.nan
    return column


def _numbers(values: Any) -> np.ndarray:
    """An array of whatever the reward gave, tensors on any device and with gradients among it; dtype object."""
    if hasattr(values, "detach"):  # a torch tensor; this module does without torch
        values = values.detach().cpu().double().numpy()
    if isinstance(values, list | tuple) and any(hasattr(v, "detach") for v in values):
        values = [_numbers(v).tolist() for v in values]
    return np.asarray(values, dtype=object)


def attempt(reward: Reward, images: np.ndarray, prompts: list[str], metadata: list[dict[str, Any]]) -> Scores:
    """Scores a batch; whatever goes wrong costs its scores, and is described in `Scores.failures`.

    A UserError passes: it says that the input is wrong, which no later batch will mend.
    """
    try:
        return checked(reward(images.copy(), prompts, metadata), len(images))  # it may write into them
    except UserError:
        raise
    except (Exception, SystemExit) as error:  # a black box may raise anything
        place = traceback.extract_tb(error.__traceback__)[-1]
        return missing(len(images), f"{type(error).__name__}: {error} ({Path(place.filename).name}:{place.lineno})")


def same_size(images: Sequence[np.ndarray]) -> list[slice]:
    """Runs of consecutive pictures of one size: rewards take arrays."""
    cuts = [i for i in range(1, len(images)) if images[i].shape != images[i - 1].shape]
    return [slice(a, b) for a, b in zip([0, *cuts], [*cuts, len(images)], strict=True)]


def family_means(values: np.ndarray, tags: Sequence[str]) -> dict[str, float]:
    """The mean of the scores that each family of prompts has, by GenEval's ``tag``; NaN where it has none, and prompts
    without a family ("") left out."""
    of = {tag: values[np.array(tags) == tag] for tag in dict.fromkeys(tags) if tag}
    return {tag: float(np.nanmean(v)) if not np.isnan(v).all() else np.nan for tag, v in of.items()}


def joined(chunks: Sequence[Scores]) -> Scores:
    """Chunks of one batch, in order. A part that some chunk lacks is missing there."""
    names = dict.fromkeys(name for chunk in chunks for name in chunk.parts)
    parts = {
        name: np.concatenate([chunk.parts.get(name, np.full(len(chunk), np.nan)) for chunk in chunks]) for name in names
    }
    failures = tuple(dict.fromkeys(why for chunk in chunks for why in chunk.failures))
    return Scores(np.concatenate([chunk.values for chunk in chunks]), parts, failures)
