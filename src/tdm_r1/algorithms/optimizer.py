"""AdamW of one role, with warm-up, final decay and clipping."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from ..core import processes, shards
from ..errors import UserError
from .optimizer_settings import OptimizerConfig

MAX_SKIPPED = 5  # updates


class Optimizer:
    """`step` updates a role's weights.

    An update whose gradient is not finite is skipped; `MAX_SKIPPED` of them in a row raise FloatingPointError.

    Args:
        total: updates of the whole run, which the decay is a share of.
    """

    def __init__(self, parameters: list[nn.Parameter], config: OptimizerConfig, *, total: int) -> None:
        self.config = config
        self.parameters = parameters
        self.total = total
        self.skipped = 0  # updates in a row whose gradient was not finite
        if config.eight_bit and any(map(shards.is_spread, parameters)):
            raise UserError("an optimizer's eight_bit = True with model.shard = True: set eight_bit to false")
        spread = shards.is_spread(parameters[0])
        fused = partial(torch.optim.AdamW, fused=None if spread else True)  # one kernel for all weights
        kind: Callable[..., torch.optim.Optimizer] = _eight_bit_adamw() if config.eight_bit else fused
        self.adamw = kind(parameters, lr=config.learning_rate, betas=config.betas, weight_decay=config.weight_decay)
        self.schedule = LambdaLR(self.adamw, self._share)

    def _share(self, done: int) -> float:
        """The share of the learning rate that the next update has, after ``done`` of them."""
        c, step = self.config, done + 1
        left = self.total + 1 - step
        decay = left / (c.decay_share * self.total) if c.decay_share and self.total else 1.0
        return max(min(step / c.warmup_steps, decay, 1.0), 0.0)

    @property
    def updates(self) -> int:
        """Updates so far, skipped ones too."""
        return self.schedule.last_epoch

    @property
    def rate(self) -> float:
        """The learning rate of the next update."""
        return self.adamw.param_groups[0]["lr"]

    def step(self) -> dict[str, float]:
        """Updates the weights and drops the gradients; returns the gradient's norm before clipping, the rate, and 1 if
        the update was skipped, else 0.

        The gradient is the sum of those of all processes.
        """
        if not shards.is_spread(self.parameters[0]):  # those have the sum already
            processes.sum_gradients(self.parameters)
        norm = float(shards.gathered(nn.utils.clip_grad_norm_(self.parameters, self.config.max_grad_norm)))
        rate = self.rate
        finite = math.isfinite(norm)
        if finite:
            self.adamw.step()
            torch.autograd.graph.increment_version(self.parameters)  # fused kernels do not; `Roles` goes by it
        self._advance()
        self.adamw.zero_grad(set_to_none=True)
        self.skipped = 0 if finite else self.skipped + 1
        if self.skipped == MAX_SKIPPED:
            raise FloatingPointError(
                f"the gradient was not finite in {MAX_SKIPPED} updates in a row: the run has diverged; go on from an "
                "earlier checkpoint with a lower learning rate"
            )
        return {"grad_norm": norm, "learning_rate": rate, "skipped": float(not finite)}

    def _advance(self) -> None:
        """Sets the rate of the next update. Skipped updates count too: PyTorch warns if the first one was skipped."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=r"Detected call of `lr_scheduler\.step\(\)`")
            self.schedule.step()

    def state(self) -> dict[str, Any]:
        return {"adamw": self.adamw.state_dict(), "steps": self.updates}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Goes on from `state` with the settings of ``config``: AdamW's own loading would bring the saved ones back."""
        settings = [{k: v for k, v in group.items() if k != "params"} for group in self.adamw.param_groups]
        adamw = dict(state["adamw"])
        saved = zip(adamw["param_groups"], settings, strict=True)
        adamw["param_groups"] = [group | own for group, own in saved]  # by these AdamW decides where its counts lie
        of_each = {i: self._shares(found, self.parameters[int(i)]) for i, found in adamw["state"].items()}
        self.adamw.load_state_dict(adamw | {"state": of_each})
        for group, own in zip(self.adamw.param_groups, settings, strict=True):
            group.update(own)
        self.schedule.last_epoch = state["steps"] - 1
        self._advance()

    @staticmethod
    def _shares(found: Mapping[str, Any], like: nn.Parameter) -> dict[str, Any]:
        """A weight's moments; of whole ones this process's share, where the weight is spread."""
        return {
            name: shards.share_of(value, like) if isinstance(value, torch.Tensor) and value.dim() else value
            for name, value in found.items()
        }


def _eight_bit_adamw() -> Callable[..., torch.optim.Optimizer]:
    """bitsandbytes' AdamW. Raises UserError where it is not installed."""
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        raise UserError("eight_bit = True needs bitsandbytes: pip install 'tdm-r1[eight-bit]'") from error
    return AdamW8bit
