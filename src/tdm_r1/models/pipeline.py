"""A diffusers pipeline as text encoder, velocity field and decoder. Pipelines are used, not patched."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, Required, TypedDict, Unpack

import diffusers.utils.logging
import numpy as np
import torch
from diffusers import DiffusionPipeline
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError
from peft import LoraConfig
from torch import Tensor, nn

from .protocol import Conditioning, Velocity
from .registry import FAMILIES


class LoadOptions(TypedDict, total=False):
    """How a model is loaded; names as in `settings.ModelConfig`, but for these:

    tiling: of the autoencoder. apart: leave the transformer in main memory: `create.create_roles` will spread it over
    the devices of several processes. beside: a backbone that this one is the teacher of: it gives everything but the
    transformer, which alone is loaded.
    """

    max_sequence_length: Required[int]
    dtype: Required[torch.dtype]
    device: Required[str]
    resolution: int | None
    decode_batch: int
    tiling: bool
    offload: bool
    gradient_checkpointing: bool
    t5: bool
    apart: bool
    beside: PipelineBackbone | None


class PipelineBackbone(ABC):
    """What the families have in common: frozen parts, an autoencoder with scale and shift, and diffusers' LoRA format.

    A family is a sub-class in a file of its own, and an entry in `registry.FAMILIES` (or named from outside).

    Args:
        pipeline: a diffusers pipeline of the class that ``pipeline_class`` names.
        max_sequence_length: tokens that a prompt is cut to.
        resolution: side of the images in px; the model's own if None. Raises ValueError if it does not divide.
        decode_batch: latents that are decoded at once.
        offload_from: the device that text encoders and autoencoder are moved to while they are used; else they are on
            the CPU. None leaves them where they are.
    """

    pipeline_class: ClassVar[str]

    def __init__(
        self,
        pipeline: Any,
        *,
        max_sequence_length: int,
        resolution: int | None = None,
        decode_batch: int = 32,
        offload_from: str | None = None,
    ) -> None:
        self.pipeline = pipeline
        self.offload_from = offload_from
        self.transformer: nn.Module = pipeline.transformer
        self.max_sequence_length = max_sequence_length
        self.decode_batch = decode_batch
        side, step = resolution or self.own_resolution(), 2 * pipeline.vae_scale_factor  # patches of two latents
        if side % step:
            raise ValueError(f"model.resolution = {side}: give a multiple of {step}")
        size = side // pipeline.vae_scale_factor
        self.latent_shape = (pipeline.transformer.config.in_channels, size, size)
        pipeline.vae.to(memory_format=torch.channels_last)  # convolutions are a quarter faster on CPUs
        for module in pipeline.components.values():
            if isinstance(module, nn.Module):
                module.requires_grad_(False).eval()

    # -------------------------------------------------------------------------------------- of a family

    @abstractmethod
    def own_resolution(self) -> int:
        """The side of the model's images in px where no other is set."""

    @abstractmethod
    def encode_one(self, prompt: str) -> Conditioning:
        """One prompt's conditioning, without the unconditional half."""

    @abstractmethod
    def velocity_of(self, transformer: nn.Module) -> Velocity:
        """The velocity field of ``transformer``, which is this backbone's or a copy of it."""

    @classmethod
    def without_t5(cls) -> dict[str, None]:
        """Components to leave out where model.t5 is False. Raises ValueError if the family has no T5."""
        raise ValueError(f"model.t5 = False: a {cls.pipeline_class} has no T5; leave it out")

    # -------------------------------------------------------------------------------------- in common

    @classmethod
    def load(cls, path: str, **options: Unpack[LoadOptions]) -> PipelineBackbone:
        """Loads the pipeline at a hub id or in a local folder."""
        o, beside = options, options.get("beside")
        given: dict[str, Any] = {} if o.get("t5", True) else dict(cls.without_t5())
        if beside is not None:
            given |= {k: v for k, v in beside.pipeline.components.items() if k != "transformer"}
        with _no_loading_bars(), _hub_errors(path):
            pipeline = DiffusionPipeline.from_pretrained(path, dtype=o["dtype"], **given)
        pipeline.set_progress_bar_config(disable=True)
        if o.get("tiling"):
            pipeline.vae.enable_tiling()
        if o.get("gradient_checkpointing"):
            pipeline.transformer.enable_gradient_checkpointing()
        offload = o.get("offload", False)
        for name, part in pipeline.components.items():
            stays = o.get("apart") if name == "transformer" else offload or beside
            if isinstance(part, nn.Module) and not stays:
                part.to(o["device"])
        return cls(
            pipeline,
            max_sequence_length=o["max_sequence_length"],
            resolution=o.get("resolution"),
            decode_batch=o.get("decode_batch", 32),
            offload_from=o["device"] if offload else None,
        )

    @torch.no_grad()  # text encoders are frozen in every role
    def encode(self, prompts: Sequence[str]) -> list[Conditioning]:
        """Each prompt's conditioning, exactly as the pipeline computes it, in main memory.

        Prompts are encoded one at a time: batching changes results slightly in floating point.
        """
        with self._moved_in(*self._text_encoders()):
            return [self.encode_one(prompt).to("cpu") for prompt in prompts]

    @torch.no_grad()  # rewards are black boxes: nothing flows back from an image
    def decode(self, latents: Tensor) -> np.ndarray:
        """Latents [B, C, H, W] to images, uint8 [B, H, W, 3]."""
        vae = self.pipeline.vae
        chunks = []
        with self._moved_in(vae):
            for part in latents.split(self.decode_batch):
                z = (part / vae.config.scaling_factor + (vae.config.shift_factor or 0.0)).to(
                    vae.dtype, memory_format=torch.channels_last
                )
                image = vae.decode(z, return_dict=False)[0]
                image = (image.float() / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)
                chunks.append((image * 255).round().to(torch.uint8).cpu().numpy())  # as VaeImageProcessor does
        return np.concatenate(chunks)

    @contextmanager
    def _moved_in(self, *modules: nn.Module) -> Iterator[None]:
        """Offloaded modules on the device while they are used."""
        if self.offload_from is None:
            yield
            return
        before = [(p, p.data) for module in modules for p in module.parameters()]
        try:
            for module in modules:
                module.to(self.offload_from)
            yield
        finally:
            for p, data in before:  # frozen, so that nothing has to be copied back
                p.data = data
            for module in modules:
                module.to("cpu")  # what is left: buffers

    @property
    def device(self) -> torch.device:
        """Where the transformer is."""
        return next(self.transformer.parameters()).device

    def _text_encoders(self) -> list[nn.Module]:
        parts = self.pipeline.components.items()
        return [m for name, m in parts if name.startswith("text_encoder") and isinstance(m, nn.Module)]

    def save_lora(self, folder: Path, weights: dict[str, Tensor], config: LoraConfig) -> Path:
        """Writes a LoRA that `load_lora_weights` loads at scale 1.0, with its metadata; returns the file."""
        folder.mkdir(parents=True, exist_ok=True)
        self.pipeline.save_lora_weights(
            folder,
            transformer_lora_layers=weights,
            transformer_lora_adapter_metadata=config.to_dict(),
        )
        return folder / "pytorch_lora_weights.safetensors"


