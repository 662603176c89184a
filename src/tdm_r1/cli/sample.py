"""`tdm-r1 sample`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro
from PIL import Image
from rich.console import Console

from ..config.load import run_of
from ..config.run import RunConfig
from ..errors import UserError
from ..models.registry import BUNDLED, with_strength


@dataclass
class Sample:
    """Samples pictures with the few-step sampler."""

    prompt: str
    """What to draw; several prompts are separated by |."""
    lora: str | None = None
    """A LoRA folder or hub id, such as runs/mini/lora; with @0.125 behind it where its publisher loads it at such a
    strength. With a mini model the default is its bundled 4-step student."""
    model: str | None = None
    """'mini', 'mini_signs', a hub id or a pipeline folder. Default for this, steps, shift, solver, guidance,
    resolution, t5 and max_sequence_length: those of the run that wrote the LoRA, if its folder exists; else 'mini'."""
    images: int = 4
    """Images per prompt."""
    steps: int | None = None
    """Forward evaluations per image; otherwise 4."""
    shift: float | None = None
    """Shift of the time grid; else 3."""
    solver: Literal["euler", "dpm", "stochastic"] | None = None
    """As the LoRA was trained: the recipes for real models train with dpm; else euler."""
    guidance: float | None = None
    """Guidance scale, for many-step models; else as the LoRA was trained, which is 1 (none) for few-step ones."""
    resolution: int | None = None
    """Side of the pictures in px; else the model's own, though a LoRA may have been trained at another."""
    t5: bool | None = None
    """SD3: encode prompts with T5 too; default: the run's setting, otherwise on."""
    max_sequence_length: int | None = None
    """T5 tokens; else 256. A mini model uses its own."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Precision of the weights; auto is bfloat16 on a GPU, float32 elsewhere."""
    offload: bool = False
    """Keep text encoders and autoencoder in main memory while they are not used."""
    seed: int = 0
    """Seed of the noise."""
    out: Path = Path("sample.png")
    """A PNG: one picture, or a grid of several."""


def main(args: list[str]) -> int:
    command = tyro.cli(Sample, args=args, prog="tdm-r1 sample")
    prompts = [p.strip() for p in command.prompt.split("|") if p.strip()]
    if not prompts:
        raise UserError(f"--prompt = {command.prompt!r}: give at least one prompt")
    if command.images < 1:
        raise UserError(f"--images = {command.images}: at least one picture of each prompt is needed")
    if command.out.is_dir():
        raise UserError(f"--out = {str(command.out)!r} is a folder: name a PNG in it")
    from ..evaluate import pictures
    from ..evaluate.sampling import FewStepModel

    trained = (run_of(with_strength(command.lora)[0]) if command.lora else None) or RunConfig()
    as_trained = trained.model.model_dump(include={"max_sequence_length", "t5", "resolution"})
    as_trained |= trained.sampler.model_dump(include={"steps", "shift", "solver", "guidance"})
    asked = {name: getattr(command, name) for name in as_trained if getattr(command, name) is not None}
    path = command.model or (command.lora if command.lora in BUNDLED.entries else trained.model.path)
    lora = command.lora or (path if path in BUNDLED.entries else None)
    family = trained.model.family if path == trained.model.path else None
    options = as_trained | asked
    model = FewStepModel(path, lora, **options, family=family, dtype=command.dtype, offload=command.offload)
    images = model([p for p in prompts for _ in range(command.images)], seed=command.seed)
    if len(images) == 1:
        picture = Image.fromarray(images[0])
    else:
        rows = images.reshape(len(prompts), command.images, *images.shape[1:])
        captions = [""] * command.images
        picture = pictures.grid(list(zip(prompts, rows, strict=True)), captions, tile=max(96, images.shape[1]))
    pictures.save_png(picture, command.out)
    Console().print(f"Wrote {command.out}")
    return 0
