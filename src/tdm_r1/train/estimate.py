"""What a run will need: GPU memory and arithmetic of one iteration, found without weights, hub or GPU.

The model with one adapter is built on PyTorch's "meta" device, where tensors have shapes and no contents, and each part
of an iteration is traced once: what is alive at the worst moment is the working memory, what is multiplied is
the arithmetic; the algorithm declares how often each is done, and for which roles. Attention is counted as a fused
kernel, which keeps no matrix of weights.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from ..config.load import distillation
from ..config.run import RunConfig
from ..models.architectures import architecture_of, architectures, random_pipeline, text_encoder_parameters
from ..models.create import create_roles
from ..models.load import adapter_settings
from ..models.pipeline import PipelineBackbone, family_of
from ..models.protocol import Conditioning
from ..models.roles import Roles
from ..models.settings import ModelConfig
from ..models.specification import AddedDelta, Role, RoleSpec
from .build import algorithm_of

CLIP_TOKENS = 77  # SD3's pipeline pads to them; T5's are model.max_sequence_length
PROMPT_TOKENS = 64  # of a prompt, where the model does not pad to a fixed length
GPU_FLOPS = 989e12  # an H100's or H200's dense bfloat16 peak, by its data sheet
ADAM_BYTES = {False: 8, True: 2}  # two averages a trained parameter, in float32 or in 8 bits
FLOAT_BYTES = 4
GPU_MEMORY = 75 * 2**30  # of an H100 of 80 GB, beside a reward's network: what is planned for where no GPU is asked
ALLOCATOR = 1.15  # what an allocator takes of what tensors take
SPREAD_OVER = 8  # GPUs that the estimate is made for where a run spreads its transformers, if nobody says how many


@dataclass(frozen=True)
class Estimate:
    """``held``: bytes that stay; ``working``: bytes at the worst moment of each part, one part at a time; ``flops``:
    of each part of an iteration. By name. ``utilisation``: the share of the GPU's peak that they reach. ``gpus``: over
    which transformers are spread; the memory is that of each. ``recomputed``: with gradient checkpointing."""

    held: dict[str, float]
    working: dict[str, float]
    flops: dict[str, float]
    utilisation: float
    gpus: int = 1
    recomputed: bool = False

    @property
    def peak(self) -> float:
        """Bytes at the worst moment, without allocator overhead."""
        return sum(self.held.values()) + max(self.working.values())

    def seconds(self, gpus: int = 1) -> float:
        """An iteration on GPUs that share its samples evenly, without rewards and communication."""
        return sum(self.flops.values()) / (gpus * GPU_FLOPS * self.utilisation)


def estimate(config: RunConfig, *, gpus: int = SPREAD_OVER, **sizes: Any) -> Estimate | None:
    """The estimate for a run; None where the model's sizes (`architectures.yaml`) or the algorithm's cost are unknown.

    Args:
        gpus: of a run that spreads its transformers (`model.shard`).
        sizes: of the transformer, in place of its own; for tests.
    """
    if config.model.gradient_checkpointing == "auto":
        config = with_checkpointing_decided(config, GPU_MEMORY, **sizes)
    name = architecture_of(config.model.path)
    counts = algorithm_of(config).evaluations(config)
    if name is None or not counts:
        return None
    specs = {spec.name: spec for spec in algorithm_of(config).declare_roles(config)}
    samples = min(config.batch.micro_batch, config.batch.prompts * config.batch.group)
    added = any(spec.added and specs[spec.added.role].weights == "lora" for spec in specs.values())
    parts = _parts(name, config.model.model_dump_json(), samples, _frozen(sizes), added)
    working, flops = {}, {}
    for part, count in counts.items():
        wide = parts.sample(count.at_once)
        working[part], flops[part] = wide.peak, wide.flops / count.at_once * count.frozen / samples
        if count.trained:
            full = count.role is not None and specs[count.role].weights == "full"
            one = parts.train_full() if full else parts.train
            inside = one.kept + wide.peak if count.nested else 0  # while activations wait
            working[part] = max(working[part], one.peak, inside)
            flops[part] += one.flops * count.trained / samples
    working["decode"] = parts.decode.peak
    flops["decode"] = parts.decode.flops * config.batch.prompts * config.batch.group / parts.decoded
    gpus = gpus if config.model.shard else 1
    held = _held(config, parts, tuple(specs.values()), gpus)
    encoders = text_encoder_parameters(name, t5=config.model.t5) * getattr(torch, config.model.dtype).itemsize
    (working if config.model.offload else held)["text encoders"] = encoders
    share = architectures()[name]["utilisation_added" if added else "utilisation"]
    return Estimate(held, working, flops, share, gpus, recomputed=bool(config.model.gradient_checkpointing))


def with_checkpointing_decided(config: RunConfig, room: float, **sizes: Any) -> RunConfig:
    """The settings with gradient checkpointing off if ``room`` bytes can keep the activations, else on; on, too, where
    the model's sizes are not known or its weights are spread."""
    kept = config.override({"model.gradient_checkpointing": False})
    found = None if config.model.shard else estimate(kept, **sizes)
    if found is not None and ALLOCATOR * found.peak <= room:
        return kept
    return config.override({"model.gradient_checkpointing": True})


