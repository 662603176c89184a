"""Backbones: a diffusers pipeline seen as text encoder, velocity field and decoder. Pipelines are used, not patched."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import diffusers.utils.logging
import numpy as np
import torch
from diffusers import DiffusionPipeline, StableDiffusion3Pipeline
from peft import LoraConfig
from torch import Tensor, nn

from . import flow


@dataclass(frozen=True)
class Conditioning:
    """What the transformer reads of the prompts: ``embeds`` [B, L, D] and ``pooled`` [B, P]."""

    embeds: Tensor
    pooled: Tensor

    def __len__(self) -> int:
        return len(self.embeds)

    def rows(self, index: Tensor) -> Conditioning:
        """The conditioning of the prompts at ``index`` [N] (int64), repeats allowed."""
        return Conditioning(self.embeds[index], self.pooled[index])

    def repeat(self, n: int) -> Conditioning:
        """Each prompt ``n`` times in a row."""
        return Conditioning(self.embeds.repeat_interleave(n, 0), self.pooled.repeat_interleave(n, 0))

    def expand(self, n: int) -> Conditioning:
        """A single prompt's conditioning for ``n`` samples, without copying."""
        return Conditioning(self.embeds.expand(n, -1, -1), self.pooled.expand(n, -1))


Velocity = Callable[[Tensor, Tensor, Conditioning], Tensor]
"""``velocity(x_t, t, conditioning)``: x_t [B, C, H, W], t [B] in [0, 1]; returns v, float32 [B, C, H, W]."""


class Backbone(Protocol):
    """What the algorithms need of a text-to-image flow model."""

    transformer: nn.Module
    latent_shape: tuple[int, int, int]

    def encode(self, prompts: Sequence[str]) -> Conditioning: ...

    def velocity_of(self, transformer: nn.Module) -> Velocity: ...

    def decode(self, latents: Tensor) -> np.ndarray: ...

    def save_lora(self, folder: Path, weights: dict[str, Tensor], config: LoraConfig) -> Path: ...


class SD3Backbone:
    """Stable Diffusion 3 / 3.5 and the bundled mini model, through `StableDiffusion3Pipeline`."""

    def __init__(self, pipeline: StableDiffusion3Pipeline, *, max_sequence_length: int, decode_batch: int = 32) -> None:
        self.pipeline = pipeline
        self.transformer: nn.Module = pipeline.transformer
        self.max_sequence_length = max_sequence_length
        self.decode_batch = decode_batch
        size = pipeline.transformer.config.sample_size
        self.latent_shape = (pipeline.transformer.config.in_channels, size, size)
        pipeline.vae.to(memory_format=torch.channels_last)  # convolutions are a quarter faster on CPUs
        for name in ("transformer", "vae", "text_encoder", "text_encoder_2", "text_encoder_3"):
            module = getattr(pipeline, name, None)
            if module is not None:
                module.requires_grad_(False).eval()

    @torch.no_grad()  # text encoders are frozen in every role
    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """Embeds prompts exactly as the pipeline does, without the unconditional half."""
        with _quiet() if self.max_sequence_length == 1 else nullcontext():  # one T5 token: T5 is not read at all
            embeds, _, pooled, _ = self.pipeline.encode_prompt(
                prompt=list(prompts),
                prompt_2=None,
                prompt_3=None,
                do_classifier_free_guidance=False,
                max_sequence_length=self.max_sequence_length,
            )
        return Conditioning(embeds, pooled)

    def velocity_of(self, transformer: nn.Module) -> Velocity:
        """The velocity field of ``transformer``, which is this backbone's or a copy of it."""

        def velocity(x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
            dtype = conditioning.embeds.dtype
            v = transformer(
                hidden_states=x_t.to(dtype),
                timestep=flow.timestep(t).to(torch.float32),
                encoder_hidden_states=conditioning.embeds,
                pooled_projections=conditioning.pooled,
                return_dict=False,
            )[0]
            return flow.widen(v)

        return velocity

    @torch.no_grad()  # rewards are black boxes: nothing flows back from a picture
    def decode(self, latents: Tensor) -> np.ndarray:
        """Latents [B, C, H, W] to pictures, uint8 [B, H, W, 3]."""
        vae = self.pipeline.vae
        chunks = []
        for part in latents.split(self.decode_batch):
            z = (part / vae.config.scaling_factor + (vae.config.shift_factor or 0.0)).to(
                vae.dtype, memory_format=torch.channels_last
            )
            image = vae.decode(z, return_dict=False)[0]
            image = (image.float() / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)
            chunks.append((image.cpu().numpy() * 255).round().astype(np.uint8))  # as VaeImageProcessor does
        return np.concatenate(chunks)

    def save_lora(self, folder: Path, weights: dict[str, Tensor], config: LoraConfig) -> Path:
        """Writes a LoRA that `load_lora_weights` loads at scale 1.0, with its metadata; returns the file."""
        folder.mkdir(parents=True, exist_ok=True)
        self.pipeline.save_lora_weights(
            folder,
            transformer_lora_layers=weights,
            transformer_lora_adapter_metadata=config.to_dict(),
        )
        return folder / "pytorch_lora_weights.safetensors"


def guided(velocity: Velocity, empty: Conditioning, scale: float) -> Velocity:
    """Classifier-free guidance, v_u + scale (v_c - v_u), both halves in one batch; scale 1 means none.

    ``empty`` is the conditioning of the one unconditional prompt (arXiv 2207.12598; 1 + w there is ``scale``).
    """
    if scale == 1:
        return velocity

    def combined(x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        u = empty.expand(len(x_t))
        both = Conditioning(torch.cat([u.embeds, conditioning.embeds]), torch.cat([u.pooled, conditioning.pooled]))
        v_u, v_c = velocity(torch.cat([x_t, x_t]), torch.cat([t, t]), both).chunk(2)
        return v_u + scale * (v_c - v_u)

    return combined


def load_backbone(path: str, *, max_sequence_length: int, dtype: torch.dtype, device: str) -> SD3Backbone:
    """Loads a pipeline from a hub id or a local folder."""
    with _no_loading_bars():
        pipeline = DiffusionPipeline.from_pretrained(path, dtype=dtype)
    if not isinstance(pipeline, StableDiffusion3Pipeline):
        raise ValueError(f"model.path = {path!r} is a {type(pipeline).__name__}: supported is StableDiffusion3Pipeline")
    pipeline.set_progress_bar_config(disable=True)
    return SD3Backbone(pipeline.to(device), max_sequence_length=max_sequence_length)


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
