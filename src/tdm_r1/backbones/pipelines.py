"""Backbones: a diffusers pipeline seen as text encoder, velocity field and decoder. Pipelines are used, not patched."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import diffusers.utils.logging
import numpy as np
import torch
from diffusers import DiffusionPipeline, StableDiffusion3Pipeline, ZImagePipeline
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
from peft import LoraConfig
from torch import Tensor, nn

from .. import flow
from .protocol import Conditioning, Velocity


class PipelineBackbone(ABC):
    """What the models have in common: frozen parts, an autoencoder with scale and shift, and diffusers' LoRA format.

    Args:
        pipeline: its transformer carries the roles.
        max_sequence_length: tokens that a prompt is cut to.
        resolution: side of the pictures in px; the model's own if None. Raises ValueError if it does not divide.
        decode_batch: latents that are decoded at once.
        offload_from: the device that text encoders and autoencoder come to for their work alone; they live on the CPU.
            None leaves them where they are.
    """

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

    @abstractmethod
    def own_resolution(self) -> int:
        """The side of the model's pictures in px where nobody asks for another."""

    @torch.no_grad()  # text encoders are frozen in every role
    def encode(self, prompts: Sequence[str]) -> list[Conditioning]:
        """Embeds each prompt by itself, exactly as the pipeline does, without the unconditional half, and puts it into
        main memory. By itself, since in a batch the last bits would depend on the company."""
        with self._at_work(*self._text_encoders()):
            return [self._encode(prompt).to("cpu") for prompt in prompts]

    @abstractmethod
    def _encode(self, prompt: str) -> Conditioning:
        """One prompt's conditioning."""

    @abstractmethod
    def velocity_of(self, transformer: nn.Module) -> Velocity:
        """The velocity field of ``transformer``, which is this backbone's or a copy of it."""

    @torch.no_grad()  # rewards are black boxes: nothing flows back from a picture
    def decode(self, latents: Tensor) -> np.ndarray:
        """Latents [B, C, H, W] to pictures, uint8 [B, H, W, 3]."""
        vae = self.pipeline.vae
        chunks = []
        with self._at_work(vae):
            for part in latents.split(self.decode_batch):
                z = (part / vae.config.scaling_factor + (vae.config.shift_factor or 0.0)).to(
                    vae.dtype, memory_format=torch.channels_last
                )
                image = vae.decode(z, return_dict=False)[0]
                image = (image.float() / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)
                chunks.append((image * 255).round().to(torch.uint8).cpu().numpy())  # as VaeImageProcessor does
        return np.concatenate(chunks)

    @contextmanager
    def _at_work(self, *modules: nn.Module) -> Iterator[None]:
        """Offloaded modules on the device for a while."""
        if self.offload_from is None:
            yield
            return
        at_home = [(p, p.data) for module in modules for p in module.parameters()]
        try:
            for module in modules:
                module.to(self.offload_from)
            yield
        finally:
            for p, data in at_home:  # frozen, so that nothing has to be copied back
                p.data = data
            for module in modules:
                module.to("cpu")  # what is left: buffers

    def _device(self) -> torch.device:
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


