"""Processes that `accelerate launch` or `torchrun` has started become one run."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from ..config.load import differences
from ..config.run import RunConfig
from ..core import processes, shards
from ..errors import RAISED_ELSEWHERE, RAISED_HERE, UserError
from ..models.roles import Roles
from .heartbeat import heartbeat

EXCHANGE_TIMEOUT = timedelta(minutes=60)  # a process may wait that long for another's slow reward; ours


@contextmanager
def joined() -> Iterator[None]:
    """Joins the other processes until the block ends, on the GPU of this one's number on its node, if there are GPUs.

    A process that stops answering ends all of them, see `heartbeat`.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
        yield
        return
    gpu = torch.cuda.is_available()
    if gpu:
        torch.cuda.set_device(_local_gpu())
    store, rank, size = next(dist.rendezvous("env://", timeout=EXCHANGE_TIMEOUT))
    backend = "cpu:gloo,cuda:nccl" if gpu else "gloo"
    dist.init_process_group(backend, store=_of_attempt(store), rank=rank, world_size=size, timeout=EXCHANGE_TIMEOUT)
    try:
        with heartbeat():
            yield
    except Exception as error:  # the process ends, and with it the group: to leave it could wait for the others
        if RAISED_ELSEWHERE not in getattr(error, "__notes__", ()):
            error.add_note(RAISED_HERE)
        raise
    dist.destroy_process_group()


def _of_attempt(store: dist.Store) -> dist.Store:
    """The part of torchrun's store that is this attempt's: the same store serves a restart, and still has the addresses
    of the processes before it. Machines count their restarts apart: on several of them each round needs a store of its
    own, which TORCH_DISABLE_SHARE_RDZV_TCP_STORE brings (docs/multi_node.sh)."""
    own = os.environ.get("TORCH_DISABLE_SHARE_RDZV_TCP_STORE") == "1"
    return store if own else dist.PrefixStore(f"attempt {_restarts()}", store)


def _local_gpu() -> int:
    """This process's GPU. Raises UserError if its node has fewer GPUs than processes."""
    number, gpus = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if number >= gpus:
        raise UserError(f"process {number} of this node has no GPU: there are {gpus}; start as many processes")
    return number


def restarted() -> bool:
    """Whether torchrun has started this process again after a failure."""
    return _restarts() > 0


def _restarts() -> int:
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def require_same_settings(config: RunConfig) -> None:
    """Raises UserError if another process has other settings, as one has that resumes without the run's folder."""
    for number, other in enumerate(processes.gather_each(config)):
        for name, own, found in differences(config, other):
            raise UserError(
                f"{name} = {own!r} in process {processes.rank()}, {found!r} in process {number}: start all with the "
                "same arguments, where all of them see the run's folder"
            )


def require_share(config: RunConfig) -> None:
    """Raises UserError if the processes are too many to give each of them a sample, or a device is named for all."""
    n, b, e = processes.count(), config.batch, config.evaluation
    if n == 1 and config.model.shard:
        raise UserError("model.shard = True in one process: start several (docs/scaling.md), or set it to false")
    if n == 1:
        return
    samples = {
        f"batch.prompts x batch.group = {b.prompts} x {b.group}": b.prompts * b.group,
        f"evaluation.prompts x evaluation.images_per_prompt = {e.prompts} x {e.images_per_prompt}": (
            e.prompts * e.images_per_prompt
        ),
    }
    if b.kl_prompts:
        samples[f"batch.kl_prompts = {b.kl_prompts}"] = b.kl_prompts
    for what, there_are in samples.items():
        if there_are < n:
            raise UserError(f"{what}: fewer than the {n} processes; start fewer, or raise it")
    if config.model.device.startswith("cuda:"):
        raise UserError(f"model.device = {config.model.device!r} for {n} processes: set it to auto, each takes its own")


def require_alike(roles: Roles) -> None:
    """Raises RuntimeError if the processes no longer have the same weights: a fault of a machine or of this library."""
    if processes.count() == 1:
        return
    names = [str(spec.name) for spec in roles.specs]
    whole = {name: [p.detach() for p in roles.parameters(name) if not shards.is_spread(p)] for name in names}
    own = {name: sum(int(p.view(torch.int32).sum()) for p in weights) for name, weights in whole.items()}
    for number, other in enumerate(processes.gather_each(own)):
        if wrong := [name for name in names if other[name] != own[name]]:
            raise RuntimeError(f"process {number} has other weights of {wrong[0]} than process {processes.rank()}")
