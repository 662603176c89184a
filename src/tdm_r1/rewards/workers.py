"""A reward in processes of its own: a scorer that crashes, leaks or hangs costs its samples, not the run."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from typing import Any

import numpy as np
from pebble import ProcessExpired, ProcessFuture, ProcessPool

from ..errors import UserError
from .scores import Reward, Scores, attempt, joined, missing

_loaded: list[Reward | Exception] = []  # in a worker process: the reward that it scores with, or why there is none


def _start(load: Callable[[str], Reward], name: str) -> None:
    try:
        _loaded.append(load(name))
    except Exception as error:  # told with every chunk: a pool whose workers do not start would hang
        _loaded.append(error)


def _score(images: np.ndarray, prompts: list[str], metadata: list[dict[str, Any]]) -> Scores:
    reward = _loaded[0]
    if isinstance(reward, Exception):
        raise UserError(f"the reward could not be loaded: {reward}")
    return attempt(reward, images, prompts, metadata)


class Workers:
    """A reward that scores in ``processes`` worker processes, in chunks whose order is kept.

    Args:
        name: of the reward; each worker loads it once.
        load: how to (`registry.load_reward`); has to be importable.
        timeout: seconds that a chunk may take; then its worker is killed and another one started.
        chunk: samples a call.
    """

    def __init__(self, name: str, load: Callable[[str], Reward], *, processes: int, timeout: float, chunk: int) -> None:
        self.timeout, self.chunk, self.processes = timeout, chunk, processes
        self.initargs = (load, name)
        self._pool: ProcessPool | None = None

    @property
    def pool(self) -> ProcessPool:
        """The worker processes; started when they are first needed, also after `close`."""
        if self._pool is None:
            spawn = multiprocessing.get_context("spawn")  # a fork would copy the trainer's threads and GPU context
            self._pool = ProcessPool(self.processes, initializer=_start, initargs=self.initargs, context=spawn)
        return self._pool

    def __call__(self, images: np.ndarray, prompts: list[str], metadata: list[dict[str, Any]]) -> Scores:
        futures = []
        for start in range(0, len(images), self.chunk):
            rows = slice(start, start + self.chunk)
            args = (images[rows], prompts[rows], metadata[rows])
            futures.append((self.pool.schedule(_score, args=args, timeout=self.timeout), len(images[rows])))
        return joined([self._result(future, n) for future, n in futures])

    def _result(self, future: ProcessFuture, n: int) -> Scores:
        try:
            return future.result()
        except UserError:
            raise
        except TimeoutError:
            return missing(n, f"no score within {self.timeout:g} seconds: the worker was stopped")
        except ProcessExpired as error:
            return missing(n, f"the worker process died (exit code {error.exitcode})")

    def close(self) -> None:
        """Stops the worker processes."""
        if self._pool is not None:
            self._pool.stop()
            self._pool.join()
            self._pool = None
