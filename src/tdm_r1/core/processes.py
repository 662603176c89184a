"""Several processes on one batch, each with a share of its samples (`torch.distributed`); without them, all samples.

Every process knows the whole batch (prompts, scores, points of the trajectories) and runs the network on its own share.
What is summed over samples is summed over processes: gradients, metrics. So every process makes the same update.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..errors import RAISED_ELSEWHERE, UserError

T = TypeVar("T")


def count() -> int:
    """Processes of the run."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """This process's number; number 0 writes files and prints."""
    return dist.get_rank() if count() > 1 else 0


def mine(rows: Tensor, unit: int = 1) -> Tensor:
    """This process's share of ``rows`` [N]: consecutive ones, as many as the others' or one unit more or fewer.

    Args:
        unit: rows that stay together; N is a multiple of it.
    """
    return rows.reshape(-1, unit).tensor_split(count())[rank()].flatten()


def most(rows: int, unit: int = 1) -> int:
    """The rows of the largest share."""
    return -(-rows // unit // count()) * unit


def in_step(parts: Sequence[Tensor], rows: int, size: int) -> list[Tensor]:
    """The parts of a share, filled up with empty ones until every process has the same number of them: a model whose
    weights are spread over the processes computes in all of them or in none.

    Args:
        parts: of at most ``size`` rows.
        rows: of the largest share.
    """
    rounds = -(-rows // size)
    return [*parts, *(torch.arange(0) for _ in range(rounds - len(parts)))]


def gather(own: Tensor, total: int, unit: int = 1) -> Tensor:
    """What the processes have computed for their shares (`mine`) of ``total`` rows, in order: [total, ...]."""
    if count() == 1:
        return own
    sizes = [len(part) * unit for part in torch.arange(total // unit).tensor_split(count())]
    padded = own.new_zeros(max(sizes), *own.shape[1:])
    padded[: len(own)] = own
    parts = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(parts, padded)
    return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])


def sum_of(own: Tensor) -> Tensor:
    """The sum of a tensor over the processes, in its place."""
    if count() > 1:
        dist.all_reduce(own)
    return own


def gather_each(own: T) -> list[T]:
    """The values of all processes, which may be anything that can be pickled."""
    if count() == 1:
        return [own]
    found: list[T] = [own] * count()
    dist.all_gather_object(found, own)
    return found


def sum_of_each(own: Mapping[str, float]) -> dict[str, float]:
    """The sum over the processes of every number; a process may lack some."""
    found: dict[str, float] = {}
    for numbers in gather_each(dict(own)):
        for name, value in numbers.items():
            found[name] = found.get(name, 0.0) + value
    return found


@torch.no_grad()  # of gradients
def sum_gradients(parameters: Sequence[nn.Parameter]) -> None:
    """Sums the gradients of all processes, in one exchange. A parameter without any stays without."""
    if count() == 1:
        return
    has = torch.tensor([p.grad is not None for p in parameters], dtype=torch.float32, device=parameters[0].device)
    flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in parameters] + [has])
    dist.all_reduce(flat)
    anywhere = flat[-len(parameters) :].tolist()
    sizes = [p.numel() for p in parameters]
    for p, total, known in zip(parameters, flat[: -len(parameters)].split(sizes), anywhere, strict=True):
        p.grad = total.view_as(p) if known else None


def together(work: Callable[[], T]) -> T:
    """The result of a piece of work that each process does for itself. What one raises, all raise.

    Without this a process that fails alone would leave the others waiting for it. Nothing may be exchanged inside.
    """
    if count() == 1:
        return work()
    result, own = None, None
    try:
        result = work()
    except Exception as error:
        own = error
    raised = gather_each(None if own is None else _told(own))
    if not any(raised):
        return result  # type: ignore[return-value]
    first = next(number for number, told in enumerate(raised) if told)
    if own is not None and first == rank():
        raise own
    elsewhere: Exception = raised[first]  # type: ignore[assignment]
    elsewhere.add_note(RAISED_ELSEWHERE)
    raise elsewhere


def _told(error: Exception) -> Exception:
    """What the other processes raise for an error of this one."""
    for kind in (UserError, FloatingPointError, OSError, ValueError):
        if isinstance(error, kind):
            return kind(str(error))
    return RuntimeError(f"process {rank()} failed: {type(error).__name__}: {error}")


def by_first(work: Callable[[], T]) -> T:
    """The result of a piece of work that the first process does for all: what it raises, all raise."""
    result = together(lambda: work() if rank() == 0 else None)
    if count() == 1:
        return result  # type: ignore[return-value]
    found = [result]
    dist.broadcast_object_list(found, src=0)
    return found[0]  # type: ignore[return-value]


def any_of(flag: bool) -> bool:
    """Whether it is true in any process."""
    return any(gather_each(flag))
