"""Checkpoints: nested dictionaries of tensors and plain values in one safetensors file, written atomically."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

_TREE = "tdm_r1_tree"


def save_state(path: Path, state: Mapping[str, Any]) -> None:
    """Writes nested dicts and lists of tensors, numbers, strings and None to ``path`` (safetensors, no pickle).

    The file appears whole or not at all. Dictionary keys may be strings or integers.
    """
    tensors: dict[str, Tensor] = {}
    tree = _pack(state, tensors, "")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    try:
        save_file(tensors, partial, metadata={_TREE: json.dumps(tree)})
        with partial.open("rb+") as file:
            os.fsync(file.fileno())  # a file that is there by name is there in whole, also after a power cut
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def load_state(path: Path) -> Any:
    """Reads what `save_state` wrote. Raises ValueError on a file of another kind."""
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
        if _TREE not in metadata:
            raise ValueError(f"{path} is not a tdm-r1 checkpoint: point to a file that a run wrote under checkpoints/")
        return _unpack(json.loads(metadata[_TREE]), file)


def _pack(value: Any, tensors: dict[str, Tensor], name: str) -> Any:
    if isinstance(value, Tensor):
        tensors[name] = value.detach().clone(memory_format=torch.contiguous_format).cpu()
        return {"tensor": name}
    if isinstance(value, Mapping):
        items = [[key, _pack(item, tensors, f"{name}/{key}")] for key, item in value.items()]
        return {"dict": items}
    if isinstance(value, list | tuple):
        return {"list": [_pack(item, tensors, f"{name}/{i}") for i, item in enumerate(value)]}
    if value is None or isinstance(value, bool | int | float | str):
        return {"value": value}
    raise TypeError(f"cannot save {name!r} of type {type(value).__name__}: only tensors and plain values")


def _unpack(tree: Any, file: Any) -> Any:
    match tree:
        case {"tensor": name}:
            return file.get_tensor(name)
        case {"dict": items}:
            return {key: _unpack(item, file) for key, item in items}
        case {"list": items}:
            return [_unpack(item, file) for item in items]
        case {"value": value}:
            return value
    raise ValueError(f"unreadable checkpoint entry {tree!r}")


def write_text(path: Path, text: str) -> None:
    """Writes a text file (UTF-8) so that it appears whole or not at all, also where several processes write it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)
