"""Checkpoints: nested dictionaries of tensors and plain values in one safetensors file, written atomically.

Tensors that are spread over processes stand in a folder beside it, which torch.distributed.checkpoint writes, as
safetensors too: every process its shares, to be read by any number of them. The file names its folder.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import uuid
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from ..core import processes, shards
from ..files import sync, sync_folder, whole_file

_TREE, _DIGEST, _SHARES = "tdm_r1_tree", "tdm_r1_digest", "tdm_r1_shares"  # keys of the file's metadata


class DamagedError(ValueError):
    """A checkpoint whose contents are not those that were written."""


@dataclass(frozen=True)
class Spread:
    """What `load_state` gives in place of a tensor that was spread over processes; `gather_spread` loads it."""

    folder: str
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype


def save_state(path: Path, state: Mapping[str, Any]) -> None:
    """Writes nested dicts and lists of tensors, numbers, strings and None to ``path`` (safetensors, no pickle).

    The file appears whole or not at all. Dictionary keys may be strings or integers. Where tensors are spread over the
    processes this is collective: call it in all of them, with a path that all see. Raises OSError if it cannot write.
    """
    tensors: dict[str, Tensor] = {}
    spread: dict[str, Tensor] = {}
    tree = _pack(state, tensors, spread, "")
    metadata = {_TREE: json.dumps(tree), _DIGEST: _digest(tensors)}

    def write() -> None:
        with whole_file(path) as partial:
            save_file(tensors, partial, metadata=metadata)

    if not spread:
        write()
        return
    shares = _save_spread(path, spread)
    metadata[_SHARES] = json.dumps(shares)
    processes.by_first(write)
    processes.by_first(lambda: remove_shares(path, but=shares["folder"]))


def _save_spread(path: Path, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Every process writes its shares into one new folder; its name, and each file's checksum."""
    folder = path.parent / processes.by_first(lambda: f"{path.stem}.{uuid.uuid4().hex[:8]}.shares")
    writer = dcp.HuggingFaceStorageWriter(str(folder), save_distributed=True)
    try:
        with _told(f"cannot write {folder}"):
            dcp.save(tensors, storage_writer=writer)
    except OSError:
        processes.by_first(lambda: shutil.rmtree(folder, ignore_errors=True))
        raise

    def finish() -> dict[str, str]:
        own = sorted(folder.glob("*.safetensors"))[processes.rank() :: processes.count()]
        for file in own:
            sync(file)
        return {file.name: _digest_of_file(file) for file in own}

    digests = [digest for own in processes.gather_each(processes.together(finish)) for digest in own.items()]
    processes.by_first(lambda: sync_folder(folder))
    return {"folder": folder.name, "digests": dict(digests)}


@contextmanager
def _told(what: str) -> Iterator[None]:
    """Raises OSError in place of what torch.distributed.checkpoint raises in all processes, which is no Exception."""
    try:
        yield
    except CheckpointException as error:
        first = next(iter(error.failures.values()))[0]
        raise OSError(f"{what}: {type(first).__name__}: {first}") from error


def remove_checkpoint(path: Path) -> None:
    """Removes a checkpoint with all that belongs to it."""
    path.unlink()
    remove_shares(path)


def remove_shares(path: Path, *, but: str | None = None) -> None:
    """Removes the folders of a checkpoint's shares, except the one named ``but``."""
    for folder in path.parent.glob(f"{path.stem}.*.shares"):
        if folder.name != but:
            shutil.rmtree(folder)


def remove_orphans(folder: Path) -> None:
    """Removes the shares that no checkpoint names: a run that was killed while it wrote has left them."""
    for shares in folder.glob("*.shares"):
        path = folder / f"{shares.name.split('.')[0]}.safetensors"
        if not path.exists() or _folder_of_shares(path) not in (shares.name, None):
            shutil.rmtree(shares)


