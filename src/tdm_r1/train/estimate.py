"""What a run will need: GPU memory and arithmetic of one iteration, found without weights, hub or GPU.

The run's own roles are built on PyTorch's "meta" device, where tensors have shapes and no contents, and each part of an
iteration is played through once: what is alive at the worst moment is the working memory, what is multiplied is the
arithmetic. Attention is counted as a fused kernel, which keeps no matrix of weights.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from ..algorithms.settings import OptimizerConfig
from ..config.run import RunConfig
from ..models.architectures import architecture_of, architectures, random_pipeline, text_encoder_parameters
from ..models.pipeline import PipelineBackbone, family_of
from ..models.protocol import Conditioning, guided
from ..models.roles import Roles
from ..models.specification import Role
from .build import algorithm_of, build_roles
from .start import distillation

CLIP_TOKENS = 77  # SD3's pipeline pads to them; T5's are model.max_sequence_length
PROMPT_TOKENS = 64  # of a prompt, where the model does not pad to a fixed length
GPU_FLOPS = 989e12  # an H100's or H200's dense bfloat16 peak, by its data sheet
ADAM_BYTES = {False: 8, True: 2}  # two averages a trained parameter, in float32 or in 8 bits
GRADIENT_BYTES = 4


@dataclass(frozen=True)
class Estimate:
    """``held``: bytes that stay; ``working``: bytes at the worst moment of each part, one part at a time; ``flops``:
    of each part of an iteration. By name. ``utilisation``: the share of the GPU's peak that they reach."""

    held: dict[str, float]
    working: dict[str, float]
    flops: dict[str, float]
    utilisation: float

    @property
    def peak(self) -> float:
        """Bytes at the worst moment, what a GPU's allocator wastes not counted."""
        return sum(self.held.values()) + max(self.working.values())

    def seconds(self, gpus: int = 1) -> float:
        """An iteration on GPUs that share its samples evenly, without rewards and communication."""
        return sum(self.flops.values()) / (gpus * GPU_FLOPS * self.utilisation)


def estimate(config: RunConfig, **sizes: Any) -> Estimate | None:
    """The estimate for a run; None where the model's sizes (`architectures.yaml`) or the algorithm's cost are unknown.

    Args:
        sizes: of the transformer, in place of its own; for tests.
    """
    name = architecture_of(config.model.path)
    if name is None or not algorithm_of(config).evaluations(config):
        return None
    dtype = getattr(torch, config.model.dtype)
    backbone = random_backbone(name, config, **sizes)
    teacher = random_backbone(name, config, **sizes) if config.model.teacher else None
    with torch.device("meta"):
        roles = build_roles(config, backbone, teacher)
    works = _Works(config, backbone, roles)
    working, flops = {}, {}
    without, once = play(works.sample)
    for part, count in algorithm_of(config).evaluations(config).items():
        working[part], flops[part] = without, once * count.frozen / works.samples
        if count.trained:
            alive, arithmetic = works.training(count.role or Role.GENERATOR)
            working[part] = max(without, alive)
            flops[part] += arithmetic * count.trained / works.samples
    working["decode"], arithmetic = play(works.decode)
    flops["decode"] = arithmetic * config.batch.prompts * config.batch.group / works.decoded
    held = _held(config, backbone, teacher, roles) | {"prompts and trajectories": works.kept_bytes()}
    encoders = text_encoder_parameters(name, t5=config.model.t5) * dtype.itemsize
    (working if config.model.offload else held)["text encoders"] = encoders
    return Estimate(held, working, flops, architectures()[name]["utilisation"])


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
    lines = [f"memory of one GPU, about {found.peak / gib:.1f} GiB (allocator's waste not counted):"]
    lines += [f"  {name:<34}{size / gib:8.2f} GiB" for name, size in found.held.items()]
    lines += [f"  {'at work, worst in: ' + worst:<34}{found.working[worst] / gib:8.2f} GiB"]
    petaflops = sum(found.flops.values()) / 1e15
    shares = ", ".join(f"{part} {100 * f / 1e15 / petaflops:.0f} %" for part, f in found.flops.items())
    lines += [
        f"one iteration: {petaflops:.1f} PFLOP ({shares});",
        f"  at {100 * found.utilisation:.0f} % of an H100's peak {found.seconds():.0f} s on 1 GPU, "
        f"{found.seconds(8):.0f} s on 8 that share its samples (the trainer drives one so far);",
        "  rewards, text encoders and evaluations not counted",
    ]
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------ what stays


def _held(config: RunConfig, backbone: PipelineBackbone, teacher: PipelineBackbone | None, roles: Roles) -> dict:
    hosts = [b.transformer for b in (backbone, teacher) if b is not None]
    owned = {spec.name: roles.parameters(spec.name) for spec in roles.specs}
    adapters = {id(p) for parameters in owned.values() for p in parameters}
    frozen = sum(_bytes(p) for h in hosts for p in [*h.parameters(), *h.buffers()] if id(p) not in adapters)
    trained = {spec.name: sum(p.numel() for p in owned[spec.name]) for spec in roles.specs if spec.trained}
    return {
        "frozen transformer" + ("s" if teacher else ""): frozen,
        f"weights of {len(owned)} roles": sum(_bytes(p) for ps in owned.values() for p in ps),
        "optimizers": sum(ADAM_BYTES[_optimizer_of(config, role).eight_bit] * n for role, n in trained.items()),
        "gradients, of one role at a time": GRADIENT_BYTES * max(trained.values()),
        "merged copies": roles.copied_bytes(),
        "autoencoder": 0 if config.model.offload else sum(_bytes(p) for p in backbone.pipeline.vae.parameters()),
    }


