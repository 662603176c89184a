"""The real models at full size, without their weights: for memory arithmetic and benchmarks."""

from __future__ import annotations

from functools import cache
from importlib import resources
from typing import Any

import diffusers
import torch
import transformers
import yaml
from torch import nn


@cache
def architectures() -> dict[str, dict[str, Any]]:
    """Every known architecture by name, as `architectures.yaml` has it."""
    return yaml.safe_load((resources.files(__package__) / "architectures.yaml").read_text())


def architecture_of(path: str) -> str | None:
    """The name of the architecture behind a hub id, or None."""
    return next((name for name, a in architectures().items() if path in a["hub"]), None)


def random_pipeline(name: str, *, device: str, dtype: torch.dtype, **sizes: Any) -> Any:
    """A pipeline of the architecture's classes with random weights and no text encoders.

    Args:
        device: "meta" gives shapes alone.
        sizes: settings of the transformer in place of the architecture's own, for tests.
    """
    architecture = architectures()[name]
    kind = getattr(diffusers, architecture["pipeline"])
    transformer_kind = {
        diffusers.StableDiffusion3Pipeline: diffusers.SD3Transformer2DModel,
        diffusers.ZImagePipeline: diffusers.ZImageTransformer2DModel,
    }[kind]
    with torch.device(device):
        transformer = _cast(transformer_kind(**architecture["transformer"] | sizes), dtype)
        vae = _cast(diffusers.AutoencoderKL(**architecture["vae"]), dtype)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    absent = dict.fromkeys(n for n in kind.__init__.__annotations__ if n.startswith(("text_encoder", "tokenizer")))
    return kind(transformer=transformer, vae=vae, scheduler=scheduler, **absent)


def text_encoder_parameters(name: str) -> int:
    """Parameters of the architecture's text encoders together."""
    total = 0
    for encoder in architectures()[name]["text_encoders"]:
        kind = getattr(transformers, encoder["class"])
        with torch.device("meta"):
            model = kind(kind.config_class(**encoder["config"]))
        total += sum(p.numel() for p in model.parameters())
    return total


def _cast(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Every parameter in ``dtype``; diffusers' own `to` warns of that, whatever the model."""
    for p in module.parameters():
        p.data = p.data.to(dtype)
    for b in module.buffers():
        b.data = b.data.to(dtype)
    return module
