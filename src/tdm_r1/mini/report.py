"""The main job on the mini model: base and 4-step student before and after, as a table, a picture and JSON."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from ..config.load import load_recipe
from ..config.run import RunConfig
from ..errors import UserError
from ..evaluate import pictures
from ..evaluate.evaluation import Evaluation, Sampling
from ..files import write_text
from ..models.specification import Role
from ..train.run import Run
from .bundle import MODELS
from .task import DIRECTION

BASE_STEPS = 20  # Euler steps of the many-step base, at shift 3
DRAWS = 4  # of noise that a study measures start and end on, beside the evaluation's own
BASE_GUIDANCE = 2.0  # its guidance: the one that the student was distilled with, whatever the teacher of a recipe has


def fresh_run(recipe: str, seed: int, output: Path, purpose: str) -> RunConfig:
    """The recipe with its seed, in a folder of ``output`` that does not exist yet."""
    first = name = run_name(recipe, seed, purpose)
    number = 2
    while (output / name).exists():
        name = f"{first}_{number}"
        number += 1
    return load_recipe(recipe).override({"seed": seed, "output": output, "name": name})


def run_name(recipe: str, seed: int, purpose: str) -> str:
    return f"{purpose}_{Path(recipe).stem}_seed{seed}"


def reinforce(config: RunConfig, console: Console) -> dict:
    """Runs one recipe on the mini model; returns a JSON-ready record and leaves `before_after.png` in the run."""
    run = Run(config, console=console)
    evaluator = run.evaluator()
    console.print(f"Sampling the many-step base ({BASE_STEPS} guided steps) ...")
    base = evaluator(Sampling(Role.TEACHER, BASE_STEPS, config.sampler.shift, guidance=BASE_GUIDANCE))
    before = evaluator(run.few_step())
    start = time.perf_counter()
    after = run.fit(first=before)
    if run.iteration < config.iterations:
        console.print("Measuring what there is ...")
        after = evaluator(run.few_step())
    assert after is not None  # a fresh run evaluates at its end
    record = {
        "seed": config.seed,
        "minutes": round((time.perf_counter() - start) / 60, 2),
        "threads": torch.get_num_threads(),
        "iterations": run.iteration,
        "reward_evaluations": run.scored,
        "base": _rounded(base.metrics),
        "before": _rounded(before.metrics),
        "after": _rounded(after.metrics),
    }
    path = run.folder / "before_after.png"
    pictures.save_png(before_after(base, before, after, config.evaluation.images_per_prompt), path)
    write_text(run.folder / "result.json", json.dumps(record, indent=1))
    console.print(table(record))
    console.print(f"Picture: {path}\nLoRA:    {run.folder / 'lora'}  (plain diffusers: load_lora_weights)")
    return record


def before_after(base: Evaluation, before: Evaluation, after: Evaluation, images_per_prompt: int):
    """The same noise and prompts in three rows, one to three prompts of every family, or more of the only one."""
    prompts = base.prompts[::images_per_prompt]
    chosen: list[int] = []
    tags = list(dict.fromkeys(p.metadata["tag"] for p in prompts))
    for tag in tags:
        of_tag = [i for i, p in enumerate(prompts) if p.metadata["tag"] == tag]
        chosen += of_tag[: 12 if len(tags) == 1 else 1 if tag in ("single_object", "colors") else 3]
    rows = np.array(chosen) * images_per_prompt
    labels = ("base, 20 steps, guided", "4 steps before", "4 steps after TDM-R1")
    return pictures.grid(
        [(label, e.images[rows]) for label, e in zip(labels, (base, before, after), strict=True)],
        [base.prompts[i].text for i in rows],
    )


def table(record: Mapping) -> Table:
    """The before/after table for a terminal."""
    title = (
        f"seed {record['seed']}: {record['iterations']} iterations, {record['reward_evaluations']:,} scored images, "
        f"{record['minutes']} minutes"
    )
    out = Table(title=title)
    for column in ("metric", "base, 20 steps", "4 steps, before", "4 steps, after", "better is"):
        out.add_column(
            column, justify="left" if column in ("metric", "better is") else "right", no_wrap=column == "metric"
        )
    for name in record["after"]:
        values = [record[k].get(name) for k in ("base", "before", "after")]
        digits = 1 if name == "images_per_second" else 0 if name == "network_evaluations" else 3
        out.add_row(name, *("" if v is None else f"{v:.{digits}f}" for v in values), better(name))
    return out


def better(metric: str) -> str:
    """up, down or nothing; a metric of another task (``mini/strict``) as in its own."""
    task, _, name = metric.partition("/")
    return DIRECTION.get(name if task in MODELS else metric, "")


Draws = list[dict[str, float]]
"""Metrics of one model on several draws of the evaluation's noise."""


def over_noise(run: Run) -> Draws:
    """The run's model as it is, measured on `DRAWS` draws of noise that neither training nor its evaluations used."""
    rows = []
    for k in range(DRAWS):
        evaluator = run.evaluator()
        evaluator.x_1 = torch.randn(evaluator.x_1.shape, generator=torch.Generator().manual_seed(900 + k))
        found = evaluator(run.few_step()).metrics
        rows.append({name: value for name, value in found.items() if better(name) or name == "reward"})
    return rows


def changes(start: Draws, end: Draws) -> dict[str, dict[str, float]]:
    """Each metric's mean change on the same noise, and its standard error over draws."""
    found = {}
    for name in end[0]:
        gains = np.array([b[name] - a[name] for a, b in zip(start, end, strict=True)])
        found[name] = {"mean": float(gains.mean()), "error": float(gains.std(ddof=1) / np.sqrt(len(gains)))}
    return {name: _rounded(change) for name, change in found.items()}


