"""LoRA files in diffusers' format, by folder or hub id, as starts of roles."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from peft import LoraConfig
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from .roles import Roles

FILE = "pytorch_lora_weights.safetensors"  # diffusers' name
PEFT_FILE = "adapter_model.safetensors"
_DOWN, _UP = ".lora_A.weight", ".lora_B.weight"
# peft's settings that say how a LoRA is computed and are read here
READ = {"r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "target_modules"}
# those that concern training, loading or which modules were chosen: the file's names say which
NOT_COMPUTED = {
    *("auto_mapping", "base_model_name_or_path", "ensure_weight_tying", "exclude_modules", "inference_mode"),
    *("init_lora_weights", "layers_pattern", "layers_to_transform", "lora_dropout", "megatron_core", "peft_version"),
    *("qalora_group_size", "revision", "runtime_config", "task_type"),
}
CHANGE_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")  # starts after which the base is another


@dataclass(frozen=True)
class LoraFile:
    """A LoRA as it lies in a file: matrices by name (``MODULE.lora_A.weight``), and the settings that scale them."""

    weights: dict[str, Tensor]
    config: LoraConfig

    @property
    def modules(self) -> list[str]:
        return [n.removesuffix(_DOWN) for n in self.weights if n.endswith(_DOWN)]

    @property
    def rank(self) -> int:
        """The largest rank of a module."""
        return max(self.weights[m + _DOWN].shape[0] for m in self.modules)

    def scale(self, module: str) -> float:
        """What peft multiplies B A of a module with: alpha / r, or alpha / sqrt(r) where the file says rsLoRA."""
        c, r = self.config, self.weights[module + _DOWN].shape[0]
        alpha = c.alpha_pattern.get(get_pattern_key(list(c.alpha_pattern), module), c.lora_alpha)
        return alpha / math.sqrt(r) if c.use_rslora else alpha / r


def adapter_for(loras: Sequence[LoraFile]) -> LoraConfig:
    """Settings of an adapter that can hold each of ``loras`` at its full strength; a small one that stays zero for
    none."""
    rank = max([1, *(lora.rank for lora in loras)])
    modules = sorted({module for lora in loras for module in lora.modules}) or ["to_q"]
    return LoraConfig(r=rank, lora_alpha=rank, init_lora_weights="gaussian", target_modules=modules)


def load_lora(
    roles: Roles, targets: Sequence[str], lora: str | Path, config: LoraConfig, *, strength: float | None = None
) -> None:
    """Starts ``targets`` from a LoRA of diffusers (`Backbone.save_lora`) or peft.

    A LoRA of lower rank, of another alpha or of fewer modules fits too: its weights are rescaled, what it lacks starts
    at zero.

    Args:
        lora: a folder, a file or a hub id.
        config: of the roles' adapters.
        strength: the scale at which its publisher loads it (diffusers' ``adapter_weights``); 1 if None.

    Raises ValueError as `read_lora` does, if its rank is higher than that of ``config``, or if it has modules unknown
    or of another width here.
    """
    saved = read_lora(lora, strength=strength)
    if saved.rank > config.r:
        raise ValueError(
            f"model.lora.rank = {config.r}: the LoRA at {str(lora)!r} has rank {saved.rank}; set model.lora.rank to "
            f"{saved.rank} or more"
        )
    own = (1.0 if strength is None else strength) / (config.lora_alpha / config.r)
    scales = {m: own * saved.scale(m) for m in saved.modules}
    for role in targets:
        start = {n: torch.zeros_like(w) if n.endswith(_UP) else w for n, w in roles.state(role).items()}
        _require_widths(saved, start, lora)
        found = {
            name: _widened(name, w, scales[_module_of(name)], start.get(name)) for name, w in saved.weights.items()
        }
        roles.load(role, start | found)


def _require_widths(saved: LoraFile, start: Mapping[str, Tensor], lora: str | Path) -> None:
    """Raises ValueError unless the matrices have those of ``start`` but for the rank."""
    for name, weight in saved.weights.items():
        side = 1 if name.endswith(_DOWN) else 0
        if name in start and weight.shape[side] != start[name].shape[side]:
            raise ValueError(
                f"the LoRA at {str(lora)!r} is of another model: {name} has width {weight.shape[side]}, here it is "
                f"{start[name].shape[side]}"
            )


def _widened(name: str, weight: Tensor, scale: float, start: Tensor | None) -> Tensor:
    """One matrix of a LoRA, in the shape of ``start``: A keeps its new rows, B has zeros in its new columns, so that
    B A is ``scale`` times what it was."""
    down = name.endswith(_DOWN)
    weight = weight if down else weight * scale
    if start is None or start.shape == weight.shape:
        return weight  # where the module is unknown, `Roles.load` says so
    wide = start.to(weight.dtype) if down else weight.new_zeros(start.shape)
    wide[tuple(slice(n) for n in weight.shape)] = weight
    return wide


def read_lora(lora: str | Path, *, strength: float | None = None) -> LoraFile:
    """A LoRA with its settings: diffusers' file with adapter metadata, or peft's folder with `adapter_config.json`.

    With a ``strength``, a file without settings is read as diffusers reads it, alpha being its rank.

    Raises ValueError where there are no settings and no strength is given (alpha would be a guess), and on damaged
    files, names and settings that are not supported.
    """
    path = lora_file(lora)
    tensors, metadata = _contents(path)
    weights = {_plain_name(name, path): w for name, w in tensors.items()}
    config_file = path.with_name("adapter_config.json")
    if path.name == PEFT_FILE and config_file.is_file():
        settings = _settings(config_file.read_text(encoding="utf-8"), config_file)
    else:
        known = _settings(metadata.get("lora_adapter_metadata", "{}"), path)
        settings = {k.removeprefix("transformer."): v for k, v in known.items() if k.startswith("transformer.")}
    if not settings and strength is not None:
        rank = max((w.shape[0] for n, w in weights.items() if n.endswith(_DOWN)), default=0)
        ranks = {_module_of(n): w.shape[0] for n, w in weights.items() if n.endswith(_DOWN)}
        settings = {"r": rank, "lora_alpha": rank, "alpha_pattern": {m: r for m, r in ranks.items() if r != rank}}
    if not settings:
        raise ValueError(
            f"the LoRA at {str(lora)!r} has no adapter metadata: save it again with its LoraConfig, or give the "
            "strength at which it is meant to be loaded: model.student_lora_scale in training, LORA@0.125 elsewhere"
        )
    for name in weights:
        if {_module_of(name) + end for end in (_DOWN, _UP)} - weights.keys():
            raise ValueError(f"{path} lacks one of the two matrices of {_module_of(name)}: download it again")
    return LoraFile(weights, _checked_config(settings, path))


def _plain_name(name: str, path: Path) -> str:
    """``transformer_blocks.0.attn.to_q.lora_A.weight``, however the file's writer begins it."""
    plain = name
    for prefix in ("base_model.model.", "transformer."):
        plain = plain.removeprefix(prefix)
    if not plain.endswith((_DOWN, _UP)):
        raise ValueError(
            f"{path} has {name!r}: a LoRA of a transformer is expected, with diffusers' names "
            "(MODULE.lora_A.weight, MODULE.lora_B.weight); load it in diffusers and save it with save_lora_weights"
        )
    return plain


def _module_of(name: str) -> str:
    return name.removesuffix(_DOWN).removesuffix(_UP)


def _checked_config(settings: dict[str, Any], path: Path) -> LoraConfig:
    """peft's settings; ValueError naming the first that changes what a LoRA computes and is not supported here."""
    plain = LoraConfig()
    for name, value in settings.items():
        if name in READ or name in NOT_COMPUTED or not value or value == getattr(plain, name, None):
            continue
        raise ValueError(
            f"{path} was made with {name} = {value!r}, which is not supported: give a plain LoRA (or rsLoRA), for "
            "instance one that peft has converted"
        )
    init = settings.get("init_lora_weights")
    if isinstance(init, str) and init.lower().startswith(CHANGE_THE_BASE):
        raise ValueError(
            f"{path} was made with init_lora_weights = {init!r}, which changes the base's weights: convert it with "
            "peft (`path_initial_model_for_weight_conversion`) first"
        )
    if {"r", "lora_alpha"} - settings.keys():
        raise ValueError(f"{path}: its settings lack r or lora_alpha; save it again with its LoraConfig")
    return LoraConfig(
        init_lora_weights="gaussian", **{k: v for k, v in settings.items() if k in READ and v is not None}
    )


def _contents(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file. Raises ValueError saying what the file is if it is none."""
    with path.open("rb") as file:
        begins = file.read(64)
    if begins.startswith(b"version https://git-lfs"):
        raise ValueError(
            f"{path} is a Git LFS pointer, not the weights: run `git lfs pull` there, or download the file"
        )
    try:
        with safe_open(path, framework="pt") as opened:
            names = opened.keys()
            return {name: opened.get_tensor(name) for name in names}, opened.metadata() or {}
    except SafetensorError as error:
        raise ValueError(
            f"{path} is no whole safetensors file ({error}): it is damaged or was not downloaded to its end; download "
            "it again"
        ) from error


def lora_digest(lora: str | Path) -> str:
    """Identifies a LoRA by its weights and settings. (The bytes of two equal files differ: safetensors
    writes metadata in no fixed order.)"""
    digest = hashlib.sha256()
    path = lora_file(lora)
    tensors, metadata = _contents(path)
    config_file = path.with_name("adapter_config.json")
    text = config_file.read_text(encoding="utf-8") if config_file.is_file() else "{}"
    known = _settings(metadata.get("lora_adapter_metadata", text), path)
    settings = {k: sorted(v, key=str) if isinstance(v, list) else v for k, v in known.items()}
    digest.update(json.dumps(settings, sort_keys=True).encode())
    for name in sorted(tensors):
        digest.update(save({name: tensors[name]}))
    return digest.hexdigest()


def _settings(text: str, file: Path) -> dict[str, Any]:
    """The settings of a LoRA. Raises ValueError, with the file's name, if that is no JSON object."""
    try:
        found = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{file}: the LoRA's settings are no JSON ({error}); download it again") from error
    if not isinstance(found, dict):
        raise ValueError(f"{file}: the LoRA's settings are a {type(found).__name__}, no JSON object")
    return found


def lora_file(lora: str | Path) -> Path:
    """The file of a LoRA, fetched from the hub if need be. Raises ValueError if there is none."""
    path = Path(lora)
    if not path.exists() and str(lora).count("/") == 1:
        path = _from_hub(str(lora))
    if path.is_dir():
        found = sorted(path.glob("*.safetensors"))
        usual = [path / name for name in (FILE, PEFT_FILE) if path / name in found]
        path = usual[0] if usual else found[0] if len(found) == 1 else path / FILE
    if not path.is_file():
        raise ValueError(f"no LoRA at {str(lora)!r}: give a folder with {FILE}, or a hub id")
    if path.suffix in (".bin", ".ckpt", ".pt", ".pth"):
        raise ValueError(f"{path} may be a pickle, which is not opened: give a .safetensors file")
    return path


def _from_hub(name: str) -> Path:
    try:
        return Path(snapshot_download(name, allow_patterns=["*.safetensors", "adapter_config.json"]))
    except (HFValidationError, HfHubHTTPError, OSError) as error:
        raise ValueError(
            f"no LoRA at {name!r}: it is no local folder, and the hub does not give it ({type(error).__name__}); "
            f"download it where it can be reached (`hf download {name}`), and give the folder"
        ) from error
