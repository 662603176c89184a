"""Several processes: what two make of one's work here, and a model of the real recipes on 1, 8 and 64 GPUs.

Run: ``python benchmarks/scaling.py`` (writes docs/results/scaling.json and .md). Needs no GPU and no hub. The first
part takes about five minutes: the recipe `mini`, the same batch by one process and by two, in turn, one thread each.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from itertools import pairwise
from pathlib import Path

from rich.progress import track

from tdm_r1.algorithms.tdm import fake_roles
from tdm_r1.config.load import load_recipe
from tdm_r1.config.recipes import recipe_names
from tdm_r1.config.run import RunConfig
from tdm_r1.models.architectures import architecture_of
from tdm_r1.models.specification import Role
from tdm_r1.train.estimate import Estimate, estimate

GPUS = (1, 8, 64)
PER_NODE = 8
# Bytes a second of one GPU: half of what the makers state
INSIDE_A_NODE = 225e9  # an H100's NVLink: 450e9 each way
BETWEEN_NODES = 25e9  # 400 Gb/s InfiniBand for each GPU: 50e9
LATENCY = 50e-6  # seconds of one exchange
ITERATIONS = 6  # of a measured run, the first of which does not count
REPETITIONS = 3


# ------------------------------------------------------------------------------------------ measured


def measured() -> list[dict]:
    """Median seconds of an iteration of the recipe `mini` by one process and by two."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for number in range(REPETITIONS):
            for processes in (1, 2):
                rows.append({"processes": processes, "seconds": seconds(processes, Path(folder), str(number))})
                print(rows[-1])
    return rows


def seconds(processes: int, folder: Path, name: str) -> float:
    """Median over a run's iterations but the first."""
    name = f"{processes}_{name}"
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    settings = [f"--iterations={ITERATIONS}", "--evaluation.prompts=8", f"--output={folder}", f"--name={name}"]
    command = [sys.executable, *torchrun, "-m", "tdm_r1", "train", "mini", *settings]
    subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=True, capture_output=True)
    rows = [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]
    times = [row["seconds"] for row in rows if "seconds/rollout" in row]
    return round(statistics.median(b - a for a, b in pairwise(times)), 3)


# ------------------------------------------------------------------------------------------ modelled


def updates(config: RunConfig) -> dict[str, int]:
    """Updates of each trained role in an iteration."""
    found: dict[str, int] = {Role.GENERATOR: 1}
    if config.algorithm == "tdm_r1_release":
        return found | {Role.FAKE: 1, Role.SURROGATE: 1}
    found |= dict.fromkeys(fake_roles(config.tdm), config.tdm.fake_steps)
    return found | ({Role.SURROGATE: config.surrogate.draws} if config.algorithm == "tdm_r1" else {})


def communication(config: RunConfig, found: Estimate, gpus: int) -> float:
    """Seconds of an iteration's exchanges: each update's gradients by a ring, the trajectories to every GPU."""
    if gpus == 1:
        return 0.0
    speed = INSIDE_A_NODE if gpus <= PER_NODE else BETWEEN_NODES
    share, changed = (gpus - 1) / gpus, updates(config)
    gradients = found.held["gradients"]  # of the largest role, or of all where they wait for one update
    total = gradients * (1 if config.algorithm == "tdm_r1_release" else sum(changed.values()))
    moved = 2 * share * total + share * found.held["prompts and trajectories"]
    return moved / speed + LATENCY * 2 * (sum(changed.values()) + 2)


def modelled() -> list[dict]:
    rows = []
    for name in track([n for n in recipe_names() if architecture_of(load_recipe(n).model.path)], "estimating"):
        config = load_recipe(name)
        found = estimate(config)
        assert found is not None  # its architecture is known
        samples = config.batch.prompts * config.batch.group
        row = {"recipe": name, "samples": samples, "iterations": config.iterations}
        for gpus in GPUS:
            most = -(-samples // gpus)  # of the GPU that has most
            compute = found.seconds() * most / samples
            exchange = communication(config, found, gpus)
            row[f"on {gpus}"] = {
                "samples": most,
                "compute": round(compute, 2),
                "communication": round(exchange, 3),
                "hours": round((compute + exchange) * config.iterations / 3600, 1),
            }
        rows.append(row)
    return rows


def markdown(found: dict) -> str:
    one, two = (statistics.median(r["seconds"] for r in found["measured"] if r["processes"] == n) for n in (1, 2))
    lines = [
        "# Several processes",
        "",
        "Written by `python benchmarks/scaling.py`. What is shared and exchanged is in [scaling.md](../scaling.md).",
        "",
        "## Measured",
        "",
        "The recipe `mini`, 128 samples an iteration, on two CPU cores with one thread a process; the median of",
        f"{REPETITIONS} runs in turn of each kind.",
        "",
        "| processes | seconds an iteration | samples a second |",
        "|---|---|---|",
        *(f"| {n} | {s:.2f} | {128 / s:.1f} |" for n, s in ((1, one), (2, two))),
        "",
        f"Two processes make {one / two:.2f} times the samples of one in a second.",
        "",
        "## Modelled",
        "",
        "Hours of every recipe for real models: arithmetic, not measurement. Computation is that of",
        "[recipe_needs.md](recipe_needs.md), of the GPU that has most samples. Communication: the gradients of every",
        "update by a ring, and the trajectories to every GPU, at half of the makers' figures for H100s "
        f"({INSIDE_A_NODE / 1e9:.0f} GB/s",
        f"inside a node of {PER_NODE}, {BETWEEN_NODES / 1e9:.0f} GB/s between nodes, for each GPU). Left out: rewards, "
        "text encoders, evaluations, the exchange of",
        "scores and metrics, and that a GPU with few samples reaches a smaller share of its peak.",
        "",
        "| recipe | samples | iterations | "
        + " | ".join(f"hours on {n} | of it exchange" for n in GPUS[1:])
        + " | hours on 1 |",
        "|---|---|---|" + "---|---|" * len(GPUS[1:]) + "---|",
    ]
    for r in found["modelled"]:
        cells = []
        for n in GPUS[1:]:
            own = r[f"on {n}"]
            share = own["communication"] / (own["compute"] + own["communication"])
            cells += [f"{own['hours']:.1f}", f"{100 * share:.1f} %"]
        lines.append(
            f"| {r['recipe']} | {r['samples']} | {r['iterations']} | {' | '.join(cells)} | {r['on 1']['hours']:.0f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("docs/results/scaling.json"))
    parser.add_argument("--modelled-alone", action="store_true", help="keep the file's measurements")
    args = parser.parse_args()
    kept = json.loads(args.out.read_text())["measured"] if args.modelled_alone else None
    found = {"measured": kept or measured(), "modelled": modelled()}
    args.out.write_text(json.dumps(found, indent=1))
    args.out.with_suffix(".md").write_text(markdown(found))
    print(args.out.with_suffix(".md").read_text())


if __name__ == "__main__":
    main()
