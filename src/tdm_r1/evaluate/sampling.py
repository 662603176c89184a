"""Sampling a finished LoRA from Python: `FewStepModel`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from ..core.solvers import Solver
from ..models.create import create_roles
from ..models.embedder import Embedder
from ..models.load import resolve_device, resolve_model
from ..models.lora_files import adapter_for, load_lora, read_lora
from ..models.pipeline import PipelineBackbone, load_backbone
from ..models.registry import BUNDLED, lora_path, with_strength
from ..models.roles import Roles
from ..models.settings import ModelConfig
from ..models.specification import Role, RoleSpec
from .evaluation import Sampling, generate


class FewStepModel:
    """A pipeline and a LoRA, ready to sample: the library's short way to images.

    Args:
        path: 'mini', 'mini_signs', a hub id or a pipeline folder.
        family: see `models.settings.ModelConfig`; by the pipeline's class if None.
        lora: a LoRA folder or hub id, with ``@0.125`` behind it where its publisher loads it at such a strength; a mini
            model's name is its bundled 4-step student; None samples the base itself.
        steps, shift, solver, guidance: the grid, how it is walked, and the guidance scale: as the LoRA was trained.
        max_sequence_length: T5 tokens (a mini model uses its own).
        t5: whether an SD3 loads T5.
        resolution: side of the images in px; the model's own if None.
        dtype: of the weights; ``auto`` is bfloat16 on a GPU, float32 elsewhere.
        offload: keep text encoders and autoencoder in main memory while they are not used.
    """

    def __init__(
        self,
        path: str = "mini",
        lora: str | Path | None = "mini",
        *,
        steps: int = 4,
        shift: float = 3.0,
        solver: Solver = "euler",
        guidance: float = 1.0,
        family: str | None = None,
        max_sequence_length: int = 256,
        t5: bool = True,
        resolution: int | None = None,
        dtype: Literal["auto", "float32", "bfloat16"] = "auto",
        offload: bool = False,
        device: str = "auto",
    ) -> None:
        name, strength = with_strength(str(lora)) if lora else (None, None)
        folder = name and lora_path(name)
        settings = adapter_for([read_lora(folder, strength=strength)] if folder else [])
        model = resolve_model(ModelConfig(path=path, max_sequence_length=max_sequence_length))
        place = resolve_device(device)
        if dtype == "auto":
            dtype = "bfloat16" if place.startswith("cuda") and path not in BUNDLED.entries else "float32"
        self.backbone: PipelineBackbone = load_backbone(
            model.path,
            family=family,
            max_sequence_length=model.max_sequence_length,
            dtype=getattr(torch, dtype),
            device=place,
            resolution=resolution,
            decode_batch=4,  # 2 GiB each at 1024 px
            offload=offload,
            t5=t5,
        )
        self.roles: Roles = create_roles([RoleSpec(Role.GENERATOR)], self.backbone, settings)
        if folder:
            load_lora(self.roles, (Role.GENERATOR,), folder, settings, strength=strength)
        self.sampling = Sampling(Role.GENERATOR, steps, shift, solver, guidance)
        self.embed = Embedder(self.backbone)

    def __call__(self, prompts: Sequence[str], *, seed: int = 0) -> np.ndarray:
        """Images, uint8 [B, H, W, 3], one a prompt; the same seed and prompts give the same images."""
        self.embed.learn(["", *prompts])  # in one go: offloaded text encoders come once
        x_1 = torch.randn((len(prompts), *self.backbone.latent_shape), generator=torch.Generator().manual_seed(seed))
        return generate(self.backbone, self.roles, self.sampling, self.embed, prompts, x_1, batch=16, seed=seed)
