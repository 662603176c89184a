"""Weights that are spread over the processes of a run: each keeps a share of every tensor (FSDP2), a DTensor."""

from __future__ import annotations

import warnings
from collections.abc import Collection
from functools import lru_cache

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor, empty

from . import processes


@lru_cache
def mesh_of(device: str) -> DeviceMesh:
    """All processes in a row; ``device``: the kind of their devices."""
    return init_device_mesh(device, (processes.count(),))


def spread(module: nn.Module, blocks: Collection[str], device: torch.device, whole: Collection[nn.Parameter]) -> None:
    """Spreads a module, which may be in main memory, over the devices of the processes.

    The weights of a block are gathered where it computes, forward and backward; gradients are summed over processes.

    Args:
        blocks: the class names of its blocks.
        whole: weights that every process keeps whole.
    """
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")  # nothing is in place
    parts = [part for part in module.modules() if type(part).__name__ in blocks]
    for part in [*parts, module]:
        spread_part = fully_shard(
            part,
            mesh=mesh_of(device.type),
            reshard_after_forward=True,  # of the outermost too: else it would go on with weights from before an update
            ignored_params=set(whole),
        )
        spread_part.set_gradient_divide_factor(1.0)
        spread_part.set_force_sum_reduction_for_comms(True)
    for p in whole:
        p.data = p.data.to(device)


def is_spread(tensor: Tensor) -> bool:
    """Whether each process has a share of it alone."""
    return isinstance(tensor, DTensor)


def gathered(tensor: Tensor) -> Tensor:
    """The whole of a tensor, in every process. Collective: call it in all of them."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def share_of(tensor: Tensor, like: Tensor) -> Tensor:
    """A tensor as ``like`` is: this process's share of it, or whole. Collective where the tensor alone is spread."""
    if not isinstance(like, DTensor):
        return gathered(tensor)
    if isinstance(tensor, DTensor):
        return tensor
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def room_for(shape: Collection[int], dtype: torch.dtype, device: str) -> Tensor:
    """A tensor to be filled, spread where there are several processes."""
    size = torch.Size(shape)
    if processes.count() == 1:
        return torch.empty(size, dtype=dtype, device=device)
    return empty(size, dtype=dtype, device_mesh=mesh_of(device), placements=[Shard(0)])
