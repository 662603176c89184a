"""What an algorithm is: the roles it declares, one `step`, and a state to go on from."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Generator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..models.protocol import Conditioning
from ..models.roles import Roles
from ..models.specification import RoleSpec
from .optimizer_settings import OptimizerConfig
from .settings import AlgorithmSettings

Step = Generator[Tensor, Tensor, dict[str, float]]
"""An iteration, as a generator: it yields its final latents [B, C, H, W] once, gets their scores back (float64 [B] on
the CPU, NaN where one is missing), and returns metrics by name. Another iteration may begin in between."""


@dataclass(frozen=True)
class Batch:
    """One iteration's input. Samples of one prompt (a group) are consecutive.

    Several processes of a run all have the whole batch; `rollout.Rollout.micro_batches` yields a process's share.

    Args:
        conditioning: of B = P * G samples.
        x_1: their noise, [B, C, H, W].
        group: samples of a prompt, G.
        noise: for everything that the iteration draws; on the CPU, so that it is the same on every machine.
        kl: conditioning of samples, one a prompt, that no reward is asked for: KL alone holds the generator there.
        kl_x_1: their noise, [N, C, H, W].
    """

    conditioning: Conditioning
    x_1: Tensor
    group: int
    noise: torch.Generator
    kl: Conditioning | None = None
    kl_x_1: Tensor | None = None


@dataclass(frozen=True)
class Evaluations:
    """Samples that a part of an iteration sends through a network, without and with gradient.

    ``role``: the role that is trained, for the part's memory; None where nothing is. ``at_once``: how often a sample is
    in the widest pass without gradient (2 with guidance). ``nested``: that pass runs between forward and backward.
    """

    frozen: int = 0
    trained: int = 0
    role: str | None = None
    at_once: int = 1
    nested: bool = False


class Algorithm(ABC):
    """Sub-class it, and name it in `registry.ALGORITHMS` or as package.module:Class.

    Args:
        roles: those that `declare_roles` declared.
        empty: the conditioning of the empty prompt, one sample, for guidance.
        settings: the run's.
    """

    def __init__(self, roles: Roles, empty: Conditioning, settings: AlgorithmSettings) -> None:
        self.roles, self.empty, self.settings = roles, empty, settings

    one_update_at_the_end: ClassVar[bool] = False  # whether the gradients of all roles wait for it, which takes memory

    @staticmethod
    def check(settings: AlgorithmSettings) -> None:
        """Raises ValueError on settings with which the algorithm cannot run."""
        del settings  # one that can run with any does not look at them

    @staticmethod
    @abstractmethod
    def declare_roles(settings: AlgorithmSettings) -> tuple[RoleSpec, ...]:
        """The roles beside the teacher, which every run has."""

    @staticmethod
    def optimizer_settings(settings: AlgorithmSettings) -> dict[str, OptimizerConfig]:
        """The optimizer's settings of each trained role."""
        return {}

    @staticmethod
    def evaluations(settings: AlgorithmSettings) -> dict[str, Evaluations]:
        """What each part of an iteration costs, by name; an empty one makes no estimate."""
        return {}

    @abstractmethod
    def step(self, batch: Batch) -> Step:
        """One iteration: ``rewards = yield latents`` where it needs them, and metrics by name at the end."""

    @abstractmethod
    def state(self) -> dict[str, Any]:
        """What a checkpoint needs beside the roles' weights: nested dicts and lists of tensors and plain values."""

    @abstractmethod
    def load_state(self, state: Mapping[str, Any]) -> None:
        """Goes on from `state`."""
