"""`tdm-r1 doctor`: what a run needs, checked before it is started."""

from __future__ import annotations

import math
import re
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from rich.console import Console

from ..config.run import RunConfig
from ..errors import UserError
from ..models.load import resolve_device, resolve_model
from ..models.lora_files import read_lora
from ..models.pipeline import pipeline_class
from ..models.registry import bundled
from ..rewards.overview import state_of
from ..rewards.registry import BUILT_IN
from ..rewards.scorer import Scorer
from ..tasks.load import load_kl_task, load_task
from .estimate import ALLOCATOR, estimate, with_checkpointing_decided
from .memory import free_memory
from .run import Run

GIB = 2**30
CHECKPOINTS = 4  # that a run keeps at most


@dataclass(frozen=True)
class Finding:
    """``ok``: False stops a run; None is worth knowing. ``text``: what was found, and what to do about it."""

    what: str
    ok: bool | None
    text: str


def examine(config: RunConfig, *, iteration: bool = True) -> Iterator[Finding]:
    """Checks one thing after the other; what fails does not stop the others, but for the iteration at the end.

    Args:
        iteration: load the model and time an iteration of one micro-batch.
    """
    failed = False
    for what, check in CHECKS.items():
        try:
            found = check(config)
        except (UserError, ValueError, OSError, ImportError, RuntimeError) as error:
            found = [Finding(what, False, " ".join(str(error).split()))]
        failed = failed or any(f.ok is False for f in found)
        yield from found
    if not iteration:
        return
    if failed:
        yield Finding("iteration", None, "not tried: fix the above first")
        return
    if config.model.shard:
        yield Finding(
            "iteration", None, "not tried: model.shard needs several processes; start the run for one iteration"
        )
        return
    try:
        yield time_iteration(config)
    except (UserError, ValueError, OSError, RuntimeError) as error:
        yield Finding("iteration", False, " ".join(str(error).split()))


# ------------------------------------------------------------------------------------------ checks


def check_device(config: RunConfig) -> list[Finding]:
    """The device, and its memory against the estimate."""
    device = resolve_device(config.model.device)
    if device.startswith("cuda") and config.model.gradient_checkpointing == "auto":
        config = with_checkpointing_decided(config, free_memory(device))
    found = estimate(config)
    needed = found.peak * ALLOCATOR if found else None
    wanted = f"about {needed / GIB:.1f} GiB are needed (arithmetic)" if needed else "what is needed is not known"
    if not device.startswith("cuda"):
        big = needed is not None and needed > 4 * GIB
        slow = "; a model of this size takes days on it: use a machine with a GPU" if big else ""
        return [Finding("device", not big, f"CPU, {torch.get_num_threads()} threads; {wanted}{slow}")]
    free, total = torch.cuda.mem_get_info(device)
    text = f"{torch.cuda.get_device_name(device)}, {free / GIB:.0f} of {total / GIB:.0f} GiB free; {wanted}"
    if needed is None or needed < free:
        return [Finding("device", True, text)]
    fix = "lower batch.micro_batch, or set model.gradient_checkpointing or model.offload to true, or t5 to false"
    return [Finding("device", False, f"{text}: {fix}")]


def check_disk(config: RunConfig) -> list[Finding]:
    """Room for checkpoints where the run's folder will be."""
    place = next(p for p in (config.folder, *config.folder.absolute().parents) if p.exists())
    free, found = shutil.disk_usage(place).free, estimate(config, gpus=1)
    needed = GIB
    if found:
        roles = sum(size for name, size in found.held.items() if name.startswith(("weights of", "optimizers")))
        needed = int(CHECKPOINTS * roles + GIB)
    text = f"{free / GIB:.0f} GiB free at {place}, up to {needed / GIB:.1f} GiB are needed for checkpoints"
    return [Finding("disk", free > needed, text if free > needed else f"{text}: free some, or set output elsewhere")]


def check_models(config: RunConfig) -> list[Finding]:
    """Access to every checkpoint that the settings name; of pipelines their index alone is read."""
    m, checkpoints = config.model, resolve_model(config.model)
    found = []
    for path in filter(None, (checkpoints.path, m.teacher)):
        kind = f"{m.family}" if m.family else pipeline_class(str(path))
        found.append(Finding("model", True, f"{path}: {kind}"))
    loras = {"student_lora": checkpoints.student_lora, "fake_lora": checkpoints.fake_lora}
    for name, lora in (loras | {"surrogate_lora": m.surrogate_lora}).items():
        if lora:
            read_lora(lora, strength=m.student_lora_scale if name == "student_lora" else None)
            found.append(Finding("model", True, f"{name}: {lora} can be read"))
    if not checkpoints.student_lora and not m.teacher and config.algorithm.startswith("tdm_r1"):
        text = f"distilled first, by {config.distill_with}" if config.distill_with else "the model itself, as it is"
        found.append(Finding("few-step start", True if config.distill_with else None, text))
    return found


