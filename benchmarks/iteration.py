"""What one iteration of TDM-R1 costs: seconds, share and network evaluations of each part.

Run: ``python benchmarks/iteration.py`` (writes docs/results/iteration.json and iteration.md).
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from pathlib import Path

import torch

from phases import Phases
from tdm_r1.algorithms.tdm_r1 import TDMR1
from tdm_r1.config.load import load_recipe
from tdm_r1.train.run import Run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--recipe", default="mini")
    parser.add_argument("--iterations", type=int, default=10)
    parser.add_argument("--out", type=Path, default=Path("docs/results/iteration.json"))
    args = parser.parse_args()
    config = load_recipe(args.recipe)
    run = Run(config)
    run.step()  # warm-up
    algorithm = run.algorithm
    if not isinstance(algorithm, TDMR1):
        parser.error(f"--recipe {args.recipe}: its algorithm is {config.algorithm}; give a recipe of tdm_r1")
    phases = Phases(algorithm, run.backbone)
    phases.wrap(run.scorer, "each", "reward")
    start = time.perf_counter()
    for _ in range(args.iterations):
        run.step()
    total = (time.perf_counter() - start) / args.iterations
    samples = config.batch.prompts * config.batch.group
    parts = {
        name: {
            "seconds": round(seconds / args.iterations, 4),
            "share": round(seconds / args.iterations / total, 3),
            "forward": round(phases.forward[name] / args.iterations / samples, 2),
            "forward_with_gradient": round(phases.backward[name] / args.iterations / samples, 2),
        }
        for name, seconds in phases.seconds.items()
    }
    result = {
        "recipe": args.recipe,
        "iterations": args.iterations,
        "samples": samples,
        "seconds": round(total, 3),
        "threads": torch.get_num_threads(),
        "processor": platform.processor() or platform.machine(),
        "parts": parts,
    }
    args.out.write_text(json.dumps(result, indent=1))
    args.out.with_suffix(".md").write_text(markdown(result))
    print(args.out.with_suffix(".md").read_text())


def markdown(result: dict) -> str:
    lines = [
        "# One iteration",
        "",
        "Written by `python benchmarks/iteration.py`. Network evaluations are per sample of the rollout.",
        "The reward works beside the decoder, in a thread of its own: its seconds are not added to the others.",
        "",
        f"Recipe `{result['recipe']}`, {result['samples']} samples, {result['seconds']} s an iteration on "
        f"{result['threads']} threads, mean of {result['iterations']} iterations.",
        "",
        "| part | seconds | share | evaluations without gradient | evaluations with gradient |",
        "|---|---|---|---|---|",
    ]
    for name, p in result["parts"].items():
        lines.append(
            f"| {name} | {p['seconds']} | {100 * p['share']:.0f} % | {p['forward']} | {p['forward_with_gradient']} |"
        )
    largest = max(result["parts"], key=lambda n: result["parts"][n]["seconds"])
    lines += ["", f"The next speed-up lies in: {largest}."]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