def needs(config: RunConfig) -> str:
    """What a run will need, for people, and what the distillation before it, if there is one."""
    text = _described(config)
    if config.distill_with and not config.model.student_lora:
        first = distillation(config)
        text += f"\nbefore it {config.distill_with}, {first.iterations} iterations:\n{_described(first)}"
    return text


def _described(config: RunConfig) -> str:
    found = estimate(config)
    return describe(found) if found else "no estimate: the sizes of this model are not known here"


def describe(found: Estimate) -> str:
    """The estimate for people."""
    gib = 2**30
    worst = max(found.working, key=found.working.__getitem__)
    where = "one GPU" if found.gpus == 1 else f"each of {found.gpus} GPUs"
    lines = [f"memory of {where}, about {found.peak / gib:.1f} GiB (without allocator overhead):"]
    lines += [f"  {name:<34}{size / gib:8.2f} GiB" for name, size in found.held.items()]
    lines += [f"  {'temporary, largest in: ' + worst:<34}{found.working[worst] / gib:8.2f} GiB"]
    petaflops = sum(found.flops.values()) / 1e15
    shares = ", ".join(f"{part} {100 * f / 1e15 / petaflops:.0f} %" for part, f in found.flops.items())
    lines += [
        f"one iteration, {'with' if found.recomputed else 'without'} gradient checkpointing (auto: as on 80 GB): "
        f"{petaflops:.1f} PFLOP "
        f"({shares});",
        f"  at {100 * found.utilisation:.0f} % of an H100's peak {found.seconds():.0f} s on 1 GPU, "
        f"{found.seconds(8):.0f} s on 8 (without their exchanges);",
        "  rewards, text encoders and evaluations not counted",
    ]
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------ what stays


def _held(config: RunConfig, parts: _Parts, specs: tuple[RoleSpec, ...], gpus: int) -> dict[str, float]:
    """Bytes that stay, by name: of the frozen models, and what the declared roles add to them; spread over ``gpus``
    what is not an adapter."""
    m, b = config.model, config.batch
    backbones = 2 if m.teacher else 1
    numbers = {
        spec.name: parts.full_numbers / gpus if spec.weights == "full" else parts.adapter_numbers for spec in specs
    }
    trained = {spec.name: numbers[spec.name] for spec in specs if spec.trained}
    whole = {spec.name for spec in specs if spec.weights == "full"}
    adapters = [spec for spec in specs if spec.weights == "lora"]
    added = {(spec.host, spec.added) for spec in adapters if spec.added and (m.merge or spec.added.role in whole)}
    combined = m.merge * len(adapters) + len(added)
    hosts = {spec.name: spec.host for spec in specs}
    beside = {(spec.host, spec.added.role) for spec in adapters if spec.added} if m.teacher else set()
    beside = {(host, role) for host, role in beside if hosts[role] != host and role not in whole}
    points, kind = 2 * config.sampler.steps + 1, algorithm_of(config)
    own, waiting = kind.optimizer_settings(config), sum if kind.one_update_at_the_end else max
    return {
        "frozen transformer" + ("s" if m.teacher else ""): backbones * parts.frozen_bytes / gpus,
        f"weights of {len(specs)} roles": FLOAT_BYTES * sum(numbers.values()),
        "optimizers": sum(ADAM_BYTES[role in own and own[role].eight_bit] * n for role, n in trained.items()),
        "gradients": FLOAT_BYTES * waiting(trained.values()),
        "merged copies": combined * parts.adapted_bytes,
        "adapters on a second transformer": FLOAT_BYTES * len(beside) * parts.adapter_numbers,
        "autoencoder": 0 if m.offload else parts.autoencoder_bytes,
        "prompts and trajectories": (1 + config.scoring.staleness)
        * b.prompts
        * (parts.prompt_bytes + points * b.group * parts.latent_bytes),
    }