def _optimizer_of(config: RunConfig, role: str) -> OptimizerConfig:
    own = {Role.GENERATOR: config.tdm.generator, Role.SURROGATE: config.surrogate.optimizer}
    return own.get(Role(role), config.tdm.fake) if role in set(Role) else config.tdm.generator


def _bytes(t: Tensor) -> int:
    return t.numel() * t.element_size()


# ------------------------------------------------------------------------------------------ what works


def random_backbone(name: str, config: RunConfig, *, device: str = "meta", **sizes: Any) -> PipelineBackbone:
    """The backbone that ``config`` asks for, of an architecture's sizes or those given, with random weights."""
    m = config.model
    pipeline = random_pipeline(name, device=device, dtype=getattr(torch, m.dtype), **sizes)
    backbone = family_of(type(pipeline).__name__, name)(
        pipeline, max_sequence_length=m.max_sequence_length, resolution=m.resolution, decode_batch=m.decode_batch
    )
    if m.gradient_checkpointing:
        pipeline.transformer.enable_gradient_checkpointing()
    return backbone


class _Works:
    """The parts of an iteration on one micro-batch of shapes."""

    def __init__(self, config: RunConfig, backbone: PipelineBackbone, roles: Roles) -> None:
        self.config, self.backbone, self.roles = config, backbone, roles
        self.samples = min(config.batch.micro_batch, config.batch.prompts * config.batch.group)
        self.decoded = min(config.model.decode_batch, self.samples)
        self.conditioning = random_conditioning(backbone, self.samples, device="meta")
        self.x_t = torch.empty((self.samples, *backbone.latent_shape), device="meta")
        self.t = torch.empty(self.samples, device="meta")
        self._adapter: tuple[float, float] | None = None

    def training(self, role: str) -> tuple[float, float]:
        """`play` of a role's forward and backward. Adapters all cost the same."""
        spec = next(spec for spec in self.roles.specs if spec.name == role)
        if role == Role.GENERATOR:
            return play(self._train_generator)[0], self._training_adapter()[1]  # its teacher is counted elsewhere
        return play(lambda: self._train(role)) if spec.weights == "full" else self._training_adapter()

    def _training_adapter(self) -> tuple[float, float]:
        """That of the generator alone."""
        self._adapter = self._adapter or play(lambda: self._train(Role.GENERATOR))
        return self._adapter

    def kept_bytes(self) -> int:
        """An iteration's embeddings, each prompt's once, and its trajectories with every point and clean prediction."""
        b = self.config.batch
        a_prompt = sum(_bytes(t) for t in self.conditioning.tensors.values()) // self.samples
        points = 2 * self.config.sampler.steps + 1
        return a_prompt * b.prompts + points * b.prompts * b.group * _bytes(self.x_t[:1])

    @torch.no_grad()
    def sample(self) -> None:
        with self.roles.use(Role.GENERATOR) as velocity:
            velocity(self.x_t, self.t, self.conditioning)

    def _train(self, role: str) -> None:
        with self.roles.use(role) as velocity:
            velocity(self.x_t, self.t, self.conditioning).square().sum().backward()
        self._drop_gradients(role)

    def _train_generator(self) -> None:
        """The teacher, with its guidance, looks at the sample while the generator's activations wait."""
        with self.roles.use(Role.GENERATOR) as velocity:
            v = velocity(self.x_t, self.t, self.conditioning)
            with torch.no_grad(), self.roles.use(Role.TEACHER) as teacher:
                empty = self.conditioning.rows(torch.zeros(1, dtype=torch.int64))
                guided(teacher, empty, self.config.tdm.teacher_guidance)(self.x_t, self.t, self.conditioning)
            v.square().sum().backward()
        self._drop_gradients(Role.GENERATOR)

    def _drop_gradients(self, role: str) -> None:
        for p in self.roles.parameters(role):
            p.grad = None

    @torch.no_grad()
    def decode(self) -> None:
        vae = self.backbone.pipeline.vae
        z = torch.empty((self.decoded, *self.backbone.latent_shape), device="meta", dtype=vae.dtype)
        vae.decode(z, return_dict=False)[0].float()


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


def play(work: Callable[[], None]) -> tuple[float, float]:
    """Bytes alive at the worst moment of ``work``, beyond what was alive before, and its floating point operations."""
    with Meter() as meter, FusedAttention() as attention:
        work()
    return meter.peak, meter.flops + attention.flops


class Meter(TorchDispatchMode):
    """Counts the bytes of storages that are made inside, while they live, and multiplications as PyTorch's own counter
    does; that one, with its hooks on modules, keeps tensors alive."""

    def __init__(self) -> None:
        super().__init__()
        self.alive, self.peak, self.flops = 0, 0, 0.0
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

    It stands in for PyTorch's function itself, since a function mode is off inside a backward, where checkpointing
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
