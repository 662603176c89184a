"""A LoRA layer that can compute with one merged weight and still learn."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig
from peft.tuners import lora
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class MergedLinear(torch.autograd.Function):
    """x W^T + b with ``W = W_0 + s B A``, and the gradients of A, B and x alone.

    W's own gradient, as large a product as the layer's, is never formed: with g the gradient of the output,
    ``dB = s g^T (x A^T)`` and ``dA = s (g B)^T x``. Equal to the adapter beside the layer up to rounding; no small
    product stands in the forward, and nothing of it is kept for the backward.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(x, weight, a, b)
        ctx.scale = scale
        return F.linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, a, b = ctx.saved_tensors
        g, rows = grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1])
        grad_x = (g @ weight).view(x.shape) if ctx.needs_input_grad[0] else None
        grad_a = ctx.scale * ((g @ b).T @ rows)
        grad_b = ctx.scale * (g.T @ (rows @ a.T))
        return grad_x, None, None, grad_a, grad_b, None


class Linear(lora.Linear):
    """peft's LoRA layer. ``learns`` names the adapter that is in ``base_layer``'s weight already and gets a gradient;
    None for peft's own forward."""

    learns: str | None = None

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.learns is None:
            return super().forward(x, *args, **kwargs)
        base, a, b = self.base_layer, self.lora_A[self.learns].weight, self.lora_B[self.learns].weight
        weight = base.weight.detach()  # the layer may hold another role's when the backward runs
        return MergedLinear.apply(x, weight, base.bias, a, b, self.scaling[self.learns])


def with_own_layers(config: LoraConfig) -> LoraConfig:
    """``config``, under which peft makes linear layers of this kind."""
    config._register_custom_module({nn.Linear: Linear})
    return config
