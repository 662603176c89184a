"""A reward in Ray actors: on other machines, with a share of a GPU each, in an environment of its own.

The rules are those of worker processes: what crashes, hangs or returns nonsense costs its samples, not the run.
"""

from __future__ import annotations

import logging
import os
import queue
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from ..errors import UserError
from .loading import LoadedReward, NotLoadedError
from .scores import Reward, Scores, joined, missing
from .settings import ScoringConfig

_connecting = threading.Lock()


class ActorLostError(Exception):
    """An actor died, or a new one did not get ready."""


class RayActors:
    """A reward that scores in ``config.workers`` Ray actors, in chunks whose order is kept. Threads may share it.

    Args:
        name: of the reward; each actor loads it once.
        load: how to (`registry.load_reward`); has to be importable where the actors run.
        config: how many actors, their share of a GPU, where Ray is, and how long things may take.
        environment: Ray's ``runtime_env`` of the actors.

    Raises UserError, when first called, if Ray is not there or has not what the actors need.
    """

    def __init__(
        self, name: str, load: Callable[[str], Reward], config: ScoringConfig, environment: Mapping[str, Any]
    ) -> None:
        self.name, self.load, self.config, self.environment = name, load, config, dict(environment)
        self._idle: queue.Queue[Any] = queue.Queue()
        self._threads: ThreadPoolExecutor | None = None
        self._starting = threading.Lock()
        self._begun = False  # whether an actor ever had the reward

    def __call__(self, images: np.ndarray, prompts: list[str], metadata: list[dict[str, Any]]) -> Scores:
        threads, chunk = self._start(), self.config.chunk
        spans = [slice(start, start + chunk) for start in range(0, len(images), chunk)]
        tasks = [threads.submit(self._scored, images[s], prompts[s], metadata[s]) for s in spans]
        return joined([task.result() for task in tasks])

    def _start(self) -> ThreadPoolExecutor:
        """The threads that wait for the actors, one each; both are started when they are first needed."""
        with self._starting:
            if self._threads is None:
                _connect(self.config)
                for _ in range(self.config.workers):
                    self._idle.put(self._actor())
                self._threads = ThreadPoolExecutor(self.config.workers)
            return self._threads

    def _actor(self) -> Any:
        import ray

        options: dict[str, Any] = {"num_gpus": self.config.gpus, "max_restarts": 0}
        if self.environment:
            options["runtime_env"] = self.environment
        return ray.remote(LoadedReward).options(**options).remote(self.load, self.name)

    def _scored(self, images: np.ndarray, prompts: list[str], metadata: list[dict[str, Any]]) -> Scores:
        """A chunk's scores, from the next idle actor; missing where it fails, and another actor in its place."""
        from ray.exceptions import GetTimeoutError, RayActorError, RayError, RayTaskError

        actor, n, why = self._idle.get(), len(images), ""
        try:
            actor = self._ready(actor)
            scores = _result(actor.score.remote(images, prompts, metadata), self.config.timeout)
            self._begun = True
            return scores
        except NotLoadedError as error:
            if not self._begun:
                raise UserError(f"the reward could not be loaded: {error}") from None
            return missing(n, f"a new actor could not load the reward: {error}")
        except ActorLostError as error:
            why = str(error)
        except GetTimeoutError:
            why = f"no score within {self.config.timeout:g} seconds: the actor was stopped"
        except RayActorError:
            why = "the actor died"
        except RayTaskError as error:
            return missing(n, f"{error.cause}")
        except RayError as error:
            why = f"Ray: {_first_line(error)}"
        finally:
            if why:
                _stop(actor)
                actor = self._actor()
            self._idle.put(actor)
        return missing(n, why)

    def _ready(self, actor: Any) -> Any:
        """The actor once it has its reward; a new one if it died while it had nothing to do. Raises ActorLostError."""
        from ray.exceptions import GetTimeoutError, RayActorError

        for another in (True, False):
            try:
                _result(actor.ready.remote(), self.config.load_timeout)
                return actor
            except GetTimeoutError:
                seconds = self.config.load_timeout
                raise ActorLostError(f"no actor was ready within {seconds:g} seconds: it was stopped") from None
            except RayActorError as error:
                if another:
                    actor = self._actor()
                else:
                    raise ActorLostError(f"the actor died as it loaded the reward: {_first_line(error)}") from None
        raise AssertionError

    def close(self) -> None:
        """Stops the actors; they start again when needed. A Ray of this run's own goes on until the process ends."""
        with self._starting:
            if self._threads is None:
                return
            self._threads.shutdown(cancel_futures=True)
            self._threads = None
            while not self._idle.empty():
                _stop(self._idle.get())


def _result(reference: Any, timeout: float) -> Any:
    """What the actor returned. Raises what it raised where that has a meaning here."""
    import ray

    try:
        return ray.get(reference, timeout=timeout)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, UserError | NotLoadedError):
            raise error.cause from None
        raise


def _stop(actor: Any) -> None:
    import ray

    ray.kill(actor)


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _connect(config: ScoringConfig) -> None:
    """Connects this process with Ray, unless it is. Raises UserError if that fails or GPUs lack."""
    try:
        import ray
    except ImportError as error:
        raise UserError("scoring.backend = 'ray': ray is not installed: pip install 'tdm-r1[ray]'") from error
    with _connecting:
        if not ray.is_initialized():
            try:
                _init(config.ray_address or "local")
            except (ConnectionError, RuntimeError, ValueError) as error:
                raise UserError(
                    f"scoring.ray_address = {config.ray_address!r}: no Ray answers there ({_first_line(error)}); start "
                    "one with `ray start --head`, or set it to null for one of this run's own"
                ) from error
        has, wanted = ray.cluster_resources().get("GPU", 0.0), config.gpus * config.workers
        if has < wanted:
            raise UserError(
                f"scoring.gpus = {config.gpus:g} with scoring.workers = {config.workers}: that is {wanted:g} GPUs for "
                f"each reward, and Ray has {has:g}; lower one of the two"
            )


def _init(address: str) -> None:
    """Connects with Ray, in a thread that never ends: the kernel kills a Ray that is started here with that thread."""
    import ray

    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    done, errors = threading.Event(), []

    def connect() -> None:
        try:
            ray.init(address=address, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
        except Exception as error:  # raised below
            errors.append(error)
        done.set()
        threading.Event().wait()

    threading.Thread(target=connect, name="ray", daemon=True).start()
    done.wait()
    for error in errors:
        raise error