def _finished(folder: Path) -> Run:
    """A finished run, as it was at its end."""
    run = Run(load_recipe(str(folder)))
    run.load(run.checkpoints()[-1])
    return run


def _rounded(metrics: Mapping[str, float]) -> dict[str, float]:
    return {k: round(v, 4) for k, v in metrics.items()}


def study(recipe: str, seeds: Sequence[int], label: str, output: Path, out: Path | None, console: Console) -> None:
    """Runs a recipe over seeds and files their records under ``label`` in ``out``; keeps other labels'.

    Seeds that an interrupted study had finished with the same settings are not run again. The first seed's picture goes
    beside the records, under the label.
    """
    folders = [completed_run(recipe, seed, output, "study", console) for seed in seeds]
    config = load_recipe(recipe)
    out = out or Path(f"docs/results/{config.task.name}.json")
    results = json.loads(out.read_text()) if out.exists() else {"recipe": {}, "noise_floor": {}}
    console.print(f"Measuring the start and every run's end on {DRAWS} more draws of noise ...")
    start = over_noise(Run(config))
    results["noise_floor"] = {n: round(float(np.std([row[n] for row in start], ddof=1)), 4) for n in start[0]}
    results["recipe"][label] = [
        json.loads((folder / "result.json").read_text()) | {"change": changes(start, over_noise(_finished(folder)))}
        for folder in folders
    ]
    write_text(out, json.dumps(results, indent=1))
    write_text(out.with_suffix(".md"), markdown(results))
    picture = out.with_name(f"mini_{label.removeprefix('mini_')}.png")
    shutil.copyfile(folders[0] / "before_after.png", picture)
    console.print(f"Wrote {out}, {out.with_suffix('.md')} and {picture}")


def completed_run(
    recipe: str, seed: int, output: Path, purpose: str, console: Console, changes: dict[str, Any] | None = None
) -> Path:
    """The folder of a run of the recipe, with ``changes``, that came to its end: an earlier one, or one made now.

    Raises UserError if it is interrupted.
    """
    config = fresh_run(recipe, seed, output, purpose).override(changes or {})
    folder = finished_run(config, run_name(recipe, seed, purpose))
    if folder is not None:
        console.print(f"{folder} has run already with these settings: its figures are taken")
        return folder
    if reinforce(config, console)["iterations"] < config.iterations:
        raise UserError("interrupted, and no figures are filed; the same command takes up what had come to its end")
    return config.folder


def finished_run(wanted: RunConfig, name: str) -> Path | None:
    """A folder, called ``name`` with anything behind it, of a run that came to its end with the settings ``wanted``."""
    for folder in sorted(wanted.output.glob(f"{name}*")):
        if (folder / "result.json").exists() and _finished_with(wanted, folder):
            return folder
    return None


def _finished_with(wanted: RunConfig, folder: Path) -> bool:
    try:
        config = load_recipe(str(folder))
    except UserError:
        return False  # of a version with other settings
    iterations = json.loads((folder / "result.json").read_text())["iterations"]
    return config.override({"name": wanted.name}) == wanted and iterations == wanted.iterations  # else interrupted


def markdown(results: Mapping) -> str:
    """The results as a page: mean and spread over seeds, against the noise floor."""
    lines = [
        "# Results on the mini model",
        "",
        "Written by `tdm-r1 mini repeat RECIPE` from the JSON file of the same name; not edited by hand. Each cell is",
        "the mean over seeds, with the standard deviation over seeds where there are several. The noise floor is the",
        "standard deviation of the 4-step student's figure over fresh evaluation noise. The change is from before to",
        f"after on the same noise, as the mean of {DRAWS} other draws with its standard error over them; runs filed",
        "before it was measured have none. What `mini/` stands before is measured on the shapes' prompts.",
    ]
    for recipe, records in results["recipe"].items():
        seeds = ", ".join(str(r["seed"]) for r in records)
        minutes = np.mean([r["minutes"] for r in records])
        threads = {f" on {r['threads']} thread(s)" for r in records if "threads" in r}
        scored = np.mean([r["reward_evaluations"] for r in records])
        lines += [
            "",
            f"## {recipe}",
            "",
            f"Seeds {seeds}; {minutes:.1f} minutes{', '.join(sorted(threads))} and {scored:,.0f} scored images a run.",
            "",
            "| metric | base, 20 guided steps | 4 steps, before | 4 steps, after | change | noise floor | better is |",
            "|---|---|---|---|---|---|---|",
        ]
        for name in records[0]["after"]:
            cells = [_cell([r[k].get(name) for r in records]) for k in ("base", "before", "after")]
            floor = results["noise_floor"].get(name, "")
            change = _change([r.get("change", {}).get(name) for r in records])
            lines.append(f"| {name} | {' | '.join(cells)} | {change} | {floor} | {better(name)} |")
    return "\n".join(lines) + "\n"


def _change(found: list[dict[str, float] | None]) -> str:
    known = [change for change in found if change]
    if not known:
        return ""
    error = np.sqrt(sum(change["error"] ** 2 for change in known)) / len(known)
    return f"{np.mean([change['mean'] for change in known]):+.3f} ± {error:.3f}"


def _cell(values: list[float | None]) -> str:
    known = [v for v in values if v is not None]
    if not known:
        return ""
    spread = f" ± {np.std(known, ddof=1):.3f}" if len(known) > 1 else ""
    return f"{np.mean(known):.3f}{spread}"