def _folder_of_shares(path: Path) -> str | None:
    """The name of the folder that a checkpoint's shares are in; None if the file cannot be read."""
    try:
        with safe_open(path, framework="pt") as file:
            return _shares_of(file.metadata() or {})["folder"]
    except SafetensorError:
        return None


def _shares_of(metadata: Mapping[str, str]) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(metadata.get(_SHARES, '{"folder": "", "digests": {}}'))
    return found


def gather_spread(path: Path, state: Any, device: str) -> Any:
    """What `load_state` has read, with the tensors that were spread over processes: spread over those that there are
    now, or whole in one. Collective: call it in all of them.

    Args:
        device: the kind of device that they go to.
    """
    wanted: dict[str, Tensor] = {}
    folders: set[str] = set()

    def make_room(leaf: Any) -> Any:
        if not isinstance(leaf, Spread):
            return leaf
        folders.add(leaf.folder)
        return wanted.setdefault(leaf.name, shards.room_for(leaf.shape, leaf.dtype, device))

    state = _each_leaf(state, make_room)
    for folder in folders:
        reader = dcp.HuggingFaceStorageReader(str(path.parent / folder))
        with warnings.catch_warnings():  # that there is a single process
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            with _told(f"cannot read {path.parent / folder}"):
                dcp.load(wanted, storage_reader=reader)
    return state


def _each_leaf(state: Any, change: Callable[[Any], Any]) -> Any:
    if isinstance(state, Mapping):
        return {key: _each_leaf(value, change) for key, value in state.items()}
    if isinstance(state, list):
        return [_each_leaf(value, change) for value in state]
    return change(state)


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
    shares = _shares_of(metadata)
    for name, digest in shares["digests"].items():
        file = path.parent / shares["folder"] / name
        if not file.is_file() or _digest_of_file(file) != digest:
            raise DamagedError(
                f"{path} is damaged: {file} is missing or does not match its checksum; resume from another with --from "
                "ITERATION"
            )
    return _unpack(json.loads(metadata[_TREE]), tensors, shares["folder"])


def _digest_of_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def _digest(tensors: Mapping[str, Tensor]) -> str:
    """Of the contents of all tensors. (The bytes of two equal files may differ: metadata has no fixed order.)"""
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _pack(value: Any, tensors: dict[str, Tensor], spread: dict[str, Tensor], name: str) -> Any:
    """The tree of a state, whose tensors it adds to ``tensors``, or to ``spread`` where they are that."""
    if isinstance(value, Tensor) and shards.is_spread(value):
        spread[name] = value.detach()
        return {"spread": name, "shape": list(value.shape), "dtype": str(value.dtype).removeprefix("torch.")}
    if isinstance(value, Tensor):
        tensors[name] = value.detach().clone(memory_format=torch.contiguous_format).cpu()
        return {"tensor": name}
    if isinstance(value, Mapping):
        items = [[key, _pack(item, tensors, spread, f"{name}/{key}")] for key, item in value.items()]
        return {"dict": items}
    if isinstance(value, list | tuple):
        return {"list": [_pack(item, tensors, spread, f"{name}/{i}") for i, item in enumerate(value)]}
    if value is None or isinstance(value, bool | int | float | str):
        return {"value": value}
    raise TypeError(f"cannot save {name!r} of type {type(value).__name__}: only tensors and plain values")


def _unpack(tree: Any, tensors: Mapping[str, Tensor], folder: str) -> Any:
    match tree:
        case {"spread": name, "shape": shape, "dtype": dtype}:
            return Spread(folder, name, tuple(shape), getattr(torch, dtype))
        case {"tensor": name}:
            return tensors[name]
        case {"dict": items}:
            return {key: _unpack(item, tensors, folder) for key, item in items}
        case {"list": items}:
            return [_unpack(item, tensors, folder) for item in items]
        case {"value": value}:
            return value
    raise ValueError(f"unreadable checkpoint entry {tree!r}")
