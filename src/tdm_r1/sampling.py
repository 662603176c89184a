"""Sampling a finished LoRA: what `tdm-r1 sample` does."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from PIL import Image
from rich.console import Console

from . import pictures
from .backbones import PipelineBackbone, load_backbone
from .config import ModelConfig, RunConfig, run_of
from .errors import UserError
from .evaluation import Embedder, Sampling, generate
from .lora_files import adapter_for, load_lora, read_lora, with_strength
from .mini import bundle
from .roles import Role, Roles, lora_roles
from .solvers import Solver
from .trainer import resolve_device, resolve_model

if TYPE_CHECKING:
    from .cli import Sample


class FewStepModel:
    """A pipeline and a LoRA, ready to sample: the library's short way to pictures.

    Args:
        path: 'mini', 'mini_signs', a hub id or a pipeline folder.
        lora: a LoRA folder or hub id, with ``@0.125`` behind it where its publisher loads it at such a strength; a mini
            model's name is its bundled 4-step student; None samples the base itself.
        steps, shift, solver: the few-step grid, and how it is walked: as the LoRA was trained.
        max_sequence_length: T5 tokens (the mini model knows its own).
        t5: whether an SD3 loads T5.
        resolution: side of the pictures in px; the model's own if None.
        dtype: of the weights; ``auto`` is bfloat16 on a GPU, float32 elsewhere.
        offload: keep text encoders and autoencoder in main memory while nobody needs them.
    """

    def __init__(
        self,
        path: str = "mini",
        lora: str | Path | None = "mini",
        *,
        steps: int = 4,
        shift: float = 3.0,
        solver: Solver = "euler",
        max_sequence_length: int = 256,
        t5: bool = True,
        resolution: int | None = None,
        dtype: Literal["auto", "float32", "bfloat16"] = "auto",
        offload: bool = False,
        device: str = "auto",
    ) -> None:
        name, strength = with_strength(str(lora)) if lora else (None, None)
        folder = name and bundle.student_path(name)
        settings = adapter_for([read_lora(folder, strength=strength)] if folder else [])
        model = ModelConfig(path=path, max_sequence_length=max_sequence_length)
        resolved, _, _, length = resolve_model(model)
        place = resolve_device(device)
        if dtype == "auto":
            dtype = "bfloat16" if place.startswith("cuda") and path not in bundle.MODELS else "float32"
        self.backbone: PipelineBackbone = load_backbone(
            resolved,
            max_sequence_length=length,
            dtype=getattr(torch, dtype),
            device=place,
            resolution=resolution,
            decode_batch=4,  # 2 GiB each at 1024 px
            offload=offload,
            t5=t5,
        )
        self.roles: Roles = lora_roles(self.backbone, settings, (Role.GENERATOR,))
        if folder:
            load_lora(self.roles, (Role.GENERATOR,), folder, settings, strength=strength)
        self.sampling = Sampling(Role.GENERATOR, steps, shift, solver)
        self.embed = Embedder(self.backbone)

    def __call__(self, prompts: Sequence[str], *, seed: int = 0) -> np.ndarray:
        """Pictures, uint8 [B, H, W, 3], one a prompt; the same seed and prompts give the same pictures."""
        self.embed.learn(["", *prompts])  # in one go: offloaded text encoders come once
        x_1 = torch.randn((len(prompts), *self.backbone.latent_shape), generator=torch.Generator().manual_seed(seed))
        return generate(self.backbone, self.roles, self.sampling, self.embed, prompts, x_1, batch=16, seed=seed)


def sample_command(command: Sample) -> None:
    """`tdm-r1 sample`."""
    prompts = [p.strip() for p in command.prompt.split("|") if p.strip()]
    if not prompts:
        raise UserError(f"--prompt = {command.prompt!r}: give at least one prompt")
    if command.out.is_dir():
        raise UserError(f"--out = {str(command.out)!r} is a folder: name a PNG in it")
    trained = (run_of(with_strength(command.lora)[0]) if command.lora else None) or RunConfig()
    as_trained = trained.model.model_dump(include={"max_sequence_length", "t5", "resolution"})
    as_trained |= trained.sampler.model_dump(include={"steps", "shift", "solver"})
    asked = {name: getattr(command, name) for name in as_trained if getattr(command, name) is not None}
    path = command.model or (command.lora if command.lora in bundle.MODELS else trained.model.path)
    lora = command.lora or (path if path in bundle.MODELS else None)
    model = FewStepModel(path, lora, **(as_trained | asked), dtype=command.dtype, offload=command.offload)
    images = model([p for p in prompts for _ in range(command.images)], seed=command.seed)
    if len(images) == 1:
        picture = Image.fromarray(images[0])
    else:
        rows = images.reshape(len(prompts), command.images, *images.shape[1:])
        captions = [""] * command.images
        picture = pictures.grid(list(zip(prompts, rows, strict=True)), captions, tile=max(96, images.shape[1]))
    pictures.save_png(picture, command.out)
    Console().print(f"Wrote {command.out}")
