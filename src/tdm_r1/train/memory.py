"""What the settings leave to the memory of the device that a run finds."""

from __future__ import annotations

import torch
from rich.console import Console

from ..config.run import RunConfig
from ..core import processes
from ..models.load import resolve_device
from .estimate import with_checkpointing_decided


def fitted(config: RunConfig, console: Console) -> RunConfig:
    """The settings with `model.gradient_checkpointing` decided, where it is auto: all processes decide alike.

    On a CPU activations are kept. On a GPU the estimate is held against what is free on the fullest one.
    """
    if config.model.gradient_checkpointing != "auto":
        return config
    device = resolve_device(config.model.device)
    if not device.startswith("cuda"):
        return config.override({"model.gradient_checkpointing": False})
    room = min(processes.gather_each(torch.cuda.mem_get_info(device)[0]))
    decided = with_checkpointing_decided(config, room, gpus=processes.count())
    word = "on" if decided.model.gradient_checkpointing else "off: the activations fit"
    console.print(f"Gradient checkpointing is {word} ({room / 2**30:.0f} GiB are free)", markup=False)
    return decided