class SD3Backbone(PipelineBackbone):
    """Stable Diffusion 3 / 3.5 and the mini models, through `StableDiffusion3Pipeline`."""

    def own_resolution(self) -> int:
        return self.pipeline.transformer.config.sample_size * self.pipeline.vae_scale_factor

    def _encode(self, prompt: str) -> Conditioning:
        quiet = _quiet() if self.max_sequence_length == 1 else nullcontext()  # one T5 token: T5 is not read at all
        with quiet:
            embeds, _, pooled, _ = self.pipeline.encode_prompt(
                prompt=[prompt],
                prompt_2=None,
                prompt_3=None,
                device=self._device(),
                do_classifier_free_guidance=False,
                max_sequence_length=self.max_sequence_length,
            )
        return Conditioning(embeds, pooled)

    def velocity_of(self, transformer: nn.Module) -> Velocity:
        dtype = _base_dtype(transformer)

        def velocity(x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
            assert conditioning.pooled is not None  # `encode` made it
            v = transformer(
                hidden_states=x_t.to(dtype),
                timestep=flow.timestep(t).to(torch.float32),
                encoder_hidden_states=conditioning.embeds.to(dtype),
                pooled_projections=conditioning.pooled.to(dtype),
                return_dict=False,
            )[0]
            return flow.widen(v)

        return velocity


class ZImageBackbone(PipelineBackbone):
    """Z-Image (base, Turbo), through `ZImagePipeline`.

    Its transformer takes lists, counts time from noise to picture and gives the velocity with the other sign. Prompts
    differ in length. Its pipeline's ``guidance_scale`` g is our scale 1 + g.
    """

    def own_resolution(self) -> int:
        return 1024

    def _encode(self, prompt: str) -> Conditioning:
        (found,), _ = self.pipeline.encode_prompt(
            [prompt],
            device=self._device(),
            do_classifier_free_guidance=False,
            max_sequence_length=self.max_sequence_length,
        )
        return Conditioning(found[None], lengths=torch.tensor([len(found)]))

    def velocity_of(self, transformer: nn.Module) -> Velocity:
        dtype = _base_dtype(transformer)

        def velocity(x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
            assert conditioning.lengths is not None  # `encode` made it
            embeds = conditioning.embeds.to(dtype)
            captions = [e[:n] for e, n in zip(embeds, conditioning.lengths.tolist(), strict=True)]
            latents = x_t.to(dtype).unsqueeze(2)  # one frame
            t_from_noise = (1000 - flow.timestep(t).to(torch.float32)) / 1000  # as the pipeline rounds it
            out = transformer(list(latents.unbind(0)), t_from_noise, captions, return_dict=False)[0]
            return -flow.widen(torch.stack(list(out))).squeeze(2)

        return velocity


BACKBONES: dict[type, type[PipelineBackbone]] = {
    StableDiffusion3Pipeline: SD3Backbone,
    ZImagePipeline: ZImageBackbone,
}


def load_backbone(
    path: str,
    *,
    max_sequence_length: int,
    dtype: torch.dtype,
    device: str,
    resolution: int | None = None,
    decode_batch: int = 32,
    tiling: bool = False,
    offload: bool = False,
    gradient_checkpointing: bool = False,
    t5: bool = True,
    beside: PipelineBackbone | None = None,
) -> PipelineBackbone:
    """Loads a pipeline from a hub id or a local folder.

    Args:
        tiling, offload, gradient_checkpointing, t5: see `config.ModelConfig`.
        beside: a backbone that this one is used with, as its teacher: it gives everything but the transformer, which
            alone is loaded.

    Raises ValueError on a pipeline of another kind, and where the hub cannot or will not give it.
    """
    given = {} if beside is None else {k: v for k, v in beside.pipeline.components.items() if k != "transformer"}
    if not t5:
        given |= {"text_encoder_3": None, "tokenizer_3": None}
    with _no_loading_bars(), _told_by_the_hub(path):
        pipeline = DiffusionPipeline.from_pretrained(path, dtype=dtype, **given)
    if type(pipeline) not in BACKBONES:
        known = ", ".join(kind.__name__ for kind in BACKBONES)
        raise ValueError(f"model.path = {path!r} is a {type(pipeline).__name__}: supported are {known}")
    if not t5 and not isinstance(pipeline, StableDiffusion3Pipeline):
        raise ValueError(f"model.t5 = False: {path!r} is a {type(pipeline).__name__}, which has no T5; leave it out")
    pipeline.set_progress_bar_config(disable=True)
    if tiling:
        pipeline.vae.enable_tiling()
    if gradient_checkpointing:
        pipeline.transformer.enable_gradient_checkpointing()
    (pipeline.transformer if offload or beside else pipeline).to(device)
    return BACKBONES[type(pipeline)](
        pipeline,
        max_sequence_length=max_sequence_length,
        resolution=resolution,
        decode_batch=decode_batch,
        offload_from=device if offload else None,
    )


@contextmanager
def _told_by_the_hub(path: str) -> Iterator[None]:
    """Says what to do where a model cannot be had."""
    try:
        yield
    except OSError as error:
        if Path(path).exists():
            raise
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


def _base_dtype(transformer: nn.Module) -> torch.dtype:
    """The precision of the transformer's own weights; adapters on it may have another."""
    return next(p.dtype for name, p in transformer.named_parameters() if "lora_" not in name)


@contextmanager
def _quiet() -> Iterator[None]:
    """Diffusers' warnings off for a while; that a prompt was cut to the length that was asked for is no news."""
    before = diffusers.utils.logging.get_verbosity()
    diffusers.utils.logging.set_verbosity_error()
    try:
        yield
    finally:
        diffusers.utils.logging.set_verbosity(before)


@contextmanager
def _no_loading_bars() -> Iterator[None]:
    """Diffusers' loading bars off for a while; a small model loads before anybody could read them."""
    diffusers.utils.logging.disable_progress_bar()
    try:
        yield
    finally:
        diffusers.utils.logging.enable_progress_bar()
