"""A reward in processes of its own: a scorer that crashes, leaks or hangs costs its samples, not the run."""

from __future__ import annotations

import multiprocessing
import threading
import time
from collections.abc import Callable
from concurrent.futures import BrokenExecutor, CancelledError
from dataclasses import dataclass
from typing import Any

import numpy as np
from pebble import ProcessExpired, ProcessFuture, ProcessPool

from ..errors import UserError
from .loading import LoadedReward, NotLoadedError
from .scores import Reward, Scores, joined, missing

PROBE_AFTER = 2.0  # seconds


class TaskLostError(Exception):
    """A worker died with a task that the pool believes to be waiting."""


_here: list[LoadedReward] = []  # in a worker process


def _start(load: Callable[[str], Reward], name: str) -> None:
    _here.append(LoadedReward(load, name))


def _ready() -> None:
    _here[0].ready()


def _score(images: np.ndarray, prompts: list[str], metadata: list[dict[str, Any]]) -> Scores:
    return _here[0].score(images, prompts, metadata)


def _nothing() -> None:
    """A task that does nothing; see `Workers._wait`."""


@dataclass(frozen=True)
class _Task:
    """What a pool was asked to do."""

    work: Callable
    args: tuple
    future: ProcessFuture
    pool: ProcessPool


class _Patience:
    """How long all of a call's tasks together may take."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self._end = seconds, time.monotonic() + seconds

    @property
    def left(self) -> float:
        return max(self._end - time.monotonic(), 0.0)


class Workers:
    """A reward that scores in ``processes`` worker processes, in chunks whose order is kept. Threads may share it.

    Args:
        name: of the reward; each worker loads it once.
        load: how to (`registry.load_reward`); has to be importable.
        timeout: seconds that a chunk may take; then its worker is killed and another one started.
        load_timeout: seconds that loading the reward may take.
        chunk: samples a call.
    """

    def __init__(
        self,
        name: str,
        load: Callable[[str], Reward],
        *,
        processes: int,
        timeout: float,
        chunk: int,
        load_timeout: float = 1800.0,
    ) -> None:
        self.timeout, self.load_timeout, self.chunk, self.processes = timeout, load_timeout, chunk, processes
        self.initargs = (load, name)
        self._pool: ProcessPool | None = None
        self._mutex = threading.Lock()
        self._begun = False  # whether a worker ever had the reward

    @property
    def pool(self) -> ProcessPool:
        """The worker processes; started when they are first needed, also after `close`."""
        with self._mutex:
            if self._pool is None:
                spawn = multiprocessing.get_context("spawn")  # a fork would copy the trainer's threads and GPU context
                self._pool = ProcessPool(self.processes, initializer=_start, initargs=self.initargs, context=spawn)
            return self._pool

    def start(self) -> None:
        """Waits until a worker has loaded the reward. Raises UserError if it cannot be loaded."""
        failed = self._result(self._schedule(_ready), 0, _Patience(self.load_timeout))
        if failed is not None and failed.failures:
            raise UserError(f"the reward could not be loaded: {failed.failures[0]}")

    def __call__(self, images: np.ndarray, prompts: list[str], metadata: list[dict[str, Any]]) -> Scores:
        spans = [slice(start, start + self.chunk) for start in range(0, len(images), self.chunk)]
        tasks = [self._schedule(_score, images[s], prompts[s], metadata[s]) for s in spans]
        patience = _Patience(self.load_timeout + self.timeout * len(spans))  # other chunks may come first
        return joined([self._result(task, len(images[s]), patience) for task, s in zip(tasks, spans, strict=True)])

    def _schedule(self, work: Callable, *args: Any) -> _Task:
        timeout = self.timeout if args else None
        pool = self.pool
        try:
            return _Task(work, args, pool.schedule(work, args=args, timeout=timeout), pool)
        except RuntimeError:  # a worker died while it had nothing to do, and the pool gave up
            self._drop(pool)
            pool = self.pool
            return _Task(work, args, pool.schedule(work, args=args, timeout=timeout), pool)

    def _result(self, task: _Task, n: int, patience: _Patience, *, again: bool = True) -> Any:
        """What the task gave; missing scores of ``n`` samples where it failed."""
        try:
            result = self._wait(task, patience)
        except UserError:
            raise
        except NotLoadedError as error:
            if not self._begun:
                raise UserError(f"the reward could not be loaded: {error}") from error
            return missing(n, f"a new worker could not load the reward: {error}")
        except TimeoutError:
            if task.future.done():
                return missing(n, f"no score within {self.timeout:g} seconds: the worker was stopped")
            self._drop(task.pool)
            return missing(n, f"no worker was ready within {patience.seconds:g} seconds: they were stopped")
        except ProcessExpired as error:
            return missing(n, f"the worker process died (exit code {error.exitcode})")
        except (BrokenExecutor, CancelledError, TaskLostError) as error:
            if again and patience.left:  # a worker that had nothing to do may have died a moment before
                if not isinstance(error, TaskLostError):
                    self._drop(task.pool)
                return self._result(self._schedule(task.work, *task.args), n, patience, again=False)
            return missing(n, "the worker processes died before they had anything to score")
        self._begun = True
        return result

    def _wait(self, task: _Task, patience: _Patience) -> Any:
        """The task's result. Raises TaskLostError if a worker died just when it had fetched the task: the pool then
        waits for ever. It is found by a second task: tasks are begun in order, so the first cannot be still waiting
        when that one is done."""
        probe: ProcessFuture | None = None
        while True:
            try:
                return task.future.result(timeout=min(patience.left, PROBE_AFTER))
            except TimeoutError:
                if task.future.done():
                    return task.future.result()  # or its own error
                if not patience.left:
                    raise
            if probe is not None and probe.done() and not (task.future.running() or task.future.done()):
                raise TaskLostError
            if probe is None and not task.future.running() and task.pool.active:
                probe = task.pool.schedule(_nothing)

    def _drop(self, pool: ProcessPool) -> None:
        """Stops ``pool``, unless another thread has done so already."""
        with self._mutex:
            if self._pool is pool:
                self._pool = None
                pool.stop()
                pool.join()

    def close(self) -> None:
        """Stops the worker processes."""
        if (pool := self._pool) is not None:
            self._drop(pool)
