"""What the settings leave to the memory of the device that a run finds."""

from __future__ import annotations

import gc

import torch
from rich.console import Console

from ..config.run import RunConfig
from ..models.load import resolve_device
from ..models.registry import bundled
from .estimate import estimate, with_checkpointing_decided


def fitted(config: RunConfig, console: Console) -> RunConfig:
    """The settings with `model.gradient_checkpointing` decided, where it is auto.

    On a CPU, and of the bundled models, activations are kept. On a GPU the estimate is held against what is free there;
    processes that spread their transformers have to do alike, and compute them again.
    """
    if config.model.gradient_checkpointing != "auto":
        return config
    device = resolve_device(config.model.device)
    if not device.startswith("cuda") or bundled(config.model.path) is not None:
        return config.override({"model.gradient_checkpointing": False})
    if config.model.shard:
        return config.override({"model.gradient_checkpointing": True})
    room = free_memory(device)
    decided = with_checkpointing_decided(config, room)
    if not decided.model.gradient_checkpointing:
        text = "off: the activations fit"
    elif estimate(decided) is None:
        text = "on: what this model needs is not known (set model.gradient_checkpointing to false to keep activations)"
    else:
        text = "on: the activations would not fit"
    console.print(f"Gradient checkpointing is {text}; {room / 2**30:.0f} GiB are free.", markup=False)
    return decided


def free_memory(device: str) -> int:
    """Bytes of a GPU that nobody holds, after what PyTorch keeps of earlier work is given back."""
    gc.collect()
    torch.cuda.empty_cache()
    return int(torch.cuda.mem_get_info(device)[0])
