"""The roles' LoRA layer against peft's, which it stands in for."""

import pytest
import torch
from peft import LoraConfig
from peft.tuners import lora
from torch import Tensor, nn

from tdm_r1.models.lora_layer import Linear

X = torch.linspace(-1, 1, 2 * 3 * 5, dtype=torch.float64).reshape(2, 3, 5)


def layer(kind: type[nn.Module], *, bias: bool = True, dtype: torch.dtype = torch.float64) -> nn.Module:
    """A layer of five to four with two adapters, at strengths of their own, in float64 or of peft's in float32."""
    torch.manual_seed(0)
    config = LoraConfig(r=2, lora_alpha=4, init_lora_weights=False)
    found = kind(nn.Linear(5, 4, bias=bias, dtype=dtype), "one", config=config, r=2, lora_alpha=4)
    found.update_layer("two", 2, lora_alpha=4, config=config)
    found.set_scale("two", 0.7)
    found.requires_grad_(True)
    for name, p in found.named_parameters():
        if "lora_" in name:
            p.data = p.data.to(torch.float64 if dtype == torch.float64 else torch.float32)
    return found


def gradients(found: nn.Module, x: Tensor) -> dict[str, Tensor]:
    (found(x).double() * torch.arange(24.0).reshape(2, 3, 4)).sum().backward()
    return {name: p.grad for name, p in found.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("acting", [["one"], ["one", "two"], []])
def test_the_same_as_pefts(acting: list[str], bias: bool):
    pefts, own = layer(lora.Linear, bias=bias), layer(Linear, bias=bias)
    for found in (pefts, own):
        found.enable_adapters(bool(acting))
        if acting:
            found.set_adapter(acting)
    torch.testing.assert_close(own(X), pefts(X))
    want, got = gradients(pefts, X), gradients(own, X)
    assert want.keys() == got.keys()
    assert len(acting) == sum("lora_A" in name for name in got)
    for name, gradient in want.items():
        torch.testing.assert_close(got[name], gradient)


def test_of_one_row_a_sample():
    pefts, own = layer(lora.Linear), layer(Linear)
    torch.testing.assert_close(own(X[:, 0]), pefts(X[:, 0]))


def test_a_backbone_of_lower_precision():
    """In float32 as peft has it, to one rounding; in the backbone's precision within its own."""
    pefts, own = (layer(kind, dtype=torch.bfloat16) for kind in (lora.Linear, Linear))
    x = X.to(torch.bfloat16)
    for found in (pefts, own):
        found.set_adapter(["one", "two"])
    own.precise = True
    want = pefts(x)
    assert own(x).dtype == torch.bfloat16
    torch.testing.assert_close(own(x), want, rtol=2**-8, atol=0)
    own.precise = False
    torch.testing.assert_close(own(x), want, rtol=2**-5, atol=2**-6)
    assert all(g.dtype == torch.float32 for name, g in gradients(own, x).items() if "lora_" in name)


@pytest.mark.parametrize("bias", [True, False])
def test_a_merged_adapter_learns_as_one_beside_the_layer(bias: bool):
    own = layer(Linear, bias=bias)
    own.set_adapter("one")
    x = X.clone().requires_grad_(True)
    out, want = own(x), gradients(own, x)
    along = x.grad
    own.zero_grad()
    x.grad = None
    own.base_layer.requires_grad_(False)
    own.base_layer.weight.data = own.base_layer.weight.data + own.get_delta_weight("one").detach()
    own.learns = "one"
    torch.testing.assert_close(own(x), out)
    got = gradients(own, x)
    assert sorted(got) == ["lora_A.one.weight", "lora_B.one.weight"]
    for name, gradient in got.items():
        torch.testing.assert_close(gradient, want[name])
    torch.testing.assert_close(x.grad, along)


def test_a_merged_layer_remembers_its_weight():
    """The layer computes another role before the backward of this one runs."""
    own = layer(Linear)
    own.learns = "one"
    out = own(X.clone().requires_grad_(True))
    weight = own.base_layer.weight.data
    own.base_layer.weight.data = torch.zeros_like(weight)
    (along,) = torch.autograd.grad(out.sum(), out.grad_fn.next_functions[0][0].variable)
    torch.testing.assert_close(along, weight.sum(0).expand_as(X))
