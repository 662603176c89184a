"""One role's weights: an adapter on a shared transformer, or a transformer of its own."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..core import shards
from .host import Host, adapter_weights
from .specification import RoleSpec


class RoleWeights:
    """What one role owns, float32 whatever the backbone's precision: small updates vanish in bfloat16.

    Args:
        spec: the role.
        host: the transformer that computes it.
        adapter: the name of its adapter there; None if it is the transformer itself.
        origin: the adapted backbone that it started from: its change is measured against it.
        owned: False for the teacher, which is the frozen backbone.
    """

    def __init__(self, spec: RoleSpec, host: Host, adapter: str | None, origin: Host, *, owned: bool = True) -> None:
        self.spec, self.host, self.adapter, self.origin, self.owned = spec, host, adapter, origin, owned
        transformer = host.transformer
        found = dict(transformer.named_parameters()) if adapter is None else adapter_weights(transformer, adapter)
        self.parameters: dict[str, nn.Parameter] = found if owned else {}
        if adapter is not None:
            host.register(adapter, trained=spec.trained)
        for p in self.parameters.values():
            p.requires_grad_(spec.trained)

    @property
    def versions(self) -> list[int]:
        """They rise with every update. (Fused kernels do not raise them: who uses those has to.)"""
        return [p._version for p in self.parameters.values()]

    def require_owned(self) -> None:
        if not self.owned:
            raise ValueError(f"role {self.spec.name} has no weights of its own: it is the frozen backbone")

    @torch.no_grad()  # a copy is never trained
    def load(self, weights: Mapping[str, Tensor]) -> None:
        """Copies ``weights`` in. Raises ValueError on missing, unknown or misshapen names."""
        self.require_owned()
        name, own = self.spec.name, self.parameters
        if wrong := own.keys() ^ weights.keys():
            raise ValueError(f"weights for role {name} do not fit: {len(wrong)} names differ, e.g. {min(wrong)!r}")
        for key, p in own.items():
            if p.shape != weights[key].shape:
                raise ValueError(
                    f"weights for role {name} do not fit: {key} is {tuple(weights[key].shape)}, expected "
                    f"{tuple(p.shape)}; is the LoRA rank the same?"
                )
            p.copy_(shards.share_of(weights[key], like=p))

    def state(self) -> dict[str, Tensor]:
        """A copy of the weights, on the CPU; whole, and then collective, where they are spread over processes."""
        self.require_owned()
        return {name: shards.gathered(p.detach()).to("cpu", copy=True) for name, p in self.parameters.items()}

    def deltas(self) -> list[Tensor]:
        """How the role changes the weights of each adapted layer from where it started."""
        if self.adapter is not None:
            return self.host.deltas(self.adapter)
        starts = zip(self.origin.names, self.origin.base, strict=True)
        return [self.parameters[f"{name}.weight"] - start for name, start in starts]
