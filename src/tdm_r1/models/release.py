"""The authors' released checkpoints as LoRAs that plain diffusers loads.

There are two: TDM-R1 for Z-Image-Turbo (`tdmr1_zimage_ema.ckpt`) and TDM for Stable Diffusion 3.5 Medium
(`tdm_sd3-5_lora.ckpt`). Each is a pickled dict whose ``ema_parameters`` is a list of tensors without names; a bare list
is taken too. Rank, alpha and targets are the published ones (github.com/Luo-Yihong/TDM-R1). Nothing but tensors is
unpickled, and names are given only if the number and the shapes of the tensors fit one of the two models.

This has been run on files of that form made here, not on the real ones. It assumes that the list follows the order of
the transformer's parameters, and that the released models have the published sizes. Shapes alone cannot show another
order: compare pictures of the converted LoRA with the authors' before relying on it.
"""

from __future__ import annotations

import pickle
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline, ZImagePipeline, ZImageTransformer2DModel
from peft import LoraConfig
from torch import Tensor

from ..files import whole_file
from .architectures import architectures
from .lora_files import FILE

RANK, ALPHA = 32, 64  # published, of both
Sizes = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Release:
    """What a released list of tensors belongs to; ``architecture`` is a name in architectures.yaml."""

    name: str
    architecture: str
    pipeline: Any
    transformer: Any
    targets: tuple[str, ...]

    def adapter_shapes(self, sizes: Sizes | None = None) -> dict[str, torch.Size]:
        """Names and shapes of the adapter's weights in the order of the transformer's parameters.

        Args:
            sizes: settings of a transformer by architecture, in place of the published ones.
        """
        config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=list(self.targets))
        own = (sizes or {}).get(self.architecture) or architectures()[self.architecture]["transformer"]
        with torch.device("meta"):
            transformer = self.transformer(**own)
            transformer.add_adapter(config, adapter_name="default")
        return {
            name.replace(".default.", "."): p.shape for name, p in transformer.named_parameters() if ".default." in name
        }


Z_IMAGE = Release(
    "TDM-R1 for Z-Image",
    "z_image",
    ZImagePipeline,
    ZImageTransformer2DModel,
    ("to_q", "to_k", "to_v", "to_out.0", "add_k_proj", "add_v_proj"),  # the model has the first four
)
SD35_MEDIUM = Release(
    "TDM for SD3.5-Medium",
    "sd35_medium",
    StableDiffusion3Pipeline,
    SD3Transformer2DModel,
    tuple(  # `attn` alone: the second attention of the dual layers, `attn2`, has none
        f"attn.{name}"
        for name in ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
    ),
)
RELEASES = (Z_IMAGE, SD35_MEDIUM)


def convert_release(checkpoint: Path, out: Path, *, sizes: Sizes | None = None) -> Path:
    """Writes the LoRA into the folder ``out`` and returns it. Needs neither weights nor a hub.

    Args:
        checkpoint: the authors' file.
        sizes: see `Release.adapter_shapes`; for tests.

    Raises ValueError if the file holds anything but a list of tensors that fits one of the released models.
    """
    tensors = _tensors(checkpoint)
    found = {release.name: release.adapter_shapes(sizes) for release in RELEASES}
    release = next((r for r in RELEASES if [*found[r.name].values()] == [t.shape for t in tensors]), None)
    if release is None:
        raise ValueError(f"{checkpoint} is refused: {_difference(tensors, found)}")
    config = LoraConfig(r=RANK, lora_alpha=RANK, init_lora_weights="gaussian", target_modules=list(release.targets))
    weights = {
        # the scale is in the weights, so that programs that do not read alpha apply it too
        name: (tensor.detach().float() * (ALPHA / RANK if "lora_B" in name else 1.0)).contiguous()
        for name, tensor in zip(found[release.name], tensors, strict=True)
    }
    with TemporaryDirectory() as made, whole_file(out / FILE) as partial:  # other files in ``out`` stay
        release.pipeline.save_lora_weights(
            made, transformer_lora_layers=weights, transformer_lora_adapter_metadata=config.to_dict()
        )
        shutil.copyfile(Path(made) / FILE, partial)
    return out


def _tensors(checkpoint: Path) -> list[Tensor]:
    if not checkpoint.is_file():
        raise ValueError(f"no such file: {checkpoint}")
    try:
        found = torch.load(checkpoint, map_location="cpu", weights_only=True)  # tensors and plain containers alone
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(f"{checkpoint} is refused: it is no pickle of tensors alone ({error})") from error
    if isinstance(found, dict) and "ema_parameters" not in found:
        raise ValueError(
            f"{checkpoint} is refused: it is a dict of {', '.join(map(str, list(found)[:5])) or 'nothing'}; expected "
            "'ema_parameters', a list of tensors"
        )
    found = found["ema_parameters"] if isinstance(found, dict) else found
    if not isinstance(found, list) or not found or not all(isinstance(t, Tensor) for t in found):
        raise ValueError(f"{checkpoint} is refused: it holds a {type(found).__name__}, expected a list of tensors")
    return found


def _difference(tensors: list[Tensor], found: Mapping[str, Mapping[str, torch.Size]]) -> str:
    """Why a list fits no release: the first shape that differs, or its length."""
    for name, shapes in found.items():
        if len(shapes) == len(tensors):
            for i, (tensor, (module, shape)) in enumerate(zip(tensors, shapes.items(), strict=True)):
                if tensor.shape != shape:
                    return f"for {name}, tensor {i} is {tuple(tensor.shape)}, {module} is {tuple(shape)}"
    known = ", ".join(f"{name} has {len(shapes)}" for name, shapes in found.items())
    return f"it holds {len(tensors)} tensors; {known}"
