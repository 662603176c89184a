"""A run that is stopped again and again, at random moments, against one that is left alone.

Run: ``python benchmarks/kills.py [--by SIGKILL] [--kills 50] [--processes 1]`` (writes docs/results/kills.json, .md).
The recipe `mini` on small batches that saves after each iteration, evaluates after every third, and goes on with
--resume each time. It is stopped by SIGKILL, by a disk that is filled (one in memory; for root on Linux), or by a limit
on its memory, which is set while it runs (Linux). Equal means: every weight and optimizer state of the last checkpoint
to the last bit, and every row of the log but for times.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil  # type: ignore[import-untyped]
import torch

from tdm_r1.train.checkpoint import load_state
from tdm_r1.train.folder import RunFolder, iteration_of

Stop = Callable[[subprocess.Popen[bytes], Path], None]
SETTINGS = (
    "--batch.prompts=2",
    "--batch.group=3",
    "--batch.micro-batch=6",
    "--evaluation.prompts=4",
    "--evaluation.images-per-prompt=2",
    "--evaluation.every=3",
    "--save-every=1",
)
STARTUP = 0.2  # share of the kills that come while the process starts
LONGEST = 1.5  # seconds after a process's first checkpoint until it is killed


def command(folder: Path, name: str, iterations: int, processes: int) -> list[str]:
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"] if processes > 1 else []
    train = ["-m", "tdm_r1", "train", "mini", *SETTINGS, f"--iterations={iterations}"]
    return [sys.executable, *launcher, *train, f"--output={folder}", f"--name={name}"]


def start(folder: Path, name: str, iterations: int, processes: int) -> subprocess.Popen[bytes]:
    """The run, from its last checkpoint if it has one."""
    more = ["--resume"] if RunFolder(folder / name).checkpoints() else []
    return subprocess.Popen(
        [*command(folder, name, iterations, processes), *more],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def stop_again_and_again(
    folder: Path, iterations: int, kills: int, processes: int, rng: random.Random, stop: Stop
) -> list[str]:
    """Stops the run ``kills`` times, then lets it end. Returns what each was doing: starting or working."""
    done: list[str] = []
    while len(done) < kills:
        run = start(folder, "killed", iterations, processes)
        before = saved(folder / "killed")
        if rng.random() < STARTUP:
            doing = "starting"
            time.sleep(rng.uniform(0, 8))
        else:
            doing = "working"
            while run.poll() is None and saved(folder / "killed") == before:
                time.sleep(0.02)
            time.sleep(rng.uniform(0, LONGEST))
        if run.poll() is not None:
            raise RuntimeError(f"the run ended with code {run.returncode} after {len(done)} stops")
        stop(run, folder)
        done.append(doing)
        print(f"{len(done)} stops, iteration {saved(folder / 'killed')}", flush=True)
    if code := start(folder, "killed", iterations, processes).wait():
        raise RuntimeError(f"the run ended with code {code} after all stops")
    return done


def kill(run: subprocess.Popen[bytes], folder: Path) -> None:
    """The process and all that it has started: a launcher's workers have groups of their own."""
    everyone = [psutil.Process(run.pid), *psutil.Process(run.pid).children(recursive=True)]
    for process in everyone:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    run.wait()
    psutil.wait_procs(everyone[1:], timeout=30)


def fill_disk(run: subprocess.Popen[bytes], folder: Path) -> None:
    """Leaves no space until the run has ended with an error."""
    filler = folder / "filler"
    while run.poll() is None:
        with suppress(OSError), filler.open("ab", buffering=0) as file:
            while True:
                file.write(bytes(1 << 12))
        time.sleep(0.05)
    filler.unlink()
    if run.returncode != 2:
        raise RuntimeError(f"a full disk ended the run with code {run.returncode}, not 2")


def limit_memory(run: subprocess.Popen[bytes], folder: Path) -> None:
    """Allows the run no more address space than it has, until that has ended it."""
    process = psutil.Process(run.pid)
    with suppress(psutil.NoSuchProcess):
        now = process.memory_info().vms
        process.rlimit(psutil.RLIMIT_AS, (now, now))
    if not run.wait(timeout=600):
        raise RuntimeError("the run came to its end in spite of the limit")


