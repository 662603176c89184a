"""Seconds, memory and network evaluations of the parts of an iteration, for the benchmarks beside this file."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch

from tdm_r1.algorithms.protocol import Algorithm
from tdm_r1.algorithms.tdm_r1 import TDMR1
from tdm_r1.algorithms.tdm_r1_release import TDMR1Release
from tdm_r1.models.pipeline import PipelineBackbone
from tdm_r1.models.specification import Role


class Phases:
    """Wraps the parts of TDM-R1, or of its release, and counts what happens inside each, from now on.

    Attributes:
        seconds: by part; a GPU is waited for.
        forward, backward: samples through any role's transformer, without and with gradient.
        peak: bytes of GPU memory at the worst moment, empty without a GPU.
    """

    def __init__(self, algorithm: Algorithm, backbone: PipelineBackbone) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.forward: dict[str, int] = defaultdict(int)
        self.backward: dict[str, int] = defaultdict(int)
        self.peak: dict[str, int] = defaultdict(int)
        self.part = "other"
        roles = algorithm.roles
        for transformer in {id(t): t for t in (roles.transformer(r) for r in Role if r in roles)}.values():
            transformer.register_forward_pre_hook(self._count, with_kwargs=True)
        self.wrap(backbone, "decode", "decode")
        if isinstance(algorithm, TDMR1):
            self.wrap(algorithm.tdm, "roll_out", "rollout")
            self.wrap(algorithm.surrogate, "measure", "diagnostics")
            self.wrap(algorithm.surrogate, "fit", "surrogate")
            self.wrap(algorithm.tdm, "fit_fake", "fake score")
            self.wrap(algorithm.tdm, "fit_generator", "generator")
        elif isinstance(algorithm, TDMR1Release):
            self.wrap(algorithm, "roll_out", "rollout")
            self.wrap(algorithm, "fit_surrogate", "surrogate")
            self.wrap(algorithm, "fit_fake", "fake score")
            self.wrap(algorithm, "fit_generator", "generator")
        else:
            raise TypeError(f"the parts of {type(algorithm).__name__} are not known here")

    def _count(self, module: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        counter = self.backward if torch.is_grad_enabled() else self.forward
        samples = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]  # Z-Image takes a list
        counter[self.part] += len(samples)

    def wrap(self, owner: Any, method: str, part: str) -> None:
        """Counts what ``owner.method`` does as ``part``."""
        inner: Callable = getattr(owner, method)

        def timed(*args: Any, **kwargs: Any) -> Any:
            outer, self.part = self.part, part
            if torch.cuda.is_available():
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
            start = time.perf_counter()
            try:
                return inner(*args, **kwargs)
            finally:
                if torch.cuda.is_available():
                    torch.cuda.synchronize()
                    self.peak[part] = max(self.peak[part], torch.cuda.max_memory_allocated())
                self.seconds[part] += time.perf_counter() - start
                self.part = outer

        setattr(owner, method, timed)
