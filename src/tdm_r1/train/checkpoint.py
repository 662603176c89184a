"""Checkpoints: nested dictionaries of tensors and plain values in one safetensors file, written atomically."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..files import whole_file

_TREE, _DIGEST = "tdm_r1_tree", "tdm_r1_digest"  # keys of the file's metadata


class DamagedError(ValueError):
    """A checkpoint whose contents are not those that were written."""


def save_state(path: Path, state: Mapping[str, Any]) -> None:
    """Writes nested dicts and lists of tensors, numbers, strings and None to ``path`` (safetensors, no pickle).

    The file appears whole or not at all. Dictionary keys may be strings or integers.
    """
    tensors: dict[str, Tensor] = {}
    tree = _pack(state, tensors, "")
    with whole_file(path) as partial:
        save_file(tensors, partial, metadata={_TREE: json.dumps(tree), _DIGEST: _digest(tensors)})


def load_state(path: Path) -> Any:
    """Reads what `save_state` wrote. Raises ValueError on a file of another kind, DamagedError on a damaged one."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise DamagedError(f"{path} is damaged: {error}") from error
    if _TREE not in metadata:
        raise ValueError(f"{path} is not a tdm-r1 checkpoint: point to a file that a run wrote under checkpoints/")
    if metadata.get(_DIGEST) != _digest(tensors):
        raise DamagedError(
            f"{path} is damaged: its contents do not match their checksum; resume from another with --from ITERATION"
        )
    return _unpack(json.loads(metadata[_TREE]), tensors)


def _digest(tensors: Mapping[str, Tensor]) -> str:
    """Of the contents of all tensors. (The bytes of two equal files may differ: metadata has no fixed order.)"""
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


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


def _unpack(tree: Any, tensors: Mapping[str, Tensor]) -> Any:
    match tree:
        case {"tensor": name}:
            return tensors[name]
        case {"dict": items}:
            return {key: _unpack(item, tensors) for key, item in items}
        case {"list": items}:
            return [_unpack(item, tensors) for item in items]
        case {"value": value}:
            return value
    raise ValueError(f"unreadable checkpoint entry {tree!r}")