STOPS: dict[str, Stop] = {"SIGKILL": kill, "full-disk": fill_disk, "no-memory": limit_memory}


@contextmanager
def place_of_runs(by: str) -> Iterator[Path]:
    """A temporary folder; a disk of its own where it is to be filled."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        if by != "full-disk":
            yield folder
            return
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=500m", "tmpfs", place], check=True)
        try:
            yield folder
        finally:
            subprocess.run(["umount", place], check=True)


def saved(run: Path) -> int:
    """The iteration of the last checkpoint; 0 if there is none."""
    return max(map(iteration_of, RunFolder(run).checkpoints()), default=0)


def differences(folder: Path, iterations: int) -> list[str]:
    """Names of what is not equal in the two runs."""
    states = [load_state(RunFolder(folder / name).checkpoint(iterations)) for name in ("whole", "killed")]
    found = [name for name, a, b in leaves(*states) if not equal(a, b) and name != "/seconds"]
    logs = [RunFolder(folder / name).history() for name in ("whole", "killed")]
    if len(logs[0]) != len(logs[1]):
        return [*found, f"{len(logs[0])} and {len(logs[1])} rows of the log"]
    for a, b in zip(*logs, strict=True):
        found += [
            f"log, iteration {a['iteration']}: {name}"
            for name in a.keys() | b.keys()
            if "second" not in name and not equal(a.get(name), b.get(name))
        ]
    return found


def leaves(a: object, b: object, name: str = ""):
    """Every value of two equal trees, with its name."""
    if isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
        for key in a:
            yield from leaves(a[key], b[key], f"{name}/{key}")
    elif isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            yield from leaves(x, y, f"{name}/{i}")
    else:
        yield name, a, b


def equal(a: object, b: object) -> bool:
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return torch.equal(a, b)
    return a == b or (a != a and b != b)  # NaN is equal to NaN here


def markdown(rows: list[dict]) -> str:
    lines = [
        "# Stopped runs",
        "",
        "Written by `python benchmarks/kills.py`. A run is stopped at random moments and goes on with `--resume`; its",
        "last checkpoint and its log are compared with those of a run that was left alone, to the last bit.",
        "",
        "| stopped by | processes | iterations | while working | while starting | different at the end |",
        "|---|---|---|---|---|---|",
    ]
    for r in rows:
        working, starting = (r["kills"].count(what) for what in ("working", "starting"))
        different = ", ".join(r["different"]) or "nothing"
        lines.append(f"| {r['by']} | {r['processes']} | {r['iterations']} | {working} | {starting} | {different} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--by", choices=list(STOPS), default="SIGKILL")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--iterations", type=int, default=300, help="of the run; more than the kills leave undone")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("docs/results/kills.json"))
    args = parser.parse_args()
    with place_of_runs(args.by) as folder:
        if code := start(folder, "whole", args.iterations, args.processes).wait():
            raise SystemExit(f"the run that is left alone ended with code {code}")
        rng = random.Random(args.seed)
        kills = stop_again_and_again(folder, args.iterations, args.kills, args.processes, rng, STOPS[args.by])
        row = {"by": args.by, "processes": args.processes, "iterations": args.iterations, "kills": kills}
        row["different"] = differences(folder, args.iterations)
        row["different"] += [f"left over: {path.name}" for path in (folder / "killed").rglob("*.partial")]
    rows = json.loads(args.out.read_text()) if args.out.exists() else []
    same = (args.by, args.processes)
    rows = [r for r in rows if (r["by"], r["processes"]) != same] + [row]
    rows.sort(key=lambda r: (list(STOPS).index(r["by"]), r["processes"]))
    args.out.write_text(json.dumps(rows, indent=1))
    args.out.with_suffix(".md").write_text(markdown(rows))
    print(args.out.with_suffix(".md").read_text())


if __name__ == "__main__":
    main()
