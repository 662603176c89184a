"""Ends a run of several processes soon after one of them has died or has been frozen, and says which."""

from __future__ import annotations

import math
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import partial

import torch.distributed as dist

from ..core import processes

INTERVAL = 2.0  # seconds between two beats
LIMIT = 20.0  # seconds without one, after which a process is given up; torchrun then takes 30 to end a frozen one
LEAVING = 20.0  # seconds that a process waits for the others at its end: the first may have a checkpoint to write


@contextmanager
def heartbeat(*, interval: float = INTERVAL, limit: float = LIMIT) -> Iterator[None]:
    """Beats in the background while the block runs, and listens: the first process to all others, they to the first.

    When a process is silent for ``limit`` seconds it is named on stderr, and this one ends with code 1, for it may wait
    for that one in an exchange that no exception reaches. The launcher then ends the rest.
    """
    rank, store, hosts = processes.rank(), _store(), processes.gather_each(socket.gethostname())
    heard = dict.fromkeys([0] if rank else range(1, len(hosts)), time.monotonic())
    done = threading.Event()
    for work in (partial(_beat, store, heard, done, interval), partial(_watch, hosts, heard, done, interval, limit)):
        threading.Thread(target=work, daemon=True).start()  # a frozen process may keep the first from ever ending
    try:
        yield
    finally:
        done.set()
        with suppress(dist.DistError):  # the process that serves the store may have ended
            store.set(f"left {rank}", "")  # all leave together: the launcher ends the others when one has failed
            store.wait([f"left {other}" for other in range(len(hosts))], timedelta(seconds=LEAVING))


def _store() -> dist.TCPStore:
    """A store of the beats' own, which the first process serves."""
    host, port = os.environ.get("MASTER_ADDR", "localhost"), [0]
    if processes.rank() == 0:
        store = dist.TCPStore(host, 0, is_master=True, wait_for_workers=False)
        port = [store.port]
    dist.broadcast_object_list(port, src=0)
    if processes.rank():
        store = dist.TCPStore(host, port[0], is_master=False, wait_for_workers=False)
    return store


def _beat(store: dist.TCPStore, heard: dict[int, float], done: threading.Event, interval: float) -> None:
    """Beats, and notes when the others were last heard; of those that have left nothing more is expected."""
    last: dict[int, bytes] = {}
    while not done.wait(interval):
        try:
            store.set(f"beat {processes.rank()}", str(time.time()))
            for other in list(heard):
                if store.check([f"left {other}"]):
                    del heard[other]
                elif store.check([f"beat {other}"]) and (beat := store.get(f"beat {other}")) != last.get(other):
                    heard[other], last[other] = time.monotonic(), beat
        except dist.DistError:  # the first process serves the store
            heard[0] = -math.inf
            return


def _watch(hosts: Sequence[str], heard: dict[int, float], done: threading.Event, interval: float, limit: float) -> None:
    """Ends this process when another was not heard for too long."""

    def silent_now() -> list[int]:
        return [other for other, when in list(heard.items()) if time.monotonic() - when > limit]

    while not done.wait(interval):
        # looked at twice: this process may itself have been frozen, and the others' leaving comes before one's own
        if silent_now() and not done.wait(2 * interval) and (silent := silent_now()):
            print(
                f"tdm-r1: process {silent[0]} of {len(hosts)}, on {hosts[silent[0]]}, no longer answers; process "
                f"{processes.rank()} ends. Start the run again with --resume",
                file=sys.stderr,
                flush=True,
            )
            os._exit(1)
