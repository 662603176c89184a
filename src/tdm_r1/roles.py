"""Roles: who plays generator, surrogate, reference, fake score and teacher, and the one way to switch between them.

A role sits on a *seat*: a transformer, and either a LoRA adapter on it or the transformer's own weights. One frozen
backbone can so carry every role as an adapter (the teacher is the backbone with adapters off); a second backbone
serves a student whose base differs from the teacher's; full-weight roles are transformers of their own. What a role
owns is float32, whatever the frozen backbone's precision: small updates and slow averages vanish in bfloat16.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from . import flow
from .backbones import Backbone, Conditioning, Velocity


class Role(StrEnum):
    """The paper's roles (its letters in brackets), and the two averages that are used in their place."""

    TEACHER = "teacher"  # psi: the many-step base, frozen
    GENERATOR = "generator"  # theta: the few-step model
    GENERATOR_EMA = "generator_ema"  # what is evaluated and exported
    FAKE = "fake"  # s_fake: the score of the generator's own samples
    FAKE_FINAL = "fake_final"  # s_fake of x_0 alone, where that is kept apart from the trajectory's other points
    SURROGATE = "surrogate"  # phi: the reward, a diffusion model
    SURROGATE_EMA = "surrogate_ema"  # phi averaged: the reward direction that is used
    REFERENCE = "reference"  # ref: EMA of phi, or phi's start


TRAINED = (Role.GENERATOR, Role.FAKE, Role.FAKE_FINAL, Role.SURROGATE)
PHI = (Role.SURROGATE, Role.SURROGATE_EMA, Role.REFERENCE)  # the surrogate and its averages: weights of one kind


@dataclass(frozen=True)
class Seat:
    """Where a role's weights live: ``adapter`` on ``transformer``, or, if None, the transformer's own weights."""

    transformer: nn.Module
    adapter: str | None


Acting = tuple[tuple[str, float], ...]
"""Adapters that act at once, each with its strength."""


@dataclass(frozen=True)
class Carried:
    """What a role acts with on top of its own adapter: ``weight`` times another role's change of the weights."""

    role: Role
    weight: float


