"""What tells runs that leave the manifold from those that stay: sizes of the generator's two parts, and their angle.

For each finished or broken run of TDM-R1 on a mini model: the reward's and the KL's part over the normaliser in the ten
iterations before its last evaluation, the cosine between them, how much of the reward's part opposes the KL part
(size times negative cosine, what `balance.limit` bounds), and the Frechet distance at the start and in that evaluation.

Run: ``python benchmarks/opposition.py runs/A runs/B ...`` (writes docs/results/opposition.json and opposition.md).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

BEFORE = 10  # iterations


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="folders with a metrics.jsonl")
    parser.add_argument("--out", type=Path, default=Path("docs/results/opposition.json"))
    args = parser.parse_args()
    rows = sorted((measured(folder) for folder in args.runs), key=lambda row: row["opposed"])
    args.out.write_text(json.dumps(rows, indent=1))
    args.out.with_suffix(".md").write_text(markdown(rows))
    print(markdown(rows))


def measured(folder: Path) -> dict[str, Any]:
    """One run's row."""
    log = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    evaluated = [row for row in log if "eval/frechet" in row]
    last = evaluated[-1]["iteration"]
    before = [row for row in log if last - BEFORE < row["iteration"] <= last and "generator/reward_part" in row]
    size, kl, cosine = (
        float(np.mean([row[f"generator/{name}"] for row in before]))
        for name in ("reward_part", "kl_part", "kl_reward_cosine")
    )
    numbers = {"reward_part": size, "kl_part": kl, "cosine": cosine, "opposed": -size * cosine}
    numbers |= {
        f"frechet_{when}": row["eval/frechet"] for when, row in (("start", evaluated[0]), ("end", evaluated[-1]))
    }
    names = {"run": folder.name, "world": folder.parent.name, "iteration": last}
    return names | {name: round(v, 3) for name, v in numbers.items()}


def markdown(rows: list[dict[str, Any]]) -> str:
    lines = [
        "# What tells runs that leave the manifold from those that stay",
        "",
        "Written by `python benchmarks/opposition.py RUNS`; in the order of how much of the reward's part opposes the",
        f"KL part. Means over the {BEFORE} iterations before each run's last evaluation.",
        "",
        "| " + " | ".join(name.replace("_", " ") for name in rows[0]) + " |",
        "|" + "---|" * len(rows[0]),
        *("| " + " | ".join(str(value) for value in row.values()) + " |" for row in rows),
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
