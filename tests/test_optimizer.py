"""AdamW of one role: learning rates, clipping, skipped updates, its state."""

from __future__ import annotations

import math
import sys

import pytest
import torch
from torch import nn

from tdm_r1.algorithms.optimizer import Optimizer
from tdm_r1.algorithms.optimizer_settings import OptimizerConfig
from tdm_r1.errors import UserError


def optimizer(total: int = 8, **settings) -> tuple[nn.Parameter, Optimizer]:
    p = nn.Parameter(torch.zeros(3))
    return p, Optimizer([p], OptimizerConfig(**({"learning_rate": 1.0} | settings)), total=total)


def test_learning_rates_warm_up_and_fall():
    p, found = optimizer(warmup_steps=2, decay_share=0.5)
    rates = []
    for _ in range(9):  # one more than planned does no harm
        p.grad = torch.ones_like(p)
        rates.append(found.step()["learning_rate"])
    assert rates == pytest.approx([0.5, 1, 1, 1, 1, 0.75, 0.5, 0.25, 0])
    assert found.rate == 0
    _, constant = optimizer(warmup_steps=1)
    assert constant.rate == 1


def test_an_update_is_adamws_with_the_clipped_gradient():
    p, found = optimizer(warmup_steps=1, betas=(0.5, 0.9), weight_decay=0.1, max_grad_norm=1.0)
    q = nn.Parameter(torch.zeros(3))
    other = torch.optim.AdamW([q], lr=1.0, betas=(0.5, 0.9), weight_decay=0.1)
    for scale in (3.0, 0.1, 2.0):
        g = scale * torch.tensor([1.0, 2.0, 2.0])
        p.grad, q.grad = g.clone(), g * min(1.0, 1.0 / float(g.norm()))
        version = p._version
        metrics = found.step()
        other.step()
        assert metrics["grad_norm"] == pytest.approx(3 * scale)
        assert p.grad is None
        assert p._version > version
        torch.testing.assert_close(p, q, atol=1e-5, rtol=1e-4)


def test_updates_without_a_finite_gradient_are_skipped_and_five_in_a_row_stop():
    p, found = optimizer(warmup_steps=1)

    def update(value: float) -> float:
        p.grad = torch.full_like(p, value)
        return found.step()["skipped"]

    assert [update(math.nan) for _ in range(4)] == [1.0] * 4
    assert not p.any()
    assert update(1.0) == 0.0
    assert p.all()
    for _ in range(4):
        update(math.inf)
    with pytest.raises(FloatingPointError, match=r"5 updates in a row.*earlier checkpoint"):
        update(math.nan)


def test_an_optimizer_goes_on_with_its_own_settings():
    p, first = optimizer(warmup_steps=4, betas=(0.5, 0.9))
    p.grad = torch.ones_like(p)
    first.step()
    q, second = optimizer(warmup_steps=8, betas=(0.1, 0.2), weight_decay=0.3)
    second.load_state(first.state())
    (group,) = second.adamw.param_groups
    assert (group["betas"], group["weight_decay"]) == ((0.1, 0.2), 0.3)
    assert second.rate == pytest.approx(2 / 8)
    assert second.adamw.state[q]["exp_avg"].any()


def test_an_older_state_becomes_that_of_the_fused_kernel():
    """It wants its counts in float32 and where the weights are; older checkpoints and those of spread weights have them
    elsewhere."""
    p, first = optimizer(warmup_steps=1)
    p.grad = torch.ones_like(p)
    first.step()
    state = first.state()
    (group,) = state["adamw"]["param_groups"]
    group["fused"] = None
    state["adamw"]["state"][0]["step"] = torch.tensor(1.0, dtype=torch.float64)
    q, second = optimizer(warmup_steps=1)
    second.load_state(state)
    assert second.adamw.param_groups[0]["fused"] is True
    assert second.adamw.state[q]["step"].dtype == torch.float32


def test_eight_bits_need_bitsandbytes(monkeypatch: pytest.MonkeyPatch):
    for module in ("bitsandbytes", "bitsandbytes.optim"):
        monkeypatch.setitem(sys.modules, module, None)  # as where it is not installed
    with pytest.raises(UserError, match=r"^eight_bit = True needs .*pip install 'tdm-r1\[eight-bit\]'$"):
        optimizer(eight_bit=True)