class Roles:
    """The cast. Build it with `lora_roles` or `full_roles`.

    Args:
        seats: where each role's weights live.
        velocity_of: the backbone's velocity field of a transformer.
        merge: without gradients, run an adapter as a merged copy of the weights that it adapts. Faster where the
            model is small; costs that copy for each role, and rounds in the backbone's precision.
        carried: what roles act with on top of their own adapters, in the layers that these adapt. It is a constant to
            them: no gradient reaches the carried role. Another adapter acts beside the role's own, a copy of it where
            it sits on another backbone; of a role with full weights a copy of those layers is made, in the backbone's
            precision.
    """

    def __init__(
        self,
        seats: Mapping[Role, Seat],
        velocity_of: Callable[[nn.Module], Velocity],
        *,
        merge: bool = False,
        carried: Mapping[Role, Carried] | None = None,
    ) -> None:
        self._seats = dict(seats)
        self._velocity_of = velocity_of
        self.merge = merge
        self.carried = dict(carried or {})
        adapted = {
            id(seat.transformer): {n: m for n, m in seat.transformer.named_modules() if isinstance(m, BaseTunerLayer)}
            for seat in seats.values()
        }
        self._names = {key: list(layers) for key, layers in adapted.items()}
        self._layers = {key: list(layers.values()) for key, layers in adapted.items()}
        self._base = {key: [layer.base_layer.weight.data for layer in layers] for key, layers in self._layers.items()}
        self._made: dict[tuple[Role, bool], tuple[list[int], list[Tensor]]] = {}  # `_made_once`
        self._in_use: dict[int, object] = {}  # by transformer: the innermost `use`
        hosts = {id(seat.transformer): seat.transformer for seat in self._seats.values()}.values()
        self.tf32 = any(p.dtype != torch.float32 and p.is_cuda for host in hosts for p in host.parameters())
        self._active: dict[int, Acting] = {}  # the active adapters of each transformer that has some
        self._weights = {role: dict(self._named(seat)) for role, seat in self._seats.items()}
        for role, weights in self._weights.items():
            if self._owns(role):
                for p in weights.values():
                    p.requires_grad_(role in TRAINED)
        # adapters of another backbone that are carried: a copy stands, under the same name, on the carriers' own
        self._copies = {self._copy_key(r): dict(self._named(self._copy_seat(r))) for r in self.carried if self._far(r)}
        self._copied: dict[tuple[int, Role], list[int]] = {}  # versions of what each was copied from
        for role, seat in self._seats.items():
            self._activate(seat.transformer, self._acting(role))
        if wrong := [role for role in self.carried if self._seats[role].adapter is None]:
            raise ValueError(f"role {wrong[0]} cannot carry another: it is no adapter")

    def __contains__(self, role: Role) -> bool:
        return role in self._seats

    def _owns(self, role: Role) -> bool:
        """Whether the role has weights of its own, rather than a frozen backbone's."""
        return role is not Role.TEACHER

    @staticmethod
    def _named(seat: Seat) -> Iterator[tuple[str, nn.Parameter]]:
        for name, p in seat.transformer.named_parameters():
            if seat.adapter is None:
                yield name, p
            elif f".{seat.adapter}." in name:
                yield name.replace(f".{seat.adapter}.", "."), p

    # -------------------------------------------------------------------------------------- switching

    @contextmanager
    def use(self, role: Role) -> Iterator[Velocity]:
        """Activates ``role`` and yields its velocity field; restores the role that was active before.

        The velocity may be called in this context alone, outside of any `use` of the same transformer within it.

        Finish the backward inside the context where the role carries another, and when gradient checkpointing is on:
        afterwards the layers have other weights, and recomputation runs through whichever adapter is active then.
        """
        seat = self._seats[role]
        key = id(seat.transformer)
        before, weights = self._active[key], [layer.base_layer.weight.data for layer in self._layers[key]]
        merge = self.merge and seat.adapter is not None and not torch.is_grad_enabled()
        if not merge and self._far(role):
            self._bring_copy_up_to_date(role)
        self._activate(seat.transformer, () if merge else self._acting(role))
        self._set_base(key, self._merged_weights(role) if merge else self._carrying_weights(role))
        outer, here = self._in_use.get(key), object()
        self._in_use[key] = here
        field = self._velocity_of(seat.transformer)

        def velocity(x_t: Tensor, t: Tensor, c: Conditioning) -> Tensor:
            if self._in_use.get(key) is not here:
                raise RuntimeError(f"the velocity of role {role} is called where its transformer acts as another role")
            return field(x_t, t, c)

        try:
            with self._adapters_in_tf32():
                yield velocity
        finally:
            self._in_use[key] = outer
            self._set_base(key, weights)
            self._activate(seat.transformer, before)

    @contextmanager
    def _adapters_in_tf32(self) -> Iterator[None]:
        """TensorFloat32 for the float32 adapters on a bfloat16 backbone, and for nothing outside: rewards in this
        process compute in float32."""
        before = torch.get_float32_matmul_precision()
        if self.tf32:
            torch.set_float32_matmul_precision("high")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(before)

    def _far(self, role: Role) -> bool:
        """Whether the adapter that the role carries sits on another backbone: a copy of it, of the same name, has to
        stand beside the role's own (`lora_roles`)."""
        if not self._carries_adapter(role):
            return False
        return self._seats[self.carried[role].role].transformer is not self._seats[role].transformer

    def _copy_key(self, role: Role) -> tuple[int, Role]:
        return id(self._seats[role].transformer), self.carried[role].role

    def _copy_seat(self, role: Role) -> Seat:
        return Seat(self._seats[role].transformer, str(self.carried[role].role))

    @torch.no_grad()  # what is carried is a constant
    def _bring_copy_up_to_date(self, role: Role) -> None:
        key, source = self._copy_key(role), self._weights[self.carried[role].role]
        versions = [p._version for p in source.values()]
        if self._copied.get(key) != versions:  # else a backward that is still to come would find its weights changed
            for name, p in self._copies[key].items():
                p.copy_(source[name])
            self._copied[key] = versions

    def _set_base(self, key: int, weights: list[Tensor]) -> None:
        for layer, weight in zip(self._layers[key], weights, strict=True):
            layer.base_layer.weight.data = weight

    def _merged_weights(self, role: Role) -> list[Tensor]:
        """The weights of the adapted layers with the role's adapter in them."""

        def make() -> list[Tensor]:
            merged = [self._carrying_weights(role), self._deltas(role)]
            if self._carries_adapter(role):
                merged.append([self.carried[role].weight * d for d in self._deltas(self.carried[role].role)])
            return [sum(rest, start=w).to(w.dtype) for w, *rest in zip(*merged, strict=True)]

        return self._made_once(role, True, make)

    def _carrying_weights(self, role: Role) -> list[Tensor]:
        """The weights of the adapted layers that the role's adapter sits on: the backbone's, with what it carries in
        them where that is no adapter."""
        base = self._base[id(self._seats[role].transformer)]
        if role not in self.carried or self._carries_adapter(role):
            return base
        other = self.carried[role]
        return self._made_once(
            role,
            False,
            lambda: [(w + other.weight * d).to(w.dtype) for w, d in zip(base, self._deltas(other.role), strict=True)],
        )

    def _carries_adapter(self, role: Role) -> bool:
        return role in self.carried and self._seats[self.carried[role].role].adapter is not None

    def _acting(self, role: Role) -> Acting:
        """The adapters that the role acts with: its own, and one that it carries."""
        own = self._seats[role].adapter
        if own is None or not self._carries_adapter(role):
            return () if own is None else ((own, 1.0),)
        other = self.carried[role]
        return (own, 1.0), (str(other.role), other.weight)

    def copied_bytes(self) -> int:
        """What merged and carried weights come to once every role has been on stage."""
        total = 0
        for role, seat in self._seats.items():
            if seat.adapter is not None:
                copies = self.merge + (role in self.carried and not self._carries_adapter(role))
                total += copies * sum(w.numel() * w.element_size() for w in self._base[id(seat.transformer)])
        return total

    def _deltas(self, role: Role) -> list[Tensor]:
        """How ``role`` changes the weights of the layers that are adapted, from where it started."""
        seat = self._seats[role]
        if seat.adapter is not None:
            return [_delta(layer, seat.adapter) for layer in self._layers[id(seat.transformer)]]
        key, own = id(self._seats[Role.TEACHER].transformer), self._weights[role]
        starts = zip(self._names[key], self._base[key], strict=True)
        return [own[f"{name}.weight"] - start for name, start in starts]

    def _made_once(self, role: Role, merged: bool, make: Callable[[], list[Tensor]]) -> list[Tensor]:
        """Weights that are made again when those have changed that they are made of."""
        sources = [role] + ([self.carried[role].role] if role in self.carried else [])
        versions = [p._version for source in sources for p in self._weights[source].values()]
        if (role, merged) not in self._made or self._made[role, merged][0] != versions:
            with torch.no_grad():  # a copy for inference, or what is carried: a constant
                self._made[role, merged] = (versions, make())
        return self._made[role, merged][1]

    def _activate(self, transformer: nn.Module, acting: Acting) -> None:
        key = id(transformer)
        if key in self._active and self._active[key] == acting:
            return
        for layer in self._layers[key]:
            layer.enable_adapters(bool(acting))
            if acting:
                layer.set_adapter([adapter for adapter, _ in acting])
            for adapter, weight in acting:
                layer.set_scale(adapter, weight)
        self._active[key] = acting
        # peft sets requires_grad on every switch; a role's own flags must outlive it, or a backward that runs after
        # the switch would silently drop gradients. What is carried is a constant
        constant = {adapter for adapter, _ in acting[1:]}
        for role, weights in self._weights.items():
            if self._layers[key] and self._seats[role].transformer is transformer and self._owns(role):
                for p in weights.values():
                    p.requires_grad_(role in TRAINED and str(role) not in constant)
        for (host, _), copied in self._copies.items():
            if host == key:
                for p in copied.values():
                    p.requires_grad_(False)

    # -------------------------------------------------------------------------------------- weights

    def transformer(self, role: Role) -> Any:
        """The transformer on which the role sits: its own, or the backbone that carries its adapter."""
        return self._seats[role].transformer

    def weights(self, role: Role) -> dict[str, nn.Parameter]:
        """The role's own weights by a name that does not depend on the role. Raises ValueError for the teacher."""
        if not self._owns(role):
            raise ValueError(f"role {role} has no weights of its own: it is the frozen backbone")
        return self._weights[role]

    def parameters(self, role: Role) -> list[nn.Parameter]:
        """What an optimizer of this role trains."""
        return list(self.weights(role).values())

    @torch.no_grad()  # copies and averages are never trained
    def load(self, role: Role, weights: Mapping[str, Tensor]) -> None:
        """Copies ``weights`` in. Raises ValueError on missing, unknown or misshapen names."""
        own = self.weights(role)
        if wrong := own.keys() ^ weights.keys():
            raise ValueError(f"weights for role {role} do not fit: {len(wrong)} names differ, e.g. {min(wrong)!r}")
        for name, p in own.items():
            if p.shape != weights[name].shape:
                raise ValueError(
                    f"weights for role {role} do not fit: {name} is {tuple(weights[name].shape)}, "
                    f"expected {tuple(p.shape)}; is the LoRA rank the same?"
                )
            p.copy_(weights[name])

    def copy(self, target: Role, source: Role) -> None:
        """target <- source."""
        self.load(target, self.weights(source))

    @torch.no_grad()  # EMA weights never receive a gradient
    def average(self, target: Role, source: Role, decay: float) -> None:
        """target <- decay target + (1 - decay) source."""
        new = self.weights(source)
        pairs = [(p, new[name]) for name, p in self.weights(target).items()]
        torch._foreach_lerp_([p for p, _ in pairs], [q for _, q in pairs], 1 - decay)
        torch.autograd.graph.increment_version([p for p, _ in pairs])  # on a GPU that kernel does not

    def state(self, role: Role) -> dict[str, Tensor]:
        """A copy of the role's own weights, on the CPU."""
        return {name: p.detach().to("cpu", copy=True) for name, p in self.weights(role).items()}

    @torch.no_grad()  # a copy
    def exported(self, role: Role, config: LoraConfig) -> tuple[dict[str, Tensor], LoraConfig]:
        """The role's adapter, with what it carries in it, as one LoRA; and that LoRA's settings.

        Its alpha is its rank, the scale being in B: so programs that know nothing of diffusers' metadata, such as
        ComfyUI, apply it at the right strength too. Twice the rank where something is carried: exact if that is an
        adapter too, or if no layer has a higher rank; else the nearest in least squares.
        """
        scale = config.lora_alpha / config.r
        own = {n: w * scale if "lora_B" in n else w for n, w in self.state(role).items()}
        if role not in self.carried:
            return own, replace(config, lora_alpha=config.r)
        other = self.carried[role]
        wide = replace(config, r=2 * config.r, lora_alpha=2 * config.r)
        if self._seats[other.role].adapter is not None:
            extra = self.state(other.role)
            return {
                n: torch.cat([w, other.weight * scale * extra[n]], 1) if "lora_B" in n else torch.cat([w, extra[n]])
                for n, w in own.items()
            }, wide
        deltas = zip(self._deltas(role), self._deltas(other.role), strict=True)
        weights: dict[str, Tensor] = {}
        for name, (change, carried) in zip(self._names[id(self._seats[role].transformer)], deltas, strict=True):
            down, up = _factors((change + other.weight * carried).float(), wide.r)
            weights |= {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}
        return weights, wide


