"""The real models at full size, without their weights: for memory arithmetic and benchmarks."""

from __future__ import annotations

import json
from functools import cache
from importlib import resources
from pathlib import Path
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
    """The name of the architecture behind a hub id or in a pipeline's folder, or None."""
    file = Path(path) / "transformer" / "config.json"
    there = json.loads(file.read_text()) if file.is_file() else {}
    for name, known in architectures().items():
        if path in known["hub"] or (there and all(there.get(k) == v for k, v in known["transformer"].items())):
            return name
    return None


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
        for parameter_name, p in transformer.named_parameters():
            if parameter_name.endswith("pad_token"):  # Z-Image's class leaves them as the memory was
                nn.init.normal_(p, std=0.02)
        vae = _cast(diffusers.AutoencoderKL(**architecture["vae"]), dtype)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    absent = dict.fromkeys(n for n in kind.__init__.__annotations__ if n.startswith(("text_encoder", "tokenizer")))
    return kind(transformer=transformer, vae=vae, scheduler=scheduler, **absent)


def text_encoder_parameters(name: str, *, t5: bool = True) -> int:
    """Parameters of the architecture's text encoders together, T5's among them or not."""
    total = 0
    for encoder in architectures()[name]["text_encoders"]:
        if encoder["class"] == "T5EncoderModel" and not t5:
            continue
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
