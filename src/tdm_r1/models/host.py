"""A transformer with the adapters on it: which of them act, and on which base weights."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from ..core import flow, shards
from .lora_layer import Linear, with_own_layers

Acting = tuple[tuple[str, float], ...]
"""Adapters that act at once, each with its strength."""


def add_adapter(transformer: Any, config: LoraConfig, name: str) -> None:
    """Adds an adapter, in float32, to a diffusers model, whatever the precision of its weights."""
    with warnings.catch_warnings():  # peft warns of a second adapter; several are intended
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")
        transformer.add_adapter(with_own_layers(config), adapter_name=name)
    for where, layer in transformer.named_modules():
        if isinstance(layer, BaseTunerLayer) and not isinstance(layer, Linear):
            raise ValueError(
                f"model.lora.targets: {where} is a {type(layer.get_base_layer()).__name__}; name linear layers alone"
            )
    for p in adapter_weights(transformer, name).values():
        p.data = flow.widen(p.data)


def adapter_weights(transformer: nn.Module, name: str) -> dict[str, nn.Parameter]:
    """An adapter's weights by names that do not depend on the adapter's."""
    part = f".{name}."
    return {n.replace(part, "."): p for n, p in transformer.named_parameters() if part in n}


def spread(transformer: Any, device: torch.device) -> None:
    """Spreads a transformer's own weights over the processes of the run; the adapters on it stay whole."""
    adapters = [p for n, p in transformer.named_parameters() if ".lora_" in n]
    shards.spread(transformer, transformer._no_split_modules, device, adapters)


class Host:
    """Switches the adapters of one transformer. Build it when all adapters have been added, and it has been spread.

    Args:
        precise: adapters compute in float32 whatever the transformer's precision.
    """

    def __init__(self, transformer: nn.Module, *, precise: bool = False) -> None:
        self.transformer = transformer
        self.sharded = any(shards.is_spread(p) for p in transformer.parameters())  # the base must not be set then
        adapted = {n: m for n, m in transformer.named_modules() if isinstance(m, BaseTunerLayer)}
        self.names = list(adapted)
        self.layers: list[Any] = list(adapted.values())
        for layer in self.layers:
            layer.precise = precise
        self.base = [] if self.sharded else [layer.base_layer.weight.data for layer in self.layers]
        self._trained: dict[str, list[nn.Parameter]] = {}
        self._frozen: list[nn.Parameter] = []
        self._acting: Acting | None = None
        self._learns: str | None = None
        self._in_use: object = None

    def register(self, adapter: str, *, trained: bool) -> None:
        """Says whether an adapter's weights require grad."""
        weights = list(adapter_weights(self.transformer, adapter).values())
        if trained:
            self._trained[adapter] = weights
        else:
            self._frozen += weights
        for p in weights:
            p.requires_grad_(trained)

    @contextmanager
    def acting_as(self, acting: Acting, base: Sequence[Tensor], learns: str | None = None) -> Iterator[object]:
        """Lets adapters act on ``base`` weights; restores what acted before. Yields a token for `is_acting_as`.

        Args:
            learns: an adapter that ``base`` has in it already, to get gradients all the same.
        """
        here = [] if self.sharded else [layer.base_layer.weight.data for layer in self.layers]
        before = self._acting, here, self._learns, self._in_use
        token = object()
        self.activate(acting)
        self._set_base(base, learns)
        self._in_use = token
        try:
            yield token
        finally:
            acted, weights, learned, self._in_use = before
            self._set_base(weights, learned)
            self.activate(acted or ())

    def is_acting_as(self, token: object) -> bool:
        """Whether the innermost `acting_as` is the one that yielded ``token``."""
        return self._in_use is token

    def activate(self, acting: Acting) -> None:
        """Lets the adapters of ``acting`` act together, and no other."""
        if self._acting == acting:
            return
        for layer in self.layers:
            layer.enable_adapters(bool(acting))
            if acting:
                layer.set_adapter([adapter for adapter, _ in acting])
            for adapter, weight in acting:
                layer.set_scale(adapter, weight)
        self._acting = acting
        # peft sets requires_grad at every switch; the flags must outlive it, or a backward that runs after the switch
        # would silently drop gradients. An adapter that is added to another is a constant
        added = {adapter for adapter, _ in acting[1:]}
        for adapter, weights in self._trained.items():
            for p in weights:
                p.requires_grad_(adapter not in added)
        for p in self._frozen:
            p.requires_grad_(False)

    def _set_base(self, base: Sequence[Tensor], learns: str | None) -> None:
        self._learns = learns
        for layer, weight in zip([] if self.sharded else self.layers, base, strict=True):
            layer.base_layer.weight.data = weight
            layer.learns = learns

    def deltas(self, adapter: str) -> list[Tensor]:
        """What an adapter at its full strength adds to the weights of each adapted layer."""
        return [layer.at_full_strength(adapter) * (b @ a) for layer, a, b in self._factors(adapter)]

    def merged(self, adapter: str, base: Sequence[Tensor]) -> list[Tensor]:
        """``base`` with what an adapter at its full strength adds to it."""
        factors = zip(base, self._factors(adapter), strict=True)
        return [torch.addmm(w, b, a, alpha=layer.at_full_strength(adapter)) for w, (layer, a, b) in factors]

    def _factors(self, adapter: str) -> Iterator[tuple[Any, Tensor, Tensor]]:
        for layer in self.layers:
            yield layer, layer.lora_A[adapter].weight, layer.lora_B[adapter].weight

    @property
    def mixed_precision(self) -> bool:
        """Whether float32 adapters sit on a GPU's weights of lower precision."""
        return any(p.dtype != torch.float32 and p.is_cuda for p in self.transformer.parameters())
