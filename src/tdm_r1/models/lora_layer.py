"""The LoRA layer of the roles: several adapters in one product, in the backbone's precision, or merged and learning."""

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
    """peft's LoRA layer with a forward of its own, for adapters without dropout.

    Adapters that act together are one low-rank product. peft's forward makes several tensors of the output's size for
    each of them, in float32 on a backbone of lower precision.

    Attributes:
        learns: an adapter that is in ``base_layer``'s weight already and gets a gradient; None if none is.
        precise: adapters compute in their own precision, float32; else in the backbone's.
    """

    learns: str | None = None
    precise = False

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        base = self.base_layer
        if self.learns is not None:
            a, b = self.lora_A[self.learns].weight, self.lora_B[self.learns].weight
            weight = base.weight.detach()  # the layer may hold another role's when the backward runs
            return MergedLinear.apply(x, weight, base.bias, a, b, self.at_full_strength(self.learns))
        out = base(x)
        if self.disable_adapters or not self.active_adapters:
            return out
        a, b = self._low_rank()
        dtype = a.dtype if self.precise else out.dtype
        low, b = F.linear(x.to(dtype), a.to(dtype)), b.to(dtype)
        if dtype != out.dtype:
            return (out + F.linear(low, b)).to(out.dtype)
        return torch.addmm(out.flatten(0, -2), low.flatten(0, -2), b.T).view_as(out)

    def at_full_strength(self, adapter: str) -> float:
        """The factor of an adapter's product that stands for its strength of 1."""
        acting = self.scaling[adapter]
        self.set_scale(adapter, 1.0)
        full, self.scaling[adapter] = self.scaling[adapter], acting
        return float(full)

    def _low_rank(self) -> tuple[Tensor, Tensor]:
        """A [r, in] and B [out, r], with the strengths, of all adapters that act."""
        acting = self.active_adapters
        a = [self.lora_A[adapter].weight for adapter in acting]
        b = [self.lora_B[adapter].weight * self.scaling[adapter] for adapter in acting]
        return (a[0], b[0]) if len(acting) == 1 else (torch.cat(a), torch.cat(b, 1))


def with_own_layers(config: LoraConfig) -> LoraConfig:
    """``config``, under which peft makes linear layers of this kind."""
    config._register_custom_module({nn.Linear: Linear})
    return config
