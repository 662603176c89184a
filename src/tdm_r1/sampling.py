"""Sampling a finished LoRA: what `tdm-r1 sample` does."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from peft import LoraConfig
from PIL import Image
from rich.console import Console

from . import pictures
from .backbones import PipelineBackbone, load_backbone
from .config import ModelConfig
from .errors import UserError
from .evaluation import Embedder, Sampling, generate
from .lora_files import load_lora, lora_settings
from .mini import bundle
from .roles import Role, Roles, lora_roles
from .trainer import resolve_device, resolve_model

if TYPE_CHECKING:
    from .cli import Sample


class FewStepModel:
    """A pipeline and a LoRA, ready to sample: the library's short way to pictures.

    Args:
        path: 'mini', 'mini_signs', a hub id or a pipeline folder.
        lora: a LoRA folder; a mini model's name is its bundled 4-step student; None samples the base itself.
        steps, shift: the few-step grid.
        max_sequence_length: T5 tokens (the mini model knows its own).
    """

    def __init__(
        self,
        path: str = "mini",
        lora: str | Path | None = "mini",
        *,
        steps: int = 4,
        shift: float = 3.0,
        max_sequence_length: int = 256,
        device: str = "auto",
    ) -> None:
        folder = lora and bundle.student_path(str(lora))
        settings = lora_settings(folder) if folder else LoraConfig(r=1, target_modules=["to_q"])
        model = ModelConfig(path=path, max_sequence_length=max_sequence_length)
        resolved, _, _, length = resolve_model(model)
        self.backbone: PipelineBackbone = load_backbone(
            resolved, max_sequence_length=length, dtype=torch.float32, device=resolve_device(device)
        )
        self.roles: Roles = lora_roles(self.backbone, settings, (Role.GENERATOR,))
        if folder:
            load_lora(self.roles, (Role.GENERATOR,), folder, settings)
        self.sampling = Sampling(Role.GENERATOR, steps, shift)
        self.embed = Embedder(self.backbone)

    def __call__(self, prompts: Sequence[str], *, seed: int = 0) -> np.ndarray:
        """Pictures, uint8 [B, H, W, 3], one a prompt; the same seed and prompts give the same pictures."""
        x_1 = torch.randn((len(prompts), *self.backbone.latent_shape), generator=torch.Generator().manual_seed(seed))
        return generate(self.backbone, self.roles, self.sampling, self.embed, prompts, x_1, batch=16)


def sample_command(command: Sample) -> None:
    """`tdm-r1 sample`."""
    lora = command.lora or (command.model if command.model in bundle.MODELS else None)
    model = FewStepModel(
        command.model, lora, steps=command.steps, shift=command.shift, max_sequence_length=command.max_sequence_length
    )
    prompts = [p.strip() for p in command.prompt.split("|") if p.strip()]
    if not prompts:
        raise UserError(f"--prompt = {command.prompt!r}: give at least one prompt")
    images = model([p for p in prompts for _ in range(command.images)], seed=command.seed)
    if len(images) == 1:
        picture = Image.fromarray(images[0])
    else:
        rows = images.reshape(len(prompts), command.images, *images.shape[1:])
        captions = [""] * command.images
        picture = pictures.grid(list(zip(prompts, rows, strict=True)), captions, tile=max(96, images.shape[1]))
    pictures.save_png(picture, command.out)
    Console().print(f"Wrote {command.out}")
