"""The reward of a run: a weighted sum of rewards, each in this process, in workers or behind HTTP."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..core.groups import spread, standardized
from ..errors import UserError
from ..plugins import import_name
from ..tasks.protocol import Prompt
from .http import RemoteReward
from .ray_actors import RayActors
from .registry import BUILT_IN, load_reward
from .scores import Reward, Scores, attempt
from .settings import ScoringConfig, require_no_secret
from .workers import Workers

FAILED_BATCHES = 3  # in a row without any score, after which a run stops; at its start a single one is enough
FLAT_BATCHES = 10  # from the start without any difference inside a group, after which a run stops


@dataclass(frozen=True)
class Term:
    """One reward of a weighted sum."""

    name: str
    weight: float


def parse(text: str) -> list[Term]:
    """Terms of ``ocr + 0.5*aesthetic``. Raises UserError naming the part that is wrong."""
    try:
        require_no_secret(text, "reward")
    except ValueError as error:
        raise UserError(str(error)) from error
    terms = []
    for part in re.split(r"\s\+(?:\s|$)", text.strip()):
        match = re.fullmatch(r"(?:([-+]?(?:\d+\.?\d*|\.\d+)(?:e[-+]?\d+)?)\s*\*\s*)?(.+)", part.strip())
        if not match:
            raise UserError(f"reward = {text!r}: {part!r} is not a reward; write NAME or WEIGHT*NAME, joined by ' + '")
        terms.append(Term(match[2], float(match[1] or 1.0)))
    names = [t.name for t in terms]
    if twice := {n for n in names if names.count(n) > 1}:
        raise UserError(f"reward = {text!r} names {min(twice)!r} twice: add the weights")
    return terms


class Scorer:
    """Scores batches with a weighted sum of rewards. `close` it when done.

    Args:
        text: names with weights, such as ``ocr + 0.5*aesthetic``; a name is one of `registry.BUILT_IN`, a user's
            ``file.py:function``, or the URL of a scoring server.
        reward: a function in place of it.

    Raises UserError or ValueError on names that are not known.
    """

    def __init__(self, text: str, config: ScoringConfig, *, reward: Reward | None = None) -> None:
        self.config = config
        self.terms = [Term("reward", 1.0)] if reward else parse(text)
        self.rewards = [reward] if reward else [self._load(term.name) for term in self.terms]

    def _load(self, name: str) -> Reward:
        c = self.config
        if name.startswith(("http://", "https://")):
            return RemoteReward(name, timeout=c.timeout, chunk=c.chunk, connections=max(c.workers, 1))
        if c.backend == "ray":
            return RayActors(name, load_reward, c, c.environments.get(name, {}))
        if c.workers:
            return Workers(
                name,
                load_reward,
                processes=c.workers,
                timeout=c.timeout,
                chunk=c.chunk,
                load_timeout=c.load_timeout,
            )
        return load_reward(name)

    @property
    def apart(self) -> bool:
        """Whether no reward is computed in this process."""
        return all(isinstance(reward, Workers | RayActors | RemoteReward) for reward in self.rewards)

    @property
    def parallel(self) -> int:
        """Batches that may be scored at once: a reward in this process takes one at a time."""
        return max(self.config.workers, 1) if self.apart else 1

    def __call__(self, images: np.ndarray, prompts: Sequence[Prompt]) -> Scores:
        """Scores pictures, uint8 [B, H, W, 3], with the weighted sum as it is, whatever training normalises."""
        return self.total(self.each(images, prompts))

    def check(self, prompts: Sequence[Prompt]) -> None:
        """Raises UserError if a reward cannot score one of ``prompts``, before anything is trained on them."""
        for term in self.terms:
            named = BUILT_IN[term.name].check if term.name in BUILT_IN else None
            if named is None:
                continue
            check = import_name(named, "reward")
            for number, prompt in enumerate(prompts, start=1):
                try:
                    check(prompt.text, prompt.metadata)
                except (UserError, ValueError) as error:
                    raise UserError(f"reward = {term.name!r} cannot score prompt {number}: {error}") from error

    def each(self, images: np.ndarray, prompts: Sequence[Prompt]) -> list[Scores]:
        """The scores of every term."""
        texts, metadata = [p.text for p in prompts], [p.metadata for p in prompts]
        return [attempt(reward, images, texts, metadata) for reward in self.rewards]

    def total(self, given: Sequence[Scores], *, group_size: int | None = None) -> Scores:
        """The weighted sum of what `each` gave. A sample that lacks any term's score lacks the sum.

        The breakdown holds every term, if there are several, and the terms' own parts.

        Args:
            group_size: consecutive samples of one prompt, inside which a sum is normalised if the configuration says
                so; None never does.
        """
        several = len(self.terms) > 1
        parts: dict[str, np.ndarray] = {}
        total = np.zeros(len(given[0]))
        for term, scores in zip(self.terms, given, strict=True):
            if several:
                parts[term.name] = scores.values
            parts |= {f"{term.name}/{name}" if several else name: part for name, part in scores.parts.items()}
            values = scores.values
            if several and group_size is not None and self.config.normalize == "group":
                values = standardized(values.reshape(-1, group_size))[0].ravel()
            total += term.weight * values
        failures = (f"{t.name}: {why}" for t, s in zip(self.terms, given, strict=True) for why in s.failures)
        return Scores(total, parts, tuple(failures))

    def close(self) -> None:
        """Ends worker processes and actors; they start again when needed."""
        for reward in self.rewards:
            if isinstance(reward, Workers | RayActors):
                reward.close()


class Watch:
    """Stops a run whose reward teaches nothing, with an explanation, rather than let it train on nothing."""

    def __init__(self) -> None:
        self.batches = 0  # of training that had a score
        self.failed = 0  # batches in a row without any score
        self.begun = False  # whether there was ever a score
        self.informative = False  # whether any group had a difference so far

    def __call__(self, scores: Scores, group_size: int) -> None:
        """Looks at one batch of training. Raises UserError if the run had better stop."""
        self.require_any(scores)
        self.batches += 1
        groups = scores.values.reshape(-1, group_size)
        self.informative = self.informative or bool(spread(groups)[1].any())
        if not self.informative and self.batches >= FLAT_BATCHES:
            raise UserError(
                f"the reward gave identical scores to all images of each prompt in {self.batches} batches (between "
                f"{np.nanmin(groups):g} and {np.nanmax(groups):g} in the last): there is nothing to learn from; look "
                "at it with `tdm-r1 score`, give it grades instead of 0 or 1, or use easier prompts"
            )

    def require_any(self, scores: Scores) -> None:
        """Raises UserError if a batch of training or evaluation has no score at all: the first of a run, or too many
        in a row."""
        if not np.isnan(scores.values).all():
            self.failed, self.begun = 0, True
            return
        self.failed += 1
        if self.failed >= FAILED_BATCHES or not self.begun:
            why = "; ".join(scores.failures) or "it returned None or NaN for every picture"
            raise UserError(f"the reward gave no score at all for {self.failed} batch(es) in a row: {why}")
