"""How far runs on the mini model got before a held-out metric fell: every evaluation of each run, and the curves.

Run: ``python benchmarks/frontier.py "LABEL=runs/FOLDER" ...`` (writes docs/results/frontier.json, .md and .png). The
noise floors are those of docs/results/mini.json. Runs with evaluations at the same prompts and noise alone compare.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from tdm_r1.mini.report import better

HELD_OUT = ("frechet", "diversity", "cleanliness", "edge_width", "ground_noise")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", help="LABEL=FOLDER; none: draw page and curves anew from the JSON file")
    parser.add_argument("--floors", type=Path, default=Path("docs/results/mini.json"))
    parser.add_argument("--out", type=Path, default=Path("docs/results/frontier.json"))
    args = parser.parse_args()
    results = json.loads(args.out.read_text()) if args.out.exists() else {}
    for entry in args.runs:
        label, _, folder = entry.partition("=")
        if not (Path(folder) / "metrics.jsonl").is_file() or not folder:
            parser.error(f"{entry!r}: no run lies at {folder!r}; give LABEL=FOLDER of a run")
        results[label] = evaluations(Path(folder))
    floors = json.loads(args.floors.read_text())["noise_floor"]
    args.out.write_text(json.dumps(results, indent=1))
    args.out.with_suffix(".md").write_text(markdown(results, floors))
    curves(results, floors, args.out.with_suffix(".png"))
    print(args.out.with_suffix(".md").read_text())


def evaluations(folder: Path) -> list[dict[str, float]]:
    """What the run's evaluations found, the one before training first."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    names = ("strict", *HELD_OUT)
    return [
        {"iteration": r["iteration"], "scored": r["scored"], **{n: round(r[f"eval/{n}"], 4) for n in names}}
        for r in rows
        if "eval/strict" in r
    ]


def worse(row: dict, start: dict, floors: dict[str, float]) -> list[str]:
    """The held-out metrics that are worse than at the start by more than their noise floor."""
    sign = {"up": 1, "down": -1}
    return [n for n in HELD_OUT if sign[better(n)] * (row[n] - start[n]) < -floors[n]]


def markdown(results: dict[str, list[dict]], floors: dict[str, float]) -> str:
    lines = [
        "# How far runs got with the held-out metrics kept",
        "",
        "Written by `python benchmarks/frontier.py LABEL=RUN ...` from evaluations of runs on the mini model; labels",
        "say what differs from recipe `mini` as it was then (one fake score, scale 7, the generator averaged at .95,",
        "120 iterations). The last column names what is worse than at the start by more than its noise floor",
        "(`docs/results/mini.json`).",
        "",
        "![strict against Frechet distance and diversity](frontier.png)",
        "",
        "| run | iteration | scored | strict | frechet | diversity | worse than at the start |",
        "|---|---|---|---|---|---|---|",
    ]
    for label, rows in results.items():
        for row in rows:
            cells = " | ".join(f"{row[n]:.3f}" for n in ("strict", "frechet", "diversity"))
            lost = ", ".join(worse(row, rows[0], floors))
            lines.append(f"| {label} | {row['iteration']} | {row['scored']:,} | {cells} | {lost} |")
    return "\n".join(lines) + "\n"


def curves(results: dict[str, list[dict]], floors: dict[str, float], path: Path) -> None:
    """Strict against the two held-out metrics that bind; a run that falls below its start leaves the picture."""
    colours = [colormaps["tab20"](i % 20) for i in range(len(results))]
    figure = Figure(figsize=(12, 6), layout="constrained")
    FigureCanvasAgg(figure)
    for k, metric in enumerate(("frechet", "diversity")):
        axis = figure.add_subplot(1, 2, k + 1)
        for (label, rows), colour in zip(results.items(), colours, strict=True):
            shown = [r for r in rows if r["strict"] >= rows[0]["strict"]]
            points = [r["strict"] for r in shown], [r[metric] for r in shown]
            axis.plot(*points, marker=".", linewidth=1, label=label, color=colour)
        start = next(iter(results.values()))[0][metric]
        axis.axhline(start + floors[metric] * (1 if better(metric) == "down" else -1), color="grey", linestyle=":")
        axis.set_xlabel("strict")
        axis.set_ylabel(metric)
    figure.legend(*axis.get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=8)
    figure.savefig(path, dpi=80)


if __name__ == "__main__":
    main()
