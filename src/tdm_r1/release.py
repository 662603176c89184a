"""The authors' released Z-Image checkpoint (`tdmr1_zimage_ema.ckpt`) as a LoRA that plain diffusers loads.

The file is a pickled list of tensors without names. Rank, alpha and targets are the published ones
(github.com/Luo-Yihong/TDM-R1). Nothing but tensors is unpickled, and names are given only if count and shapes fit.

This has not been run on the real file. Two things are taken for granted: that the list follows the transformer's own
order of parameters, and that the released model has diffusers' default sizes. All projections have one size, so shapes
would not show another order: compare pictures of the converted LoRA with the authors' before relying on it.
"""

from __future__ import annotations

import pickle
from dataclasses import replace
from pathlib import Path

import torch
from diffusers import ZImagePipeline, ZImageTransformer2DModel
from peft import LoraConfig
from torch import Tensor

TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "add_k_proj", "add_v_proj")  # published; Z-Image has the first four
RANK, ALPHA = 32, 64  # published


def convert_release(checkpoint: Path, out: Path, *, architecture: Path | None = None) -> Path:
    """Writes the LoRA into the folder ``out`` and returns it. Needs neither weights nor a hub.

    Args:
        checkpoint: the authors' file.
        architecture: a folder with the `config.json` of a Z-Image transformer; the released model's sizes, which are
            diffusers' defaults, if None.

    Raises ValueError if the file holds anything but the list of tensors that fits.
    """
    tensors = _tensors(checkpoint)
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, init_lora_weights="gaussian", target_modules=list(TARGETS))
    shapes = _adapter_shapes(config, architecture)
    if len(tensors) != len(shapes):
        raise ValueError(
            f"{checkpoint} holds {len(tensors)} tensors, the adapter of this architecture has {len(shapes)}: is it "
            "the checkpoint of another model?"
        )
    weights: dict[str, Tensor] = {}
    for i, (tensor, (name, shape)) in enumerate(zip(tensors, shapes.items(), strict=True)):
        if tensor.shape != shape:
            raise ValueError(f"{checkpoint}: tensor {i} is {tuple(tensor.shape)}, {name} is {tuple(shape)}")
        scale = ALPHA / RANK if "lora_B" in name else 1.0  # in the weights, so that no program has to know of it
        weights[name] = (tensor.detach().float() * scale).contiguous()
    config = replace(config, lora_alpha=RANK)
    out.mkdir(parents=True, exist_ok=True)
    ZImagePipeline.save_lora_weights(
        out, transformer_lora_layers=weights, transformer_lora_adapter_metadata=config.to_dict()
    )
    return out


def _tensors(checkpoint: Path) -> list[Tensor]:
    if not checkpoint.is_file():
        raise ValueError(f"no such file: {checkpoint}")
    try:
        found = torch.load(checkpoint, map_location="cpu", weights_only=True)  # tensors and plain containers alone
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(f"{checkpoint} is refused: it is no pickle of tensors alone ({error})") from error
    if not isinstance(found, list) or not found or not all(isinstance(t, Tensor) for t in found):
        raise ValueError(f"{checkpoint} is refused: it holds a {type(found).__name__}, expected a list of tensors")
    return found


def _adapter_shapes(config: LoraConfig, architecture: Path | None) -> dict[str, torch.Size]:
    """Names and shapes of the adapter's weights in the order of the transformer's parameters."""
    with torch.device("meta"):
        transformer = (
            ZImageTransformer2DModel.from_config(ZImageTransformer2DModel.load_config(architecture))
            if architecture
            else ZImageTransformer2DModel()
        )
        transformer.add_adapter(config, adapter_name="default")
    return {
        name.replace(".default.", "."): p.shape for name, p in transformer.named_parameters() if ".default." in name
    }
