"""The study as a page: a table as in the paper's Table 2, curves as in its Fig. 4, 8 and 9, a grid as in Fig. 5."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..evaluate import pictures
from ..files import whole_file, write_text
from .report import better
from .study_rows import Row
from .study_search import ALL

TRAINED = {"mini": "strict", "mini_signs": "reward"}
HELD_OUT = {
    "mini": ("soft", "cleanliness", "frechet", "diversity", "edge_width", "ground_noise"),
    "mini_signs": ("read", "frechet", "diversity", "blur", "ground_noise", "mini/strict", "mini/frechet"),
}
PARTS = {
    "methods": "Methods",
    "ablations": "This project's choices, one at a time",
    "release": "The release's choices, one at a time",
    "rewards": "Rewards that nobody tuned on",
    "batch": "Small and large batches",
    "search": "The search of each method's settings",
}
INTRODUCTIONS = {  # before a part's table
    "release": [
        "From `mini_release`, on half of the images; its own figures there are those of the row `release: lr 0.0001,",
        "surrogate 0.0003, beta 1.0` of the search.",
        "",
    ],
    "rewards": [
        "The recipe unchanged. The first figure in the column reward is the start's, on the noise of the run's own",
        "evaluations. What such a reward costs in held-out metrics even if it is followed exactly is in",
        "[reward_tilt_jpeg.md](../reward_tilt_jpeg.md), [reward_tilt_size.md](../reward_tilt_size.md)",
        "and [reward_tilt_count.md](../reward_tilt_count.md).",
        "",
    ],
    "batch": [
        "On 2.4 times the images, with this project's recipe as it was when it was searched.",
        "",
    ],
    "search": [
        "One seed each. The rivals have scored half of the images, this project's rows four thirds of them, and those",
        "stand for the recipe as it was when it was searched.",
        "",
    ],
}
Record = dict[str, Any]


def write_page(results: Path, world: str, stale: Collection[str] = ()) -> Path:
    """Writes `WORLD.md`, its curves and its grid from the records that there are; returns the page.

    Args:
        stale: rows whose records are of earlier settings, to be marked.
    """
    records = read(results / world)
    page = results / f"{world}.md"
    write_text(page, markdown(records, world, stale))
    curves(records, world, results / f"{world}_curves.png")
    grid(results / world, records, results / f"{world}_grid.png")
    return page


def read(folder: Path) -> dict[str, list[Record]]:
    """Records by row, in the order of `ALL`, seeds in order."""
    found: dict[str, list[Record]] = defaultdict(list)
    for path in sorted(folder.glob("*.json")):
        record = json.loads(path.read_text())
        found[record["row"]].append(record)
    return {row.name: sorted(found[row.name], key=lambda r: r["seed"]) for row in ALL if row.name in found}


def markdown(records: dict[str, list[Record]], world: str, stale: Collection[str]) -> str:
    lines = [
        f"# The study on {world}",
        "",
        f"Written by `tdm-r1 study {world}` from the records in [{world}]({world}); not edited by hand. Among",
        "the methods every one that learns has scored the same number of images. Each figure is the mean over the",
        "seeds and two draws of evaluation noise, with the standard deviation over seeds where there are several;",
        "arrows say which way is better. A pass is one of the network over one image; a backward pass counts as two.",
        "NFE: passes for an image when the model is used. Minutes do not compare: machines (CPU or GPU, as the records",
        "say), threads and what ran beside differ. Rows with † are of earlier settings (in their records) and have not",
        "been run again.",
        "",
        "Lines are means over the seeds, bands their range:",
        "",
        f"![curves]({world}_curves.png)",
        "",
        "The same noise and prompts, a row for each method:",
        "",
        f"![pictures]({world}_grid.png)",
    ]
    for part, title in PARTS.items():
        rows = [row for row in ALL if row.group == part and row.name in records]
        if rows:
            lines += ["", f"## {title}", "", *INTRODUCTIONS.get(part, ()), *table(rows, records, world, part, stale)]
    return "\n".join(lines) + "\n"


def table(
    rows: Sequence[Row], records: dict[str, list[Record]], world: str, part: str, stale: Collection[str]
) -> list[str]:
    metrics = (*(("reward",) if part == "rewards" else ()), TRAINED[world], *HELD_OUT[world])
    arrows = {"up": "↑", "down": "↓", "": ""}
    heads = [f"{name} {arrows[better(name)]}".strip() for name in metrics]
    lines = [
        "| row | method | seeds | " + " | ".join(heads) + " | NFE | scored | million passes | minutes |",
        "|---|---|---|" + "---|" * (len(metrics) + 4),
    ]
    for row in rows:
        own = records[row.name]
        seeds = ", ".join(str(r["seed"]) for r in own)
        name = row.name + (" †" if row.name in stale else "")
        cells = [cell([np.mean([draw[m] for draw in r["end"]]) for r in own if m in r["end"][0]]) for m in metrics]
        if part == "rewards":
            cells[0] = f"{np.mean([r['curve'][0]['reward'] for r in own]):.3f}, {cells[0]}"
        lines.append(
            f"| {name} | {row.what} | {seeds} | {' | '.join(cells)} | {own[0]['network_evaluations']} | "
            f"{mean_of(own, 'scored'):,.0f} | {mean_of(own, 'passes') / 1e6:.2f} | {mean_of(own, 'seconds') / 60:.1f} |"
        )
    return lines


def mean_of(records: Sequence[Record], name: str) -> float:
    return float(np.mean([r.get(name, 0) for r in records]))


def cell(values: Sequence[Any]) -> str:
    if not values:
        return ""
    spread = f" ± {np.std(values, ddof=1):.3f}" if len(values) > 1 else ""
    return f"{np.mean(values):.3f}{spread}"


def curves(records: dict[str, list[Record]], world: str, path: Path) -> None:
    """Trained metric and Frechet distance over scored images, passes and minutes: mean and range over the seeds.

    Not of rows that go on from another's run.
    """
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = [row for row in ALL if row.group == "methods" and row.after is None]
    rows = [row for row in rows if any("curve" in r for r in records.get(row.name, ()))]
    if not rows:
        return
    figure = Figure(figsize=(15, 8), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, 3)
    for k, row in enumerate(rows):
        own = [r for r in records[row.name] if "curve" in r]
        across = {
            "scored images": [[p["scored"] for p in r["curve"]] for r in own],
            "million passes": [[p["iteration"] * r["passes"] / r["iterations"] / 1e6 for p in r["curve"]] for r in own],
            "minutes": [[p["seconds"] / 60 for p in r["curve"]] for r in own],
        }
        for i, metric in enumerate((TRAINED[world], "frechet")):
            values = np.array([[p[metric] for p in r["curve"]] for r in own])
            for axis, (label, xs) in zip(axes[i], across.items(), strict=True):
                x, color = np.mean(xs, axis=0), "black" if row.name == "tdm-r1" else colormaps["tab20"](k)
                axis.fill_between(x, values.min(0), values.max(0), color=color, alpha=0.15, linewidth=0)
                axis.plot(x, values.mean(0), label=row.name, color=color, linewidth=1.4, marker=".")
                axis.set(xlabel=label, ylabel=metric, yscale="log" if metric == "frechet" else "linear")
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=6)
    with whole_file(path) as partial:
        figure.savefig(partial, format="png", dpi=80)


def grid(folder: Path, records: dict[str, list[Record]], path: Path) -> None:
    """The strips of the first seed of every method, one below the other."""
    rows = [(row, records[row.name][0]) for row in ALL if row.group == "methods" and row.name in records]
    found = [(row, folder / f"{row.file(record['seed'])}.png") for row, record in rows]
    strips = [(row.name, pictures.of_strip(Image.open(strip))) for row, strip in found if strip.exists()]
    if strips:
        pictures.save_png(pictures.grid(strips, rows[0][1]["pictures"]), path)
