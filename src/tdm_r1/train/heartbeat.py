"""Ends a run of several processes soon after one of them has died or has been frozen, and says which."""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta

import torch.distributed as dist

from ..core import processes

INTERVAL = 3.0  # seconds between two beats
LIMIT = 40.0  # seconds without one, after which a process is given up
LEAVING = 10.0  # seconds that the first process waits for the others at the end


@contextmanager
def heartbeat(*, interval: float = INTERVAL, limit: float = LIMIT) -> Iterator[None]:
    """Beats in the background while the block runs, and listens: the first process to all others, they to the first.

    When a process is silent for ``limit`` seconds it is named on stderr, and this one ends with code 1, for it may wait
    for that one in an exchange that no exception reaches. The launcher then ends the rest.
    """
    rank, others = processes.rank(), range(1, processes.count())
    store = _store(limit)
    done = threading.Event()
    beat = threading.Thread(target=_beat, args=(store, _hosts(), done, interval, limit), daemon=True)
    beat.start()
    try:
        yield
    finally:
        done.set()
        with suppress(dist.DistError):  # who has gone before is no matter now
            store.set(f"left {rank}", "")
            if rank == 0 and sys.exception() is None:  # the store goes with this process
                store.wait([f"left {other}" for other in others], timedelta(seconds=LEAVING))
        beat.join()


def _store(limit: float) -> dist.TCPStore:
    """A store of the beats' own, which the first process serves."""
    host, port, timeout = os.environ.get("MASTER_ADDR", "localhost"), [0], timedelta(seconds=limit)
    if processes.rank() == 0:
        store = dist.TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=timeout)
        port = [store.port]
    dist.broadcast_object_list(port, src=0)
    if processes.rank():
        store = dist.TCPStore(host, port[0], is_master=False, wait_for_workers=False, timeout=timeout)
    return store


def _hosts() -> list[str]:
    """The name of each process's machine."""
    return processes.gather_each(socket.gethostname())


def _beat(store: dist.TCPStore, hosts: Sequence[str], done: threading.Event, interval: float, limit: float) -> None:
    own = processes.rank()
    heard = {other: ("", time.monotonic()) for other in (range(1, len(hosts)) if own == 0 else (0,))}
    beats = 0
    while not done.wait(interval):
        beats += 1
        try:
            store.set(f"beat {own}", str(beats))
            _listen(store, heard)
        except dist.DistError:  # of the first process, which serves it
            silent: int | None = 0
        else:
            silent = next((other for other, (_, at) in heard.items() if time.monotonic() - at > limit), None)
        if silent is not None and not done.is_set():
            print(
                f"tdm-r1: process {silent} of {len(hosts)}, on {hosts[silent]}, no longer answers: process {own} ends. "
                "Start the run again with --resume",
                file=sys.stderr,
                flush=True,
            )
            os._exit(1)


def _listen(store: dist.TCPStore, heard: dict[int, tuple[str, float]]) -> None:
    """Notes when each process was heard last; of one that has left nothing more is expected."""
    for other, (last, _) in list(heard.items()):
        if store.check([f"left {other}"]):
            del heard[other]
            continue
        beat = store.get(f"beat {other}").decode() if store.check([f"beat {other}"]) else ""
        if beat != last:
            heard[other] = (beat, time.monotonic())
