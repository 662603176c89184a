"""GPU memory and time of the recipes for real models, by arithmetic (`tdm_r1.train.estimate`).

Run: ``python benchmarks/recipe_needs.py`` (writes docs/results/recipe_needs.json and .md). Needs no GPU and no hub.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from rich.progress import track

from tdm_r1.config.load import load_recipe
from tdm_r1.config.recipes import recipe_names
from tdm_r1.models.architectures import architecture_of
from tdm_r1.train.estimate import GPU_FLOPS, estimate


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("docs/results/recipe_needs.json"))
    args = parser.parse_args()
    rows = []
    for name in track([n for n in recipe_names() if architecture_of(load_recipe(n).model.path)], "estimating"):
        config = load_recipe(name)
        found = estimate(config)
        least = estimate(config.override({"model.gradient_checkpointing": True}))
        assert found is not None  # its architecture is known
        assert least is not None
        rows.append(
            {
                "recipe": name,
                "samples": config.batch.prompts * config.batch.group,
                "micro_batch": config.batch.micro_batch,
                "iterations": config.iterations,
                "recomputed": found.recomputed,
                "peak_gib": round(found.peak / 2**30, 1),
                "least_gib": round(least.peak / 2**30, 1),
                "held_gib": {k: round(v / 2**30, 2) for k, v in found.held.items()},
                "working_gib": {k: round(v / 2**30, 2) for k, v in found.working.items()},
                "petaflops": {k: round(v / 1e15, 2) for k, v in found.flops.items()},
                "seconds_1_gpu": round(found.seconds(), 1),
                "seconds_8_gpus": round(found.seconds(8), 1),
            }
        )
    args.out.write_text(json.dumps(rows, indent=1))
    args.out.with_suffix(".md").write_text(markdown(rows))
    print(args.out.with_suffix(".md").read_text())


def markdown(rows: list[dict]) -> str:
    lines = [
        "# What the recipes for real models need",
        "",
        "Written by `python benchmarks/recipe_needs.py`: arithmetic, not measurement. Memory is what tensors take at",
        "the worst moment (an allocator wastes some more), checked against real passes of small models of the same",
        "classes (tests/test_estimate.py) and an iteration at full size on a GPU ([gpu_iteration](gpu_iteration.md)).",
        f"Time takes the share of an H100's {GPU_FLOPS / 1e12:.0f} TFLOP/s in bfloat16 that was measured there, and "
        "leaves out rewards,",
        "text encoders at work and evaluations. The column for 8 leaves out their exchanges",
        "([scaling.md](scaling.md)).",
        "Where 80 GB hold the activations they are kept (`model.gradient_checkpointing auto`); the least memory is",
        "that with checkpointing.",
        "",
        "| recipe | samples | micro-batch | GiB on 80 GB | GiB at least | PFLOP an iteration | s on 1 x 80 GB | "
        "s on 8 x 80 GB | iterations | hours on 1 |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        hours = r["iterations"] * r["seconds_1_gpu"] / 3600
        lines.append(
            f"| {r['recipe']} | {r['samples']} | {r['micro_batch']} | {r['peak_gib']} | {r['least_gib']} | "
            f"{sum(r['petaflops'].values()):.1f} | {r['seconds_1_gpu']} | {r['seconds_8_gpus']} | {r['iterations']} | "
            f"{hours:.0f} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