def base_dtype(transformer: nn.Module) -> torch.dtype:
    """The precision of the transformer's own weights; adapters on it may have another."""
    return next(p.dtype for name, p in transformer.named_parameters() if "lora_" not in name)


def family_of(pipeline_class: str, path: str) -> type[PipelineBackbone]:
    """The built-in family of a class of pipelines. Raises ValueError if there is none."""
    families = [FAMILIES.load(name) for name in FAMILIES.entries]
    for family in families:
        if family.pipeline_class == pipeline_class:
            return family
    known = ", ".join(family.pipeline_class for family in families)
    raise ValueError(
        f"model.path = {path!r} is a {pipeline_class}: supported are {known}; name a class of yours as model.family"
    )


def _pipeline_class(path: str) -> str:
    """The class of the pipeline at a hub id or in a local folder. Raises OSError where there is none."""
    local = Path(path) / "model_index.json"
    file = local if Path(path).exists() else hf_hub_download(path, local.name)
    return json.loads(Path(file).read_text(encoding="utf-8"))["_class_name"]


def load_backbone(path: str, *, family: str | None = None, **options: Unpack[LoadOptions]) -> PipelineBackbone:
    """Loads a model from a hub id or a local folder.

    Args:
        family: see `settings.ModelConfig`.
        options: see `LoadOptions`.

    Raises ValueError on a pipeline of another kind, and where the hub cannot or will not give it.
    """
    if family is not None:
        kind: type[PipelineBackbone] = FAMILIES.load(family)
    else:
        kind = family_of(pipeline_class(path), path)
    return kind.load(path, **options)


def pipeline_class(path: str) -> str:
    """The class of the pipeline at a hub id or in a local folder. Raises ValueError that says why it cannot be had."""
    with _hub_errors(path):
        return _pipeline_class(path)


@contextmanager
def _hub_errors(path: str) -> Iterator[None]:
    """Says what to do where a model cannot be had."""
    try:
        yield
    except (OSError, HFValidationError) as error:
        if Path(path).exists():
            raise ValueError(
                f"model {path!r} is a folder, but no whole pipeline can be read from it: {error}"
            ) from error
        reasons = (error, error.__cause__)  # diffusers tries its cache first, and raises its own error from the hub's
        if any(isinstance(reason, GatedRepoError) for reason in reasons):
            fix = f"is behind a licence: accept it at https://huggingface.co/{path}, then log in with `hf auth login`"
        elif any(isinstance(reason, RepositoryNotFoundError) for reason in reasons):
            fix = "is neither a local folder nor known to the hub; is it private? Then log in with `hf auth login`"
        else:
            fix = (
                "is no local folder, and the hub cannot be reached: download it where it can "
                f"(`hf download {path}`), and give the folder"
            )
        raise ValueError(f"model {path!r} {fix}") from error


@contextmanager
def quiet() -> Iterator[None]:
    """Diffusers' warnings off for a while."""
    before = diffusers.utils.logging.get_verbosity()
    diffusers.utils.logging.set_verbosity_error()
    try:
        yield
    finally:
        diffusers.utils.logging.set_verbosity(before)


@contextmanager
def _no_loading_bars() -> Iterator[None]:
    """Diffusers' loading bars off for a while."""
    diffusers.utils.logging.disable_progress_bar()
    try:
        yield
    finally:
        diffusers.utils.logging.enable_progress_bar()
