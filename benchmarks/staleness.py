"""What scoring while training saves: seconds of an iteration with a reward that takes its time, fresh and one stale.

Run: ``python benchmarks/staleness.py`` (writes docs/results/staleness.json and .md; about three minutes on two cores).
What it costs in learning is the row `stale` of ``tdm-r1 study mini``.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from tdm_r1.config.load import load_recipe
from tdm_r1.train.run import Run

ITERATIONS = 5  # of a run, the first of which does not count
SHARES = (0.0, 0.5, 1.0, 2.0)  # of the seconds of everything else in an iteration, that the reward takes
SMALL = {"batch.prompts": 4, "batch.group": 8, "batch.micro_batch": 32}


def seconds(staleness: int, wait: float, folder: Path) -> float:
    """Mean seconds of an iteration, with a reward that waits as for a server."""

    def reward(images: np.ndarray, prompts: list[str], metadata: list[dict[str, Any]]) -> np.ndarray:
        time.sleep(wait)
        return images.mean((1, 2, 3))

    changes = SMALL | {
        "scoring.staleness": staleness,
        "iterations": ITERATIONS + 1,
        "save_every": 100,
        "output": folder,
    }
    run = Run(load_recipe("mini").override(changes), reward=reward)
    run.step()
    start = time.perf_counter()
    for _ in range(ITERATIONS - 1):
        run.step()
    took = (time.perf_counter() - start) / (ITERATIONS - 1)
    run.close()
    return took


def measured() -> list[dict[str, float]]:
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        rest = seconds(0, 0.0, Path(folder))
        for share in SHARES:
            fresh, stale = (seconds(staleness, share * rest, Path(folder)) for staleness in (0, 1))
            rows.append({"reward": round(share * rest, 2), "fresh": round(fresh, 2), "stale": round(stale, 2)})
            print(rows[-1])
    return rows


def markdown(rows: list[dict[str, float]]) -> str:
    lines = [
        "# Scoring while training",
        "",
        "Written by `python benchmarks/staleness.py`. Seconds of an iteration of `mini` on "
        f"{SMALL['batch.prompts']} x {SMALL['batch.group']} samples, mean of {ITERATIONS - 1},",
        "with a reward that waits as for a server. What the older samples cost in learning is the row `stale` of",
        "[study/mini.md](study/mini.md).",
        "",
        "| the reward takes | `scoring.staleness 0` | `scoring.staleness 1` | ratio |",
        "|---|---|---|---|",
    ]
    for row in rows:
        ratio = row["stale"] / row["fresh"]
        lines.append(f"| {row['reward']:.2f} | {row['fresh']:.2f} | {row['stale']:.2f} | {ratio:.2f} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("docs/results/staleness.json"))
    args = parser.parse_args()
    rows = measured()
    args.out.write_text(json.dumps(rows, indent=1))
    args.out.with_suffix(".md").write_text(markdown(rows))
    print(markdown(rows))


if __name__ == "__main__":
    main()
