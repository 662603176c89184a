"""The roles of a run and the one way to switch between them.

One frozen backbone can hold every role as an adapter (the teacher is the backbone with all adapters off). A second
backbone holds those of a teacher with other base weights; a role with full weights is a transformer of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from ..core import processes, shards
from .host import Acting, Host, adapter_weights
from .protocol import Conditioning, Velocity
from .role_weights import RoleWeights
from .specification import Role, RoleSpec


class Roles:
    """Build it with `create.create_roles`.

    Args:
        members: the roles by name.
        velocity_of: the backbone's velocity field of a transformer.
        merge: run an adapter as a merged copy of the weights that it adapts (`lora_layer`). Faster where the model is
            small; costs that copy for each role, one more of what is added, and rounds in the backbone's precision.
    """

    def __init__(
        self, members: Mapping[str, RoleWeights], velocity_of: Callable[[nn.Module], Velocity], *, merge: bool = False
    ) -> None:
        self._members = dict(members)
        self._velocity_of = velocity_of
        self.merge = merge
        self._copies = {key: adapter_weights(host.transformer, key[1]) for key, host in self._elsewhere().items()}
        self._copied: dict[tuple[int, str], list[int]] = {}  # versions of what each copy was made from
        self._combined: dict[Hashable, tuple[list[float], list[Tensor]]] = {}  # see `_combine_once`
        self._strength: dict[str, float] = {}  # see `weaken`
        hosts = {id(role.host): role.host for role in self._members.values()}.values()
        self.tf32 = any(host.mixed_precision for host in hosts)
        for (_, adapter), host in self._elsewhere().items():
            host.register(adapter, trained=False)
        for host in hosts:
            host.activate(())

    def __contains__(self, name: str) -> bool:
        return name in self._members

    @property
    def specs(self) -> tuple[RoleSpec, ...]:
        """The declared roles, without the teacher."""
        return tuple(role.spec for name, role in self._members.items() if name != Role.TEACHER)

    # -------------------------------------------------------------------------------------- switching

    @contextmanager
    def use(self, name: str) -> Iterator[Velocity]:
        """Activates a role and yields its velocity field; restores the role that was active before.

        The velocity may be called inside this context alone, and not where another role of the same transformer has
        been activated within it: it raises RuntimeError there. Finish the backward inside the context as well: where
        something is added to the role, or with gradient checkpointing, the layers compute another role afterwards.
        """
        role = self._members[name]
        merge = self.merge and role.adapter is not None
        if not merge:
            self._refresh_copy(role)
        acting, base = ((), self._merged(role)) if merge else (self._acting(role), self._base(role))
        learns = role.adapter if merge and role.spec.trained and torch.is_grad_enabled() else None
        field = self._velocity_of(role.host.transformer)
        with role.host.acting_as(acting, base, learns) as token, self._adapters_in_tf32():

            def velocity(x_t: Tensor, t: Tensor, c: Conditioning) -> Tensor:
                if not role.host.is_acting_as(token):
                    raise RuntimeError(
                        f"the velocity of role {name} is called where its transformer acts as another role"
                    )
                return field(x_t, t, c) if len(x_t) else _idle(field, x_t, c)

            yield velocity

    @contextmanager
    def _adapters_in_tf32(self) -> Iterator[None]:
        """TensorFloat32 for float32 adapters on a bfloat16 backbone, and for nothing outside: rewards in this process
        compute in float32. It is set for the whole process: switch ``tf32`` off where rewards run at the same time."""
        before = torch.get_float32_matmul_precision()
        if self.tf32:
            torch.set_float32_matmul_precision("high")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(before)

    # -------------------------------------------------------------------------------------- added deltas, merged copies

    def _added(self, role: RoleWeights) -> RoleWeights | None:
        return self._members[role.spec.added.role] if role.spec.added else None

    def weaken(self, name: str, strength: float) -> None:
        """Sets the factor on the weight at which the role ``name`` is added to others; 1 at the start."""
        self._strength[self._members[name].spec.name] = strength

    def added_weight(self, name: str) -> float:
        """The weight at which another role's change is added to the role's own; 0 if none is."""
        added = self._members[name].spec.added
        return added.weight * self._strength.get(added.role, 1.0) if added else 0.0

    def _elsewhere(self) -> dict[tuple[int, str], Host]:
        """Where a copy of an adapter has to stand, under its name: beside roles to which it is added while it sits on
        another transformer."""
        found = {}
        for role in self._members.values():
            other = self._added(role)
            if other is not None and other.adapter is not None and other.host is not role.host:
                found[id(role.host), other.adapter] = role.host
        return found

    def _acting(self, role: RoleWeights) -> Acting:
        """The role's own adapter, and one that is added to it."""
        if role.adapter is None:
            return ()
        own, other = (role.adapter, 1.0), self._added(role)
        if other is None or other.adapter is None:
            return (own,)
        return own, (str(other.adapter), self.added_weight(role.spec.name))

    @torch.no_grad()  # what is added is a constant
    def _refresh_copy(self, role: RoleWeights) -> None:
        source = self._added(role)
        key = (id(role.host), str(source.adapter)) if source else None
        if source is None or key is None or key not in self._copies:
            return
        if self._copied.get(key) != source.versions:  # else a pending backward would find its weights changed
            for name, p in self._copies[key].items():
                p.copy_(source.parameters[name])
            self._copied[key] = source.versions

    def _base(self, role: RoleWeights, *, merge: bool = False) -> list[Tensor]:
        """The weights that the role's adapter acts on: the backbone's, with what is added of a role of full weights, or
        of any if they are to be merged."""
        added, other = role.spec.added, self._added(role)
        if added is None or other is None or (other.adapter is not None and not merge):
            return role.host.base
        weight = self.added_weight(role.spec.name)

        def combine() -> list[Tensor]:
            return [(w + weight * d).to(w.dtype) for w, d in zip(role.host.base, other.deltas(), strict=True)]

        return self._combine_once((id(role.host), added), [*other.versions, weight], combine)

    def _merged(self, role: RoleWeights) -> list[Tensor]:
        """The weights of the adapted layers with the role's adapter, and what is added, in them."""
        base, other = self._base(role, merge=True), self._added(role)
        versions = [*role.versions, *(other.versions if other else ()), self.added_weight(role.spec.name)]
        return self._combine_once(role.spec.name, versions, lambda: role.host.merged(str(role.adapter), base))

    def _combine_once(self, key: Hashable, versions: list[float], combine: Callable[[], list[Tensor]]) -> list[Tensor]:
        """Copies of weights, made again when those have changed that they are made of."""
        if key not in self._combined or self._combined[key][0] != versions:
            with torch.no_grad():  # a copy for inference, or what is added: a constant
                self._combined[key] = (versions, combine())
        return self._combined[key][1]

    # -------------------------------------------------------------------------------------- weights

    def transformer(self, name: str) -> Any:
        """The transformer that computes a role: its own, or the backbone that its adapter is on."""
        return self._members[name].host.transformer

    @property
    def spread(self) -> bool:
        """Whether roles have weights of their own that are spread over the processes of the run."""
        return any(shards.is_spread(p) for role in self._members.values() for p in role.parameters.values())

    @torch.no_grad()  # a copy
    def whole(self, name: str) -> Any:
        """The transformer that computes a role. Where that is spread over processes this is collective, and the first
        one gets a whole copy in main memory, the others None."""
        transformer = self.transformer(name)
        if self._members[name].adapter is not None or not self._members[name].host.sharded:
            return transformer
        weights = ((n, shards.gathered(p.detach())) for n, p in transformer.state_dict().items())
        found = {n: p.cpu() for n, p in weights if processes.rank() == 0}
        if not found:
            return None
        copy = type(transformer).from_config(transformer.config)
        copy.load_state_dict(found)
        return copy

    def weights(self, name: str) -> dict[str, nn.Parameter]:
        """The role's own weights by a name that does not depend on the role. Raises ValueError for the teacher."""
        self._members[name].require_owned()
        return self._members[name].parameters

    def parameters(self, name: str) -> list[nn.Parameter]:
        """What an optimizer of this role trains."""
        return list(self.weights(name).values())

    def load(self, name: str, weights: Mapping[str, Tensor]) -> None:
        """Copies ``weights`` into a role. Raises ValueError on missing, unknown or misshapen names."""
        self._members[name].load(weights)

    def copy(self, target: str, source: str) -> None:
        """target <- source."""
        self.load(target, self.weights(source))

    def state(self, name: str) -> dict[str, Tensor]:
        """A copy of the role's own weights, on the CPU; whole, and then collective, where they are spread."""
        return self._members[name].state()

    def deltas(self, name: str) -> list[Tensor]:
        """How the role changes the weights of each adapted layer from where it started."""
        return self._members[name].deltas()

    def adapted_modules(self, name: str) -> list[str]:
        """Names of the layers that the role's adapter changes, in the order of `deltas`."""
        return self._members[name].host.names

    def base_weights(self, name: str) -> list[Tensor]:
        """The backbone's weights of the layers that the role's adapter changes, in the order of `deltas`."""
        return self._members[name].host.base

    def added_to(self, name: str) -> list[Tensor] | None:
        """What is added to the role's own change of each adapted layer; None if nothing is."""
        role = self._members[name]
        other = self._added(role)
        return [self.added_weight(name) * d for d in other.deltas()] if other else None

    def update_averages(self, source: str, *, updates: int = 0) -> None:
        """Every role that averages ``source`` follows it; ``updates``: how many the source has had, for ramps."""
        for name, role in self._members.items():
            if role.spec.average and role.spec.average.of == source:
                self.average(name, source, role.spec.average.decay_after(updates))

    @torch.no_grad()  # averages never receive a gradient
    def average(self, target: str, source: str, decay: float) -> None:
        """target <- decay target + (1 - decay) source."""
        new = self.weights(source)
        pairs = [(p, new[name]) for name, p in self.weights(target).items()]
        averages = [p for p, _ in pairs]
        get_ema_multi_avg_fn(decay)(averages, [q for _, q in pairs], 0)
        torch.autograd.graph.increment_version(averages)  # on a GPU that kernel does not


def _idle(field: Velocity, x_t: Tensor, c: Conditioning) -> Tensor:
    """The velocity of no samples, computed all the same: where a transformer's weights are spread over the processes,
    each of them takes part in every pass and every backward."""
    one = x_t.new_zeros(1, *x_t.shape[1:])
    return field(one, one.new_full((1,), 0.5), c.first_prompt())[:0]
