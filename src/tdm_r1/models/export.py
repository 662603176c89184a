"""A role's adapter as a LoRA that any program applies at the right strength."""

from __future__ import annotations

from dataclasses import replace

import torch
from peft import LoraConfig
from torch import Tensor

from .roles import Roles


@torch.no_grad()  # a copy
def exported(roles: Roles, name: str, config: LoraConfig) -> tuple[dict[str, Tensor], LoraConfig]:
    """The role's adapter, with what is added to it, as one LoRA; and that LoRA's settings.

    Its alpha is its rank, the scale being in B: so programs that do not read diffusers' metadata, such as ComfyUI,
    apply it at the right strength too. It has twice the rank where something is added: exact if that is an adapter too,
    or if no layer has a higher rank; else the nearest in least squares.
    """
    scale = config.lora_alpha / config.r
    own = {n: w * scale if "lora_B" in n else w for n, w in roles.state(name).items()}
    spec = next(spec for spec in roles.specs if spec.name == name)
    if spec.added is None:
        return own, replace(config, lora_alpha=config.r)
    wide = replace(config, r=2 * config.r, lora_alpha=2 * config.r)
    other = next(s for s in roles.specs if s.name == spec.added.role)
    if other.weights == "lora":
        extra, weight = roles.state(other.name), roles.added_weight(name) * scale
        return {
            n: torch.cat([w, weight * extra[n]], 1) if "lora_B" in n else torch.cat([w, extra[n]])
            for n, w in own.items()
        }, wide
    deltas = zip(roles.deltas(name), roles.added_to(name) or [], strict=True)
    weights: dict[str, Tensor] = {}
    for module, (change, added) in zip(roles.adapted_modules(name), deltas, strict=True):
        down, up = _factors((change + added).float(), wide.r)
        weights |= {f"{module}.lora_A.weight": down, f"{module}.lora_B.weight": up}
    return weights, wide


def _factors(delta: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """A [rank, in] and B [out, rank] with B A the nearest to ``delta`` [out, in]; zero rows where it has less rank."""
    u, s, v = torch.linalg.svd(delta, full_matrices=False)
    u, s, v = u[:, :rank], s[:rank].sqrt(), v[:rank]
    down, up = delta.new_zeros(rank, delta.shape[1]), delta.new_zeros(delta.shape[0], rank)
    down[: len(s)], up[:, : len(s)] = s[:, None] * v, u * s
    return down, up
