"""`tdm-r1 study`: everything that the paper compares with, on equal numbers of scored images, on a mini model.

A finished row is one JSON file and one strip of pictures in the results' folder, so that a study can be made in parts,
and on several machines.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from ..config.load import differences, load_recipe
from ..config.run import RunConfig
from ..core.randomness import torch_rng
from ..errors import UserError
from ..evaluate import pictures
from ..evaluate.evaluation import Sampling
from ..files import whole_folder, write_text
from ..models.specification import Role
from ..train.build import algorithm_of
from ..train.folder import RunFolder
from ..train.run import Run
from .bundle import bundle_path
from .report import better
from .study_page import write_page
from .study_rows import BASE_GUIDANCE, BASE_STEPS, Row
from .study_search import ALL

DRAWS = 2  # of noise that start and end are measured on; neither training nor the curves use them
CURVE = 4  # evaluations of a run beside the one of its start
BACKWARD = 2  # forward passes that a backward pass costs
SHOWN = 8  # pictures of a strip

NOT_IN_RESULTS = "model.gradient_checkpointing"
SETTINGS_READ = {  # the groups of settings of each algorithm, of those that belong to algorithms
    "tdm": ("tdm",),
    "tdm_r1": ("tdm", "surrogate", "balance"),
    "tdm_r1_release": ("release",),
    "tdm_direct_rl": ("tdm", "dgpo"),
    "dgpo": ("dgpo",),
    "flow_grpo": ("flow_grpo",),
    "nft": ("nft",),
}

WORLDS: dict[str, dict[str, Any]] = {  # settings of every run of a study, on top of its recipe's
    "mini": {},
    "mini_signs": {
        "reward": "ocr_line",
        "model.path": "mini_signs",
        "task.name": "mini_signs",
        "task.weights": None,
        "evaluation.also": ["mini"],
    },
}
OWN: dict[str, dict[str, Any]] = {  # and of those with this project's recipe: prompts without reward, as in mini_ocr
    "mini": {},
    "mini_signs": {"batch.kl_prompts": 64, "task.kl": "mini"},
}


@dataclass(frozen=True)
class Study:
    """What is to be run.

    Args:
        world: mini or mini_signs.
        scored: images that every method has scored.
        prompts: of an evaluation.
        rows, seeds: those to run; finished ones are kept.
        results: folder of the records and the page.
        runs: folder of the runs.
    """

    world: str
    scored: int
    prompts: int
    rows: Sequence[Row]
    seeds: Sequence[int]
    results: Path
    runs: Path

    def config(self, row: Row, seed: int) -> RunConfig:
        """The row's settings, its budget in iterations."""
        world = dict(WORLDS[self.world])
        start = {} if "model.student_lora" in row.changes else {"model.student_lora": self.world}
        own = OWN[self.world] if row.recipe == "mini" and "algorithm" not in row.changes else {}
        changes = world | start | own | dict(row.changes)
        config = load_recipe(row.recipe or "mini").override(changes)
        iterations = max(round(self.scored * row.budget / (config.batch.prompts * config.batch.group)), 1)
        return config.override(
            {
                "seed": seed,
                "output": self.runs / self.world,
                "name": row.file(seed),
                "iterations": iterations,
                "evaluation.every": max(iterations // (CURVE if row.budget >= 1 else 1), 1),
                "evaluation.prompts": self.prompts,
            }
        )

    def record_of(self, row: Row, seed: int) -> Path:
        return self.results / self.world / f"{row.file(seed)}.json"


def run_study(study: Study, console: Console) -> None:
    """Runs what is missing, in order, and writes the page after each row."""
    for seed in study.seeds:
        for row in study.rows:
            if row.recipe is None and seed != study.seeds[0] and row.after is None:
                continue  # nothing is random about the base and the start but the noise that all share
            path = study.record_of(row, seed)
            if path.exists() and _same(path, study, row, seed):
                console.print(f"{row.name}, seed {seed}: done, {path}", markup=False)
                continue
            console.rule(f"{row.name}, seed {seed}: {row.what}")
            record, images = one(study, row, seed, console)
            path.parent.mkdir(parents=True, exist_ok=True)
            write_text(path, json.dumps(record, indent=1))
            pictures.save_png(pictures.strip(images), path.with_suffix(".png"))
            write_page(study.results, study.world, stale(study))


def stale(study: Study) -> set[str]:
    """The rows of the page with a record of other settings than they have now."""
    found = [(row, seed) for row in ALL for seed in study.seeds if study.record_of(row, seed).exists()]
    return {row.name for row, seed in found if not _same(study.record_of(row, seed), study, row, seed)}


def one(study: Study, row: Row, seed: int, console: Console) -> tuple[dict[str, Any], np.ndarray]:
    """A row's record and its pictures, uint8 [N, H, W, 3], whose prompts the record has."""
    config = study.config(row, seed)
    if row.after is not None:
        config = _after(study, row, seed, config, console)
    record: dict[str, Any] = {"row": row.name, "seed": seed, "settings": settings_of(study, row, seed)}
    run = Run(config, console=console)
    record["device"] = torch.cuda.get_device_name() if run.backbone.device.type == "cuda" else "CPU"
    if row.recipe is not None:
        _train(run, console)
        record |= cost(run)
        if row.after is not None:  # what made its teacher or its surrogate counts too
            teacher = json.loads(study.record_of(named(row.after[0]), seed).read_text())
            record |= {name: record[name] + teacher[name] for name in ("scored", "passes", "seconds")}
        record["curve"] = curve(config)
    elif row.model == "surrogate":
        run.load(run.checkpoints()[-1])
    sampling = sampling_of(row, run)
    record["network_evaluations"] = sampling.network_evaluations
    record["end"], images = measured(run, sampling)
    record["pictures"] = [prompt.text for prompt in run.task.eval_prompts(study.prompts)[: len(images)]]
    return record, images


def named(name: str) -> Row:
    """A row by its name."""
    return next(row for row in ALL if row.name == name)


def _train(run: Run, console: Console) -> None:
    """To the end, from the last checkpoint if there is one. Raises UserError on a run with other settings there."""
    before = run.files.settings() if run.checkpoints() else None
    for name, old, new in differences(before, run.config) if before else ():
        if name == NOT_IN_RESULTS:
            continue
        raise UserError(
            f"{run.folder} has a run with {name} = {old!r}, wanted is {new!r}: remove it, or give another --runs"
        )
    run.fit(resume=before is not None)
    if run.iteration < run.config.iterations:
        raise UserError("interrupted, and no figures are filed; the same command goes on with it")


def sampling_of(row: Row, run: Run) -> Sampling:
    """How the row's model is sampled."""
    if row.model in ("generator", "start"):
        return run.few_step()
    role = Role.TEACHER if row.model == "base" else Role.SURROGATE_EMA
    return Sampling(role, BASE_STEPS, run.config.sampler.shift, guidance=BASE_GUIDANCE)


def measured(run: Run, sampling: Sampling) -> tuple[list[dict[str, float]], np.ndarray]:
    """Metrics on each draw of noise, and the first draw's first pictures."""
    rows, images = [], np.zeros(0)
    for k in range(DRAWS):
        evaluator = run.evaluator()
        evaluator.x_1 = torch.randn(evaluator.x_1.shape, generator=torch_rng(run.config.evaluation.seed, k, "study"))
        found = evaluator(sampling)
        rows.append({n: round(v, 4) for n, v in found.metrics.items() if better(n) or n == "reward"})
        if k == 0:
            images = found.images[:: run.config.evaluation.images_per_prompt][:SHOWN]
    return rows, images


def cost(run: Run) -> dict[str, float]:
    """Scored images, seconds, and passes through the network; a backward pass counts as `BACKWARD` forward ones."""
    parts = algorithm_of(run.config).evaluations(run.config).values()
    passes = sum(part.frozen + (1 + BACKWARD) * part.trained for part in parts)
    return {
        "iterations": run.iteration,
        "scored": run.scored,
        "passes": passes * run.iteration,
        "seconds": round(run.seconds, 1),
    }


def curve(config: RunConfig) -> list[dict[str, float]]:
    """The run's evaluations."""
    rows = [json.loads(line) for line in (config.folder / "metrics.jsonl").read_text().splitlines()]
    names = ("iteration", "scored", "seconds")
    return [
        {n: row[n] for n in names}
        | {n.removeprefix("eval/"): v for n, v in row.items() if n == "eval/reward" or better(n[5:])}
        for row in rows
        if "eval/reward" in row
    ]


def _after(study: Study, row: Row, seed: int, config: RunConfig, console: Console) -> RunConfig:
    """The row's settings with what it takes of another row's run."""
    assert row.after is not None
    name, what = row.after
    earlier = study.config(named(name), seed)
    if not RunFolder(earlier.folder).is_finished():
        raise UserError(f"{row.name} needs the run of {name}, seed {seed}, at {earlier.folder}: run it first (--only)")
    if what == "surrogate":
        return earlier
    if what == "frozen":
        return config.override({"model.surrogate_lora": str(earlier.folder / "lora_surrogate")})
    console.print(f"Merging {earlier.folder / 'lora'} into the base, as the teacher ...", markup=False)
    return config.override({"model.teacher": str(merged(earlier))})


def merged(config: RunConfig) -> Path:
    """The base with a run's LoRA merged into it, as a pipeline folder beside the run's files."""
    from diffusers import StableDiffusion3Pipeline

    folder = config.folder / "merged"
    pipeline = StableDiffusion3Pipeline.from_pretrained(bundle_path(config.model.path))
    pipeline.load_lora_weights(config.folder / "lora")
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    with whole_folder(folder) as partial:
        pipeline.save_pretrained(partial)
    return folder


def settings_of(study: Study, row: Row, seed: int) -> dict[str, Any]:
    """What a record's figures depend on, but for the code; of a row without a run neither seed nor budget."""
    config = study.config(row, seed).model_dump(mode="json", exclude={"output", "name", "trackers", "save_every"})
    if row.recipe is None:
        config = {name: config[name] for name in ("model", "sampler", "task", "reward")}
    found = {"world": study.world, "prompts": study.prompts, "row": row.model, "config": config}
    return _only_read(found) | ({"after": settings_of(study, named(row.after[0]), seed)} if row.after else {})


def _same(path: Path, study: Study, row: Row, seed: int) -> bool:
    """Whether a record is of these settings; settings that there were not yet when it was made do not count."""
    return _within(_only_read(json.loads(path.read_text())["settings"]), settings_of(study, row, seed))


def _only_read(settings: dict[str, Any]) -> dict[str, Any]:
    """A record's settings without those of algorithms other than its own, what changes no result, and those of the row
    before it."""
    config = dict(settings["config"])
    group, name = NOT_IN_RESULTS.split(".")
    if group in config:
        config[group] = {key: value for key, value in config[group].items() if key != name}
    settings = settings | {"config": config}
    if "algorithm" in config:
        unread = {group for groups in SETTINGS_READ.values() for group in groups}
        unread -= set(SETTINGS_READ[config["algorithm"]])
        settings = settings | {"config": {name: value for name, value in config.items() if name not in unread}}
    return settings | ({"after": _only_read(settings["after"])} if "after" in settings else {})


def _within(old: Any, new: Any) -> bool:
    if isinstance(old, dict) and isinstance(new, dict):
        return all(name in new and _within(value, new[name]) for name, value in old.items())
    return bool(old == new)
