"""Creates the roles that an algorithm declares, on one backbone or two."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from peft import LoraConfig
from torch import nn

from ..core import flow
from .host import Host, adapter_weights, add_adapter, spread
from .protocol import Backbone
from .role_weights import RoleWeights
from .roles import Roles
from .specification import Role, RoleSpec


def create_roles(
    specs: Sequence[RoleSpec],
    student: Backbone,
    config: LoraConfig,
    *,
    teacher: Backbone | None = None,
    merge: bool = False,
    precise: bool = False,
    shard: torch.device | None = None,
) -> Roles:
    """The roles of ``specs`` and the teacher, each starting as its backbone's own function.

    Args:
        student: hosts the student's roles, and without ``teacher`` all of them.
        config: the adapters' configuration; they are all alike.
        teacher: a second backbone, for a student whose base weights differ.
        merge: see `Roles`.
        precise: adapters compute in float32, else in their backbone's precision.
        shard: spread the backbones' transformers and the roles' own ones over the processes, on devices of this kind.
            Adapters stay whole.

    Raises ValueError with ``shard`` if the change of a role of full weights is added to another.
    """
    if shard:
        _require_whole_where_added(specs)
    backbones: dict[str, Any] = {"student": student, "teacher": teacher or student}
    own = {spec.name: _own_transformer(backbones[spec.host], shard) for spec in specs if spec.weights == "full"}
    first: dict[int, str] = {}
    for spec in specs:
        transformer = backbones[spec.host].transformer
        if spec.weights == "full":
            continue
        add_adapter(transformer, config, spec.name)
        # `init_lora_weights` draws A anew for each adapter: make equal starts really equal
        if id(transformer) in first:
            _copy(transformer, first[id(transformer)], spec.name)
        first.setdefault(id(transformer), spec.name)
    for spec in specs:
        _add_copy(spec, specs, backbones, config)
    if shard:
        for transformer in {id(b.transformer): b.transformer for b in backbones.values()}.values():
            spread(transformer, shard)
    hosts = {id(b.transformer): Host(b.transformer, precise=precise) for b in backbones.values()}

    def host_of(name: str) -> Host:
        return hosts[id(backbones[name].transformer)]

    members: dict[str, RoleWeights] = {}
    for spec in specs:
        origin = host_of(spec.host)
        on, adapter = (origin, spec.name) if spec.weights == "lora" else (Host(own[spec.name]), None)
        members[spec.name] = RoleWeights(spec, on, adapter, origin)
    base = host_of("teacher")
    members[Role.TEACHER] = RoleWeights(RoleSpec(Role.TEACHER, host="teacher"), base, None, base, owned=False)
    return Roles(members, student.velocity_of, merge=merge)


def _own_transformer(host: Backbone, shard: torch.device | None) -> nn.Module:
    transformer = copy.deepcopy(host.transformer)
    for p in transformer.parameters():
        p.data = flow.widen(p.data)
    if shard:  # at once: several whole ones may not fit
        spread(transformer, shard)
    return transformer


def _require_whole_where_added(specs: Sequence[RoleSpec]) -> None:
    full = {spec.name for spec in specs if spec.weights == "full"}
    for spec in specs:
        if spec.added is not None and spec.added.role in full:
            raise ValueError(
                f"model.shard = True: the full weights of role {spec.added.role} are spread, so their change cannot "
                f"be added to role {spec.name}; give {spec.added.role} an adapter, or add nothing"
            )


@torch.no_grad()  # initialisation
def _copy(transformer: nn.Module, source: str, target: str) -> None:
    weights = adapter_weights(transformer, source)
    for name, p in adapter_weights(transformer, target).items():
        p.copy_(weights[name])


def _add_copy(spec: RoleSpec, specs: Sequence[RoleSpec], backbones: dict[str, Any], config: LoraConfig) -> None:
    """A second adapter beside a role's own, for one on the other backbone that is added to it: `Roles` keeps it up to
    date."""
    if spec.added is None:
        return
    other = next((s for s in specs if s.name == spec.added.role), None)
    if other is None:
        raise ValueError(f"role {spec.name} adds the change of {spec.added.role!r}, which is not declared")
    transformer = backbones[spec.host].transformer
    elsewhere = backbones[other.host].transformer is not transformer
    if other.weights == "lora" and elsewhere and other.name not in transformer.peft_config:
        add_adapter(transformer, config, other.name)