def _bytes(t: Tensor) -> int:
    return t.numel() * t.element_size()


# ------------------------------------------------------------------------------------------ what works


def random_backbone(name: str, m: ModelConfig, *, device: str = "meta", **sizes: Any) -> PipelineBackbone:
    """The backbone that the settings name, of an architecture's sizes or those given, with random weights."""
    pipeline = random_pipeline(name, device=device, dtype=getattr(torch, m.dtype), **sizes)
    backbone = family_of(type(pipeline).__name__, name)(
        pipeline, max_sequence_length=m.max_sequence_length, resolution=m.resolution, decode_batch=m.decode_batch
    )
    if m.gradient_checkpointing:
        pipeline.transformer.enable_gradient_checkpointing()
    return backbone


@dataclass(frozen=True)
class Play:
    """Bytes at the worst moment, bytes that a backward keeps at the end of the forward, floating point operations."""

    peak: float
    kept: float
    flops: float


class _Parts:
    """Sizes of a model with one adapter, and the parts of an iteration on one micro-batch, each traced once.

    Where an adapter is added to others, every pass counts as one with two.
    """

    def __init__(self, backbone: PipelineBackbone, model: ModelConfig, samples: int, *, added: bool) -> None:
        transformer = backbone.transformer
        self.backbone, self.decoded = backbone, min(backbone.decode_batch, samples)
        self.frozen_bytes = sum(_bytes(p) for p in [*transformer.parameters(), *transformer.buffers()])
        self.full_numbers = sum(p.numel() for p in transformer.parameters())
        self.autoencoder_bytes = sum(_bytes(p) for p in backbone.pipeline.vae.parameters())
        delta = AddedDelta(Role.SURROGATE_EMA, 1.0) if added else None
        specs = [RoleSpec(Role.GENERATOR, trained=True, added=delta)]
        if added:
            specs.append(RoleSpec(Role.SURROGATE_EMA))
        with torch.device("meta"):
            precise = model.lora.precision == "float32"
            self.roles = create_roles(specs, backbone, adapter_settings(model), precise=precise)
        self.adapter_numbers = sum(p.numel() for p in self.roles.parameters(Role.GENERATOR))
        self.adapted_bytes = sum(_bytes(delta) for delta in self.roles.base_weights(Role.GENERATOR))
        self.inputs = self._inputs(samples)
        self.prompt_bytes = sum(_bytes(t) for t in self.inputs[2].tensors.values()) // samples
        self.latent_bytes = _bytes(self.inputs[0][:1])
        twice = play(lambda: self._sample(self._inputs(2 * samples)))  # traced once: all of it grows with the samples
        self._once = Play(twice.peak / 2, 0, twice.flops / 2)
        self.train = self._training(self.roles)
        self.decode = play(self._decode)

    def sample(self, at_once: int) -> Play:
        """A pass without gradient in which every sample is ``at_once`` times."""
        return Play(at_once * self._once.peak, 0, at_once * self._once.flops)

    def train_full(self) -> Play:
        """Forward and backward of a role with weights of its own."""
        config = LoraConfig(target_modules=[])
        with torch.device("meta"):
            specs = [RoleSpec(Role.GENERATOR, trained=True, weights="full")]
            return self._training(create_roles(specs, self.backbone, config))

    def _inputs(self, samples: int) -> tuple[Tensor, Tensor, Conditioning]:
        x_t = torch.empty((samples, *self.backbone.latent_shape), device="meta")
        c = random_conditioning(self.backbone, samples, device="meta")
        return x_t, torch.empty(samples, device="meta"), c

    @torch.no_grad()
    def _sample(self, inputs: tuple[Tensor, Tensor, Conditioning]) -> None:
        with self.roles.use(Role.GENERATOR) as velocity:
            velocity(*inputs)

    def _training(self, roles: Roles) -> Play:
        def work(meter: Meter) -> None:
            with roles.use(Role.GENERATOR) as velocity:
                loss = velocity(*self.inputs).square().sum()
                meter.mark()
                loss.backward()
            for p in roles.parameters(Role.GENERATOR):
                p.grad = None

        return play_with(work)

    @torch.no_grad()
    def _decode(self) -> None:
        vae = self.backbone.pipeline.vae
        z = torch.empty((self.decoded, *self.backbone.latent_shape), device="meta", dtype=vae.dtype)
        vae.decode(z, return_dict=False)[0].float()


