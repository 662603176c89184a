"""Roles as an algorithm declares them: what each role's weights are, where they start, and what follows them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Literal


class Role(StrEnum):
    """The roles of the paper (its letters in brackets) and their averages. An algorithm may declare others."""

    TEACHER = "teacher"  # psi: the many-step base, frozen; every run has it
    GENERATOR = "generator"  # theta: the few-step model
    GENERATOR_EMA = "generator_ema"  # what is evaluated and exported
    FAKE = "fake"  # s_fake: the score of the generator's own samples
    FAKE_FINAL = "fake_final"  # s_fake of x_0 alone, where that is separate from the trajectory's other points
    SURROGATE = "surrogate"  # phi: the reward, a diffusion model
    SURROGATE_EMA = "surrogate_ema"  # phi averaged: the reward direction that is used
    REFERENCE = "reference"  # ref: a slower average of phi


@dataclass(frozen=True)
class Average:
    """An exponential moving average: ``target <- decay target + (1 - decay) source``.

    Args:
        ramp: after n updates of the source the decay is at most ramp(n); None for no such bound.
    """

    of: str
    decay: float
    ramp: Callable[[int], float] | None = None

    def decay_after(self, updates: int) -> float:
        """The decay after ``updates`` updates of the source."""
        return min(self.decay, self.ramp(updates)) if self.ramp else self.decay


def warm_up(updates: int) -> float:
    """The usual warm-up of an average's decay: (1 + n) / (10 + n)."""
    return (1 + updates) / (10 + updates)


def trailing(updates: int) -> float:
    """A decay that grows slowly, for an average that trails by little: .001 n (DGPO and its successors)."""
    return 0.001 * updates


@dataclass(frozen=True)
class AddedDelta:
    """``weight`` times another role's change of the weights, added to a role's own. No gradient reaches that role."""

    role: str
    weight: float


@dataclass(frozen=True)
class RoleSpec:
    """One role.

    Args:
        name: one of `Role`, or a new one.
        host: the backbone that it starts from and, as an adapter, sits on. They differ where the teacher's base weights
            are not the student's.
        trained: whether an optimizer changes it.
        average: the role that it averages, if it does; it starts as a copy and is never trained.
        weights: a LoRA adapter on the host, or a transformer of its own.
        added: another role's change of the weights with which it acts on top of its own adapter.
        starts_from: the setting of the model that names a LoRA that it starts from; else it starts as its host.
        exported_as: the folder that a finished run writes its weights to.
    """

    name: str
    host: Literal["student", "teacher"] = "student"
    trained: bool = False
    average: Average | None = None
    weights: Literal["lora", "full"] = "lora"
    added: AddedDelta | None = None
    starts_from: Literal["student_lora", "fake_lora", "surrogate_lora"] | None = None
    exported_as: str | None = None

    def __post_init__(self) -> None:
        if self.added is not None and self.weights == "full":
            raise ValueError(f"role {self.name} has full weights: another role's change can be added to adapters alone")
        if self.average is not None and self.trained:
            raise ValueError(f"role {self.name} is an average: it cannot be trained")


EVALUATED = "lora"  # the folder of the role that is evaluated, sampled and shown


def evaluated(specs: tuple[RoleSpec, ...]) -> str:
    """The role that is evaluated: the one that is exported as the generator. Raises ValueError if there is none."""
    for spec in specs:
        if spec.exported_as == EVALUATED:
            return spec.name
    raise ValueError(f"no role of {', '.join(s.name for s in specs)} has exported_as = {EVALUATED!r}: give it to one")
