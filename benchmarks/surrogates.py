"""The paper's literal surrogate and the anchored one, side by side on equal reward evaluations.

Beside them the anchored one without what the generator carries and, as a control, the same run without any reward,
which is distillation gone on.

Run: ``python benchmarks/surrogates.py`` (writes docs/results/surrogates.json, .md and .png). Runs that are there
already with the same settings are taken as they are.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.console import Console

from tdm_r1.mini.report import completed_run

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {  # recipe, and what is changed in it
    "anchored": ("mini", {}),
    "paper": ("mini_paper", {}),
    "not added": ("mini", {"surrogate.added_delta": 0.0}),
    "no reward": ("mini", {"surrogate.added_delta": 0.0, "balance.scale": 0.0}),
}
DIAGNOSTICS = (
    "surrogate/preference_accuracy",
    "surrogate/distance_from_reference",
    "surrogate/saturation",
    "surrogate/direction_cosine",
    "generator/reward_part",
    "generator/kl_part",
    "generator/reward_scale",
)
SHOWN = ("strict", "soft", "cleanliness", "frechet", "diversity", "edge_width", "ground_noise")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--iterations", type=int, default=None, help="instead of the recipes' own")
    parser.add_argument("--output", type=Path, default=Path("runs"))
    parser.add_argument("--out", type=Path, default=Path("docs/results/surrogates.json"))
    args = parser.parse_args()
    results, histories = {}, {}
    for variant in args.variants:
        recipe, changes = VARIANTS[variant]
        changes = changes | ({"iterations": args.iterations} if args.iterations else {})
        purpose = f"surrogates_{variant.replace(' ', '_')}"
        folder = completed_run(recipe, args.seed, args.output, purpose, Console(), changes)
        record = json.loads((folder / "result.json").read_text())
        rows = [json.loads(r) for r in (folder / "metrics.jsonl").read_text().splitlines()]
        last = rows[-max(len(rows) // 4, 1) :]  # the last quarter
        record["diagnostics"] = {
            name: round(float(np.mean([r[name] for r in last if name in r])), 5)
            for name in DIAGNOSTICS
            if any(name in r for r in last)
        }
        results[variant], histories[variant] = record, rows
    args.out.write_text(json.dumps(results, indent=1))
    args.out.with_suffix(".md").write_text(markdown(results))
    curves(histories, args.out.with_suffix(".png"))
    print(f"Wrote {args.out}, .md and .png")


def command(results: dict) -> str:
    """The command that made ``results``."""
    iterations = next(iter(results.values()))["iterations"]
    variants = " ".join(f'"{name}"' if " " in name else name for name in results)
    return f"python benchmarks/surrogates.py --variants {variants} --iterations {iterations}"


def markdown(results: dict) -> str:
    names = list(results)
    lines = [
        "# The paper's surrogate and the anchored one",
        "",
        f"Written by `{command(results)}`:",
        "one seed, the same prompts, noise and reward evaluations.",
        "Diagnostics are means over the last quarter of the run.",
        "",
        "| | before | " + " | ".join(f"after, {n}" for n in names) + " |",
        "|---|---|" + "---|" * len(names),
    ]
    start = results[names[0]]["before"]
    for metric in SHOWN:
        after = " | ".join(f"{results[n]['after'].get(metric, float('nan')):.3f}" for n in names)
        lines.append(f"| {metric} | {start[metric]:.3f} | {after} |")
    lines.append(
        "| reward evaluations | | " + " | ".join(f"{results[n]['reward_evaluations']:,}" for n in names) + " |"
    )
    lines.append("| iterations | | " + " | ".join(str(results[n]["iterations"]) for n in names) + " |")
    for metric in DIAGNOSTICS:
        values = " | ".join(str(results[n]["diagnostics"].get(metric, "")) for n in names)
        lines.append(f"| {metric} | | {values} |")
    return "\n".join(lines) + "\n"


def curves(histories: dict[str, list[dict]], path: Path) -> None:
    shown = ("eval/strict", "eval/cleanliness", "surrogate/preference_accuracy", "surrogate/distance_from_reference")
    figure = Figure(figsize=(16, 3.2), layout="constrained")
    FigureCanvasAgg(figure)
    for k, name in enumerate(shown):
        axis = figure.add_subplot(1, len(shown), k + 1)
        for variant, rows in histories.items():
            points = [(r["scored"], r[name]) for r in rows if name in r]
            axis.plot(*zip(*points, strict=True), label=variant, linewidth=1)
        axis.set_title(name)
        axis.set_xlabel("scored images")
        axis.legend()
    figure.savefig(path, dpi=80)


if __name__ == "__main__":
    main()