def _delta(layer: Any, adapter: str) -> Tensor:
    """What an adapter at its full strength adds to a layer's weights."""
    acting = layer.scaling[adapter]
    layer.set_scale(adapter, 1.0)
    delta = layer.get_delta_weight(adapter)
    layer.scaling[adapter] = acting
    return delta


def _factors(delta: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """A [rank, in] and B [out, rank] with B A the nearest to ``delta`` [out, in]; rows of nothing where it has less."""
    u, s, v = torch.linalg.svd(delta, full_matrices=False)
    u, s, v = u[:, :rank], s[:rank].sqrt(), v[:rank]
    down, up = delta.new_zeros(rank, delta.shape[1]), delta.new_zeros(delta.shape[0], rank)
    down[: len(s)], up[:, : len(s)] = s[:, None] * v, u * s
    return down, up


def lora_roles(
    student: Backbone,
    config: LoraConfig,
    roles: tuple[Role, ...],
    *,
    teacher: Backbone | None = None,
    full: tuple[Role, ...] = (),
    merge: bool = False,
    carried: Mapping[Role, Carried] | None = None,
) -> Roles:
    """Every role but the teacher as a LoRA adapter, all starting at their backbone's own function.

    Args:
        student: carries generator and fake scores, and without ``teacher`` everything.
        config: the adapters' configuration; they are all alike.
        roles: which roles to cast beside the teacher.
        teacher: a second backbone, for a student whose base weights differ; it carries surrogate and reference too.
        full: those of ``roles`` that are transformers of their own instead, copied from their backbone.
        merge, carried: see `Roles`.
    """
    hosts = _hosts(student, teacher, roles)
    seats = {role: _own_transformer(hosts[role]) for role in full}
    first: dict[int, str] = {}
    for role, host in hosts.items():
        if role in full:
            continue
        seat = _new_adapter(host.transformer, config, str(role))
        # `init_lora_weights` draws A anew for each adapter: make equal starts really equal
        if id(host.transformer) in first:
            source = dict(Roles._named(Seat(host.transformer, first[id(host.transformer)])))
            with torch.no_grad():  # initialisation
                for name, p in Roles._named(seat):
                    p.copy_(source[name])
        first.setdefault(id(host.transformer), str(role))
        seats[role] = seat
    for role, other in (carried or {}).items():
        transformer: Any = hosts[role].transformer
        name = str(other.role)
        both_adapters = role not in full and other.role not in full
        if both_adapters and hosts[other.role] is not hosts[role] and name not in transformer.peft_config:
            _new_adapter(transformer, config, name)  # for a copy: `Roles` keeps it up to date
    seats[Role.TEACHER] = Seat((teacher or student).transformer, None)
    return Roles(seats, student.velocity_of, merge=merge, carried=carried)


def _new_adapter(transformer: Any, config: LoraConfig, name: str) -> Seat:
    """On a diffusers model, by its peft mix-in."""
    with warnings.catch_warnings():  # peft warns of a second adapter; a cast of them is what is wanted
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")
        transformer.add_adapter(config, adapter_name=name)
    seat = Seat(transformer, name)
    _widen(p for _, p in Roles._named(seat))
    return seat


def _hosts(student: Backbone, teacher: Backbone | None, roles: tuple[Role, ...]) -> dict[Role, Backbone]:
    """The backbone that each role starts from: the student's for generator and fake scores, else the teacher's."""
    other = teacher or student
    return {role: student if role.startswith(("generator", "fake")) else other for role in roles}


def _own_transformer(host: Backbone) -> Seat:
    transformer = copy.deepcopy(host.transformer)
    _widen(transformer.parameters())
    return Seat(transformer, None)


def _widen(parameters: Iterable[nn.Parameter]) -> None:
    for p in parameters:
        p.data = flow.widen(p.data)


def full_roles(student: Backbone, roles: tuple[Role, ...], *, teacher: Backbone | None = None) -> Roles:
    """Every role as a transformer of its own, copied from its backbone; the teacher is the backbone itself."""
    seats = {role: _own_transformer(host) for role, host in _hosts(student, teacher, roles).items()}
    seats[Role.TEACHER] = Seat((teacher or student).transformer, None)
    return Roles(seats, student.velocity_of)
