"""Alarms on rewards that are exploited: when they are raised, and what the run exports.

Run: ``python benchmarks/alarms.py`` (writes docs/results/alarms.json and .md; about 15 minutes on two cores). The
recipe `mini` with its own reward, with the pictures' size in JPEG, and with its own reward beside a nuisance, a dark
ground.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

from tdm_r1.config.load import load_recipe
from tdm_r1.mini.task import reward
from tdm_r1.train.run import Run

ITERATIONS, EVERY = 40, 10
SHOWN = ("strict", "frechet", "diversity", "ground_noise")


def with_dark_ground(images: np.ndarray, prompts: list[str], metadata: list[dict[str, Any]]) -> np.ndarray:
    """The shapes' reward, and twice the darkness of the picture, of 1."""
    return np.array(reward(images, prompts, metadata)) + 2 * (1 - images.mean((1, 2, 3)) / 255)


CASES = {
    "the shapes' own reward": "mini",
    "size in JPEG": "jpeg_compressibility",
    "the shapes' reward and a dark ground": f"{__file__}:with_dark_ground",
}


def run(case: str, folder: Path) -> dict:
    """A run that goes back at the first alarm; its evaluations, and the alarms of the last."""
    name = "".join(letter for letter in case if letter.isalnum())
    settings = {"reward": CASES[case], "output": folder, "name": name, "iterations": ITERATIONS}
    settings |= {"evaluation.every": EVERY, "evaluation.on_alarm": "back"}
    found = Run(load_recipe("mini").override(settings))
    last = found.fit()
    assert last is not None  # it evaluates at its end, if not before
    rows = [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]
    exported = json.loads((folder / name / "exported.json").read_text())["iteration"]
    evaluations = [{k.removeprefix("eval/"): v for k, v in row.items()} for row in rows if "eval/alarms" in row]
    alarms = {a.name: round(a.times, 1) for a in found.alarms(last.metrics)}
    return {"case": case, "evaluations": evaluations, "alarms": alarms, "exported": exported}


def markdown(found: list[dict]) -> str:
    lines = [
        "# Alarms",
        "",
        "Written by `python benchmarks/alarms.py`. The recipe `mini` with three rewards, evaluated every",
        f"{EVERY} iterations, {ITERATIONS} at most, `evaluation.on_alarm: back`. A metric raises an alarm when it is",
        "worse than at the start by three times its noise over prompts. Seed 0.",
        "",
        "| reward | iteration | reward's mean | " + " | ".join(SHOWN) + " | alarms (times the noise) | exported |",
        "|---|---|---|" + "---|" * len(SHOWN) + "---|---|",
    ]
    for record in found:
        for row in record["evaluations"]:
            last = row is record["evaluations"][-1]
            alarms = ", ".join(f"{name} {times}" for name, times in record["alarms"].items()) if last else ""
            cells = [f"{row[name]:.3f}" for name in ("reward", *SHOWN)]
            end = f"iteration {record['exported']}" if last else ""
            lines.append(f"| {record['case']} | {row['iteration']} | {' | '.join(cells)} | {alarms} | {end} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("docs/results/alarms.json"))
    parser.add_argument("--runs", type=Path, default=Path("runs/alarms"))
    args = parser.parse_args()
    found = [run(case, args.runs) for case in CASES]
    args.out.write_text(json.dumps(found, indent=1))
    args.out.with_suffix(".md").write_text(markdown(found))
    print(args.out.with_suffix(".md").read_text())


if __name__ == "__main__":
    main()