@cache
def _parts(name: str, model: str, samples: int, sizes: tuple[tuple[str, Any], ...], added: bool) -> _Parts:
    """Kept: recipes share them."""
    config = ModelConfig.model_validate_json(model)
    backbone = random_backbone(name, config, **dict(sizes))
    return _Parts(backbone, config, samples, added=added)


def _frozen(sizes: dict[str, Any]) -> tuple[tuple[str, Any], ...]:
    return tuple((k, tuple(v) if isinstance(v, list) else v) for k, v in sorted(sizes.items()))


def random_conditioning(backbone: PipelineBackbone, samples: int, *, device: str) -> Conditioning:
    """Normal numbers in the shapes of ``samples`` prompts."""
    sizes, dtype = backbone.pipeline.transformer.config, backbone.pipeline.transformer.dtype
    if "joint_attention_dim" in sizes:
        tokens = CLIP_TOKENS + backbone.max_sequence_length
        embeds = torch.randn(samples, tokens, sizes.joint_attention_dim, device=device, dtype=dtype)
        pooled = torch.randn(samples, sizes.pooled_projection_dim, device=device, dtype=dtype)
        return Conditioning.of(embeds=embeds, pooled=pooled)
    tokens = min(PROMPT_TOKENS, backbone.max_sequence_length)
    embeds = torch.randn(samples, tokens, sizes.cap_feat_dim, device=device, dtype=dtype)
    return Conditioning.of(embeds=embeds, lengths=torch.full((samples,), tokens))


# ------------------------------------------------------------------------------------------ counting


def play(work: Callable[[], None]) -> Play:
    """What ``work`` costs, beyond what was alive before."""
    return play_with(lambda meter: work())


def play_with(work: Callable[[Meter], None]) -> Play:
    """The same; ``work`` may call `Meter.mark` at the end of a forward."""
    with Meter() as meter, FusedAttention() as attention:
        work(meter)
    return Play(meter.peak, meter.marked, meter.flops + attention.flops)


class Meter(TorchDispatchMode):
    """Counts the bytes of storages that are made inside, while they live, and multiplications as PyTorch's own counter
    does; that one, with its hooks on modules, keeps tensors alive."""

    def __init__(self) -> None:
        super().__init__()
        self.alive, self.peak, self.marked, self.flops = 0, 0, 0, 0.0
        self._seen: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        known = {id(t.untyped_storage()) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        out = func(*args, **kwargs)
        for t in tree_leaves(out):
            if isinstance(t, Tensor):
                storage = t.untyped_storage()
                if id(storage) not in known and storage not in self._seen:
                    self._count(storage)
        if func.overloadpacket in flop_registry:
            self.flops += flop_registry[func.overloadpacket](*args, **kwargs, out_val=out)
        return out

    def mark(self) -> None:
        """Notes what is alive now."""
        self.marked = self.alive

    def _count(self, storage: torch.UntypedStorage) -> None:
        size = storage.nbytes()
        self._seen.add(storage)
        self.alive += size
        self.peak = max(self.peak, self.alive)
        weakref.finalize(storage, self._free, size)

    def _free(self, size: int) -> None:
        self.alive -= size


class FusedAttention:
    """Attention as the fused kernels have it: q, k, v and the output are kept for the backward, and nothing else.

    It replaces PyTorch's function itself, since a function mode is off inside a backward, where checkpointing
    computes the forward again.
    """

    def __init__(self) -> None:
        self.flops = 0.0

    def __enter__(self) -> FusedAttention:
        self._original = F.scaled_dot_product_attention
        F.scaled_dot_product_attention = self._attend
        return self

    def __exit__(self, *error: object) -> None:
        F.scaled_dot_product_attention = self._original

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, *rest: Any, **named: Any) -> Tensor:
        return _Fused.apply(query, key, value, self)


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, counter: FusedAttention) -> Tensor:
        out = torch.empty_like(q)
        ctx.save_for_backward(q, k, v, out)
        ctx.counter, ctx.flops = counter, 4.0 * q.shape[:-1].numel() * k.shape[-2] * q.shape[-1]
        counter.flops += ctx.flops
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple:
        q, k, v, _ = ctx.saved_tensors
        ctx.counter.flops += 2.5 * ctx.flops  # the kernels compute the weights again
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), None