def check_prompts(config: RunConfig) -> list[Finding]:
    """The prompts, and those without reward where there are any, can be read."""
    task = load_task(config.task)
    evaluated = task.eval_prompts(config.evaluation.prompts)
    if config.batch.kl_prompts:
        load_kl_task(config.task)
    known = f"{len(task.known)} to train on, " if len(task.known) else ""
    example = task.train_prompts(1, np.random.default_rng(0))[0].text
    return [Finding("prompts", True, f"{known}{len(evaluated)} to evaluate on, such as {example!r}")]


def check_rewards(config: RunConfig) -> list[Finding]:
    """Every reward of the sum on a known picture, against the bounds of its scores."""
    task = load_task(config.task)
    prompt = task.train_prompts(1, np.random.default_rng(0))[0]
    picture, found = example_picture(prompt.text, 64 if bundled(config.model.path) else 256), []
    scorer = Scorer(config.reward, config.scoring)
    try:
        scorer.check([*task.known, *task.eval_prompts(config.evaluation.prompts), prompt])
        for term, scores in zip(scorer.terms, scorer.each(picture[None], [prompt]), strict=True):
            found.append(_judged(term.name, float(scores.values[0]), scores.failures))
    finally:
        scorer.close()
    return found


def _judged(name: str, score: float, failures: tuple[str, ...]) -> Finding:
    entry = BUILT_IN.get(name)
    what = f"reward {name}"
    if math.isnan(score):
        why = "; ".join(failures) or "it returned None or NaN"
        return Finding(what, False, f"no score: {why}" + (f" ({state_of(entry)})" if entry else ""))
    low, high = entry.bounds if entry else (-math.inf, math.inf)
    within = f", expected between {low:g} and {high:g}" if entry and math.isfinite(low) else ""
    return Finding(what, low <= score <= high, f"{score:.3f} on an example picture{within}")


def example_picture(prompt: str, side: int) -> np.ndarray:
    """What the prompt asks for, roughly: its quoted text in black on white, else a red disc; uint8 [side, side, 3]."""
    image = Image.new("RGB", (side, side), "white")
    draw, quoted = ImageDraw.Draw(image), re.search(r'"([^"]+)"', prompt)
    if quoted:
        font = ImageFont.load_default(size=1.4 * side / max(len(quoted[1]), 4))
        draw.text((side / 2, side / 2), quoted[1], fill="black", font=font, anchor="mm")
    else:
        draw.ellipse((side // 4, side // 4, side * 3 // 4, side * 3 // 4), fill="red")
    return np.asarray(image)


CHECKS: dict[str, Callable[[RunConfig], list[Finding]]] = {
    "device": check_device,
    "disk": check_disk,
    "model": check_models,
    "prompts": check_prompts,
    "reward": check_rewards,
}


# ------------------------------------------------------------------------------------------ an iteration


def time_iteration(config: RunConfig) -> Finding:
    """Two iterations of one micro-batch, the second timed, and what a whole one and the run would take by that."""
    with TemporaryDirectory() as folder:
        b = config.batch
        groups = min(-(-b.micro_batch // b.group), b.prompts)  # a whole micro-batch: that is what takes memory
        small: dict[str, Any] = {"batch.prompts": groups, "batch.kl_prompts": 0, "task.kl": None}
        small |= {"output": Path(folder), "evaluation.every": 0}
        run = Run(config.override(small), console=Console(quiet=True))
        try:
            run.step()
            start = time.perf_counter()
            metrics = run.step()
            seconds = time.perf_counter() - start
        finally:
            run.close()
    done, of = run.config.batch.prompts, config.batch.prompts
    whole = seconds * of / done
    memory = f", {metrics['memory/peak_gib']:.1f} GiB" if "memory/peak_gib" in metrics else ""
    missing = metrics.get("reward/missing", 0.0)
    text = (
        f"{done} of {of} groups in {seconds:.1f} s{memory}; by that {whole:.0f} s an iteration and "
        f"{whole * config.iterations / 3600:.1f} hours for {config.iterations}, evaluations not counted"
    )
    if missing:
        return Finding("iteration", False, f"{text}; {missing:.0f} scores were missing: try it with tdm-r1 score")
    return Finding("iteration", True, text)
