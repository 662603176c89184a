"""LoRA files in diffusers' format, by folder or hub id, as starts of roles."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from peft import LoraConfig
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from .roles import Role, Roles

FILE = "pytorch_lora_weights.safetensors"  # diffusers' name


def load_lora(
    roles: Roles, targets: tuple[Role, ...], lora: str | Path, config: LoraConfig, *, strength: float | None = None
) -> None:
    """Starts ``targets`` from a LoRA that diffusers wrote (`Backbone.save_lora`).

    A LoRA of lower rank, of another alpha or of fewer modules fits too: its weights are rescaled, what it lacks starts
    from nothing.

    Args:
        lora: a folder, a file or a hub id.
        config: of the roles' adapters.
        strength: the scale at which its publisher loads it (diffusers' ``adapter_weights``); 1 if None.

    Raises ValueError if its rank is higher than that of ``config``, or if it has modules unknown here.
    """
    saved = lora_settings(lora, strength=strength)
    if saved.r > config.r:
        raise ValueError(
            f"the LoRA at {str(lora)!r} has rank {saved.r}, this run's adapters have {config.r}: "
            f"set model.lora.rank to {saved.r} or more"
        )
    scale = (1.0 if strength is None else strength) * (saved.lora_alpha / saved.r) / (config.lora_alpha / config.r)
    with safe_open(lora_file(lora), framework="pt") as file:
        weights = {name.removeprefix("transformer."): file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    for role in targets:
        start = {n: torch.zeros_like(w) if "lora_B" in n else w for n, w in roles.state(role).items()}
        roles.load(role, start | {name: _widened(name, w, scale, start.get(name)) for name, w in weights.items()})


def _widened(name: str, weight: Tensor, scale: float, start: Tensor | None) -> Tensor:
    """One matrix of a LoRA, in the shape of ``start``: A keeps its new rows, B has zeros in its new columns, so that
    B A is ``scale`` times what it was."""
    down = "lora_A" in name
    weight = weight if down else weight * scale
    if start is None or start.shape == weight.shape:
        return weight  # where the module is unknown, `Roles.load` says so
    wide = start.to(weight.dtype) if down else weight.new_zeros(start.shape)
    wide[tuple(slice(n) for n in weight.shape)] = weight
    return wide


def lora_settings(lora: str | Path, *, strength: float | None = None) -> LoraConfig:
    """The adapter settings that a LoRA file carries.

    With a ``strength``, a file without settings is read as diffusers reads it, alpha being its rank. Raises ValueError
    where there are none and no strength is given: alpha would be a guess.
    """
    with safe_open(lora_file(lora), framework="pt") as file:
        metadata = json.loads((file.metadata() or {}).get("lora_adapter_metadata", "{}"))
        shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    prefix = "transformer."
    settings = {k.removeprefix(prefix): v for k, v in metadata.items() if k.startswith(prefix)}
    if not settings and strength is not None:
        down = {n.removeprefix(prefix): s for n, s in shapes.items() if n.endswith(".lora_A.weight")}
        if not down:
            raise ValueError(f"the LoRA at {str(lora)!r} does not use diffusers' names (MODULE.lora_A.weight)")
        rank = max(shape[0] for shape in down.values())
        settings = {"r": rank, "lora_alpha": rank, "target_modules": [n.removesuffix(".lora_A.weight") for n in down]}
    if not settings:
        raise ValueError(
            f"the LoRA at {str(lora)!r} carries no adapter metadata: save it again with its LoraConfig, or give the "
            "strength at which it is meant to be loaded: model.student_lora_scale in training, LORA@0.125 elsewhere"
        )
    return LoraConfig(
        r=settings["r"],
        lora_alpha=settings["lora_alpha"],
        init_lora_weights="gaussian",
        target_modules=settings["target_modules"],
    )


def lora_digest(lora: str | Path) -> str:
    """What tells one LoRA from another: its weights and settings. (The bytes of two equal files differ: safetensors
    writes metadata in no fixed order.)"""
    digest = hashlib.sha256()
    with safe_open(lora_file(lora), framework="pt") as file:
        metadata = json.loads((file.metadata() or {}).get("lora_adapter_metadata", "{}"))
        settings = {k: sorted(v, key=str) if isinstance(v, list) else v for k, v in metadata.items()}
        digest.update(json.dumps(settings, sort_keys=True).encode())
        for name in sorted(file.keys()):
            digest.update(save({name: file.get_tensor(name)}))
    return digest.hexdigest()


def with_strength(text: str) -> tuple[str, float | None]:
    """``folder@0.125`` as ("folder", 0.125); without a number behind the last @ the text itself, and None."""
    name, at, number = text.rpartition("@")
    try:
        return (name, float(number)) if at else (text, None)
    except ValueError:
        return text, None


def lora_file(lora: str | Path) -> Path:
    """The file of a LoRA, fetched from the hub if need be. Raises ValueError if there is none."""
    path = Path(lora)
    if not path.exists() and str(lora).count("/") == 1:
        path = _from_hub(str(lora))
    if path.is_dir():
        found = sorted(path.glob("*.safetensors"))
        path = path / FILE if path / FILE in found or len(found) != 1 else found[0]
    if not path.is_file():
        raise ValueError(f"no LoRA at {str(lora)!r}: give a folder with {FILE}, or a hub id")
    return path


def _from_hub(name: str) -> Path:
    try:
        return Path(snapshot_download(name, allow_patterns="*.safetensors"))
    except (HFValidationError, HfHubHTTPError, OSError) as error:
        raise ValueError(
            f"no LoRA at {name!r}: it is no local folder, and the hub does not give it ({type(error).__name__}); "
            f"download it where it can be reached (`hf download {name}`), and give the folder"
        ) from error
