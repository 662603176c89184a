"""Speed before and after: how near an iteration comes to the bare transformer, the demo's minutes, the score against
minutes and reward calls, the hours of the recipes for real models.

The bound of a part is the number of its network evaluations (samples through the transformer) times the best time that
the bare transformer takes for one on this machine, over batch sizes; with gradient the best of training all weights and
of training a merged adapter. ``--before`` names a commit; its code runs from a clone, in turn with this one's.

Run: ``python benchmarks/speed.py parts --before COMMIT`` (a few minutes), then ``demo`` (two demos, one after the
other), then ``page``, which joins both with the study's records (writes docs/results/speed.json, speed.md, speed.png).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from tdm_r1.config.load import load_recipe
from tdm_r1.models.specification import Role
from tdm_r1.train.run import Run

ROOT = Path(__file__).parent.parent
ROUNDS = 2
BATCHES = (32, 64, 128, 256)
NETWORK = ("rollout", "diagnostics", "surrogate", "fake score", "generator")
RECIPES = {"mini": "mini", "mini_signs": "mini_ocr"}  # of each world: the recipe whose iteration is timed
SEEDS = (0, 1, 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("parts", "demo", "page"))
    parser.add_argument("--before", help="a commit; for parts and demo")
    parser.add_argument("--out", type=Path, default=Path("docs/results/speed.json"))
    args = parser.parse_args()
    found = json.loads(args.out.read_text()) if args.out.exists() else {}
    if args.what != "page":
        if not args.before:
            parser.error("--before is missing: name the commit to compare with")
        with tempfile.TemporaryDirectory() as folder:
            trees = {"before": clone(args.before, Path(folder) / "before"), "after": ROOT}
            found |= {"commit": commit(args.before), "threads": torch.get_num_threads()}
            found |= {"parts": parts(trees)} if args.what == "parts" else {"demo": demo(trees)}
    args.out.write_text(json.dumps(found, indent=1))
    args.out.with_suffix(".md").write_text(markdown(found, args.out.with_suffix(".png")))
    print(args.out.with_suffix(".md").read_text())


# ------------------------------------------------------------------------------------------ measuring


def commit(name: str) -> str:
    words = ["git", "-C", str(ROOT), "rev-parse", "--short", name]
    return subprocess.run(words, check=True, capture_output=True, text=True).stdout.strip()


def clone(name: str, folder: Path) -> Path:
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(folder)], check=True)
    subprocess.run(["git", "-C", str(folder), "checkout", "--quiet", commit(name)], check=True)
    return folder


def run_in(tree: Path, *words: str) -> str:
    """What this Python prints with the code of ``tree``."""
    command = [sys.executable, *words]
    environment = os.environ | {"PYTHONPATH": str(tree / "src")}
    done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} in {tree}:\n{done.stderr[-2000:]}")
    return done.stdout


def parts(trees: dict[str, Path]) -> dict[str, Any]:
    """Of each recipe: an iteration's parts before and after, by turns, and the bare transformer's times."""
    run = Run(load_recipe("mini"))
    found: dict[str, Any] = {"rates": [], "iterations": {recipe: {} for recipe in RECIPES.values()}}
    for _ in range(ROUNDS):
        found["rates"].append(rates(run))
        for recipe, of in found["iterations"].items():
            for when, tree in trees.items():
                with tempfile.TemporaryDirectory() as folder:
                    out = Path(folder) / "iteration.json"
                    words = ["--recipe", recipe, "--iterations", "5", "--out", str(out)]
                    run_in(tree, "benchmarks/iteration.py", *words)
                    of.setdefault(when, []).append(json.loads(out.read_text()))
    return found


def rates(run: Run) -> dict[str, float]:
    """Best seconds a sample of the mini transformer, over batch sizes: forward, and forward with backward."""
    transformer, best = run.roles.transformer(Role.TEACHER), {"forward": float("inf"), "both": float("inf")}
    base = [p for name, p in transformer.named_parameters() if "lora_" not in name]
    for batch in BATCHES:
        x, t, c = torch.randn(batch, *run.backbone.latent_shape), torch.rand(batch), run.embed(["a red circle"] * batch)

        def forward(role: Role = Role.TEACHER, x=x, t=t, c=c) -> torch.Tensor:
            with run.roles.use(role) as velocity:
                return velocity(x, t, c)

        def both(role: Role, forward=forward) -> None:
            forward(role).square().mean().backward()

        with torch.no_grad():
            best["forward"] = min(best["forward"], timed(forward) / batch)
        best["both"] = min(best["both"], timed(lambda both=both: both(Role.SURROGATE)) / batch)
        for p in base:
            p.requires_grad_(True)
        best["both"] = min(best["both"], timed(lambda both=both: both(Role.TEACHER)) / batch)
        for p in base:
            p.requires_grad_(False)
            p.grad = None
    return best


def timed(call: Any) -> float:
    call()
    found = []
    for _ in range(5):
        start = time.perf_counter()
        call()
        found.append(time.perf_counter() - start)
    return min(found)


def demo(trees: dict[str, Path]) -> dict[str, Any]:
    """`tdm-r1 mini demo` with each code, one after the other: minutes of the command, and its result."""
    found = {}
    for when, tree in trees.items():
        with tempfile.TemporaryDirectory() as folder:
            start = time.perf_counter()
            run_in(tree, "-m", "tdm_r1", "mini", "demo", "--output", folder)
            minutes = (time.perf_counter() - start) / 60
            (record,) = Path(folder).glob("*/result.json")
            found[when] = {"minutes": minutes} | {k: json.loads(record.read_text())[k] for k in ("before", "after")}
    return found


# ------------------------------------------------------------------------------------------ the page


def bounds(found: dict[str, Any]) -> dict[str, float]:
    """Best seconds a sample over all rounds."""
    return {what: min(r[what] for r in found["rates"]) for what in ("forward", "both")}


def part_rows(found: dict[str, Any], recipe: str) -> list[dict[str, Any]]:
    """Of each part: evaluations a sample, seconds and bound, before and after; medians over the rounds."""
    best, rows = bounds(found), []
    of = found["iterations"][recipe]
    for part in of["after"][0]["parts"]:
        row: dict[str, Any] = {"part": part}
        for when, rounds in of.items():
            here = [r["parts"][part] for r in rounds]
            forward, both = (statistics.median(p[k] for p in here) for k in ("forward", "forward_with_gradient"))
            row[when] = {
                "seconds": statistics.median(p["seconds"] for p in here),
                "forward": forward,
                "both": both,
                "bound": rounds[0]["samples"] * (forward * best["forward"] + both * best["both"]),
            }
        rows.append(row)
    return rows


def iteration_seconds(found: dict[str, Any], recipe: str, when: str) -> float:
    return statistics.median(r["seconds"] for r in found["iterations"][recipe][when])


def markdown(found: dict[str, Any], picture: Path) -> str:
    lines = [
        "# Speed",
        "",
        f"Written by `python benchmarks/speed.py`. Before is the code at {found.get('commit', '?')}; both ran in turn "
        f"on one machine, {found.get('threads', '?')} threads. Times are medians of {ROUNDS} rounds. What a GPU makes "
        "of the changes has not been measured.",
    ]
    if "parts" in found:
        lines += iteration_lines(found["parts"])
    if "demo" in found:
        lines += demo_lines(found["demo"])
    if "parts" in found:
        lines += curve_lines(found["parts"], picture)
    lines += hour_lines(found.get("commit", "HEAD"))
    return "\n".join(lines) + "\n"


def iteration_lines(found: dict[str, Any]) -> list[str]:
    best, rows = bounds(found), part_rows(found, "mini")
    lines = [
        "",
        "## An iteration of `mini`",
        "",
        f"The bare transformer's best: {1e3 * best['forward']:.2f} ms a sample forward, {1e3 * best['both']:.2f} ms "
        "with backward. The bound is these times the evaluations. Evaluations are for each of the 128 samples, "
        "without and with gradient.",
        "",
        "| part | evaluations before | seconds | of the bound | evaluations after | seconds | of the bound |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = []
        for when in ("before", "after"):
            p = row[when]
            ratio = f"{p['seconds'] / p['bound']:.2f}" if p["bound"] else ""
            counts = f"{p['forward']:.2f} + {p['both']:.2f}" if p["bound"] else ""
            cells += [counts, f"{p['seconds']:.3f}", ratio]
        lines.append(f"| {row['part']} | {' | '.join(cells)} |")
    cells = []
    for when in ("before", "after"):
        network = [row[when] for row in rows if row["part"] in NETWORK]
        seconds, bound = (sum(p[k] for p in network) for k in ("seconds", "bound"))
        cells += ["", f"{seconds:.3f}", f"{seconds / bound:.2f}"]
    lines.append(f"| **all with the network** | {' | '.join(cells)} |")
    lines.append("")
    for recipe in found["iterations"]:
        before, after = (iteration_seconds(found, recipe, when) for when in ("before", "after"))
        lines.append(
            f"A whole iteration of `{recipe}`: {before:.2f} s before, {after:.2f} s after, ratio {after / before:.2f}."
        )
    return lines


def demo_lines(found: dict[str, Any]) -> list[str]:
    lines = ["", "## The demo", "", "`tdm-r1 mini demo`, start to end, with both codes one after the other.", ""]
    lines += ["| | minutes | strict, before and after | Frechet, before and after |", "|---|---|---|---|"]
    for when in ("before", "after"):
        demo = found[when]
        cells = [f"{demo['before'][k]:.3f}, {demo['after'][k]:.3f}" for k in ("strict", "frechet")]
        lines.append(f"| {when} | {demo['minutes']:.1f} | {' | '.join(cells)} |")
    ratio = found["after"]["minutes"] / found["before"]["minutes"]
    why = "Part of it is that the demo has fewer iterations now ([note](../notes/2026-11-27-4-speed.md))."
    return [*lines, "", f"Ratio {ratio:.3f}. {why}"]


def curve_lines(found: dict[str, Any], picture: Path) -> list[str]:
    figure = Figure(figsize=(9, 6), layout="constrained")
    FigureCanvasAgg(figure)
    lines = [
        "",
        "## Score against minutes and reward calls",
        "",
        "What was changed leaves every update as it was, up to rounding (tests/test_roles.py, test_lora_layer.py, "
        "test_algorithms.py), so a scored image gives what it gave: the records are the study's row `tdm-r1`, three "
        "seeds of each task. Minutes are iterations times the seconds above, without evaluations. Scores are means, "
        "with the range over seeds.",
        "",
        f"![score against minutes and reward calls]({picture.name})",
        "",
        "| task | scored images | minutes before | after | score | Frechet distance |",
        "|---|---|---|---|---|---|",
    ]
    for k, (world, recipe) in enumerate(RECIPES.items()):
        score = "strict" if world == "mini" else "reward"
        paths = [ROOT / f"docs/results/study/{world}/tdm-r1-{seed}.json" for seed in SEEDS]
        curves = [json.loads(path.read_text())["curve"] for path in paths]
        seconds = {when: iteration_seconds(found, recipe, when) for when in ("before", "after")}
        xs: dict[str, list[float]] = {"before": [], "after": [], "scored": []}
        ys: list[list[float]] = []
        for points in zip(*curves, strict=True):
            ys.append([p[score] for p in points])
            xs["scored"].append(points[0]["scored"])
            for when, each in seconds.items():
                xs[when].append(points[0]["iteration"] * each / 60)
            lines.append(
                f"| {world} | {points[0]['scored']:,} | {xs['before'][-1]:.1f} | {xs['after'][-1]:.1f} | "
                f"{statistics.mean(ys[-1]):.3f} ({min(ys[-1]):.3f} to {max(ys[-1]):.3f}) | "
                f"{statistics.mean(p['frechet'] for p in points):.1f} |"
            )
        for column, whens in ((1, ("before", "after")), (2, ("scored",))):
            axis = figure.add_subplot(2, 2, 2 * k + column)
            for when in whens:
                (line,) = axis.plot(xs[when], [statistics.mean(y) for y in ys], marker=".", label=when)
                axis.fill_between(xs[when], [min(y) for y in ys], [max(y) for y in ys], alpha=0.2)
                line.set_zorder(3)
            axis.set(xlabel="minutes" if column == 1 else "scored images", ylabel=f"{score}, {world}")
            if column == 1:
                axis.legend()
    figure.savefig(picture, dpi=90)
    return lines


def hour_lines(before: str) -> list[str]:
    words = ["git", "-C", str(ROOT), "show", f"{before}:docs/results/recipe_needs.json"]
    old = {r["recipe"]: r for r in json.loads(subprocess.run(words, check=True, capture_output=True).stdout)}
    new = {r["recipe"]: r for r in json.loads((ROOT / "docs/results/recipe_needs.json").read_text())}
    lines = [
        "",
        "## Hours of the recipes for real models",
        "",
        "By arithmetic ([recipe_needs.md](recipe_needs.md)), on one GPU of 80 GB, at the shares of its peak that were "
        "measured before ([gpu_iteration_h100.md](gpu_iteration_h100.md)): the evaluation that is shared and the "
        "activations that are kept are counted, faster adapters are not.",
        "",
        "| recipe | PFLOP an iteration, before | after | hours, before | after |",
        "|---|---|---|---|---|",
    ]
    for name, row in new.items():
        if name in old:
            cells = []
            for value in (
                lambda r: sum(r["petaflops"].values()),
                lambda r: r["iterations"] * r["seconds_1_gpu"] / 3600,
            ):
                cells += [f"{value(old[name]):.1f}", f"{value(row):.1f}"]
            lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


if __name__ == "__main__":
    main()
