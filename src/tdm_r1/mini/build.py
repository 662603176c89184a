"""Builds the mini model from a seed: autoencoder, metrics' network, base model, and the pipeline folder they go to.

Every stage is resumable: what lies in the working folder is used, what does not is made.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderTiny, FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline
from pydantic import BaseModel, ConfigDict
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..errors import UserError
from ..randomness import numpy_rng
from . import autoencoder, bundle, features, pretrain, text
from .autoencoder import AutoencoderConfig
from .pretrain import PretrainConfig
from .world import TASKS, make_spec, render_specs


class MiniConfig(BaseModel):
    """How the mini model is made."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    seed: int = 0
    work: Path = Path("runs/mini_pretrain")  # checkpoints and caches; resumed from
    out: Path = Path("runs/mini_pretrain/model")  # the finished pipeline folder
    bf16: bool = False  # train the autoencoder's convolutions in bfloat16: twice as fast on processors that have it
    compiled: bool = False  # torch.compile the transformer: half as fast again, needs a C++ compiler
    start: Path | None = None  # a pipeline folder of this command to train on, with its autoencoder, not from zero
    autoencoder: AutoencoderConfig = AutoencoderConfig()
    base: PretrainConfig = PretrainConfig()


def build(config: MiniConfig) -> Path:
    """Runs whatever stage is missing and writes the pipeline folder; returns its path."""
    if config.start and not (config.start / "model_index.json").is_file():
        raise UserError(f"start = {str(config.start)!r} is no pipeline folder: give what `tdm-r1 mini path` prints")
    vae = _autoencoder(config)
    net = (config.start or config.work) / "features.safetensors"
    if not net.exists():
        steps = 800
        with _progress("metrics' network", steps) as advance:
            trained = features.train_features(seed=config.seed, steps=steps, on_step=advance)
        features.save_features(trained, net)
    tokenizer = text.build_tokenizer()
    torch.manual_seed(config.seed)
    model = pretrain.MiniBase(tokenizer)
    if config.start:
        _continue_from(config.start, model)
    pool = config.work / f"latents_{config.base.pool_size}.safetensors"
    with _progress("latents", config.base.pool_size) as advance:
        specs, latents = pretrain.scene_pool(config.base, vae, pool, config.seed, lambda n: advance(n - 1, 0.0))
    with _progress("base model", config.base.steps) as advance:
        ema = pretrain.pretrain(
            model,
            tokenizer,
            specs,
            latents,
            config.base,
            seed=config.seed,
            compiled=config.compiled,
            checkpoint=config.work / "base.safetensors",
            on_step=advance,
        )
    assemble(config.out, vae, tokenizer, model, ema)
    (config.out / "features.safetensors").write_bytes(net.read_bytes())
    return config.out


def _autoencoder(config: MiniConfig) -> AutoencoderTiny:
    folder = (config.start or config.work) / "vae"
    if folder.exists():
        return AutoencoderTiny.from_pretrained(folder).to(memory_format=torch.channels_last)
    torch.manual_seed(config.seed)
    vae = autoencoder.build_autoencoder()
    rng = numpy_rng(config.seed, 0, "autoencoder scenes")
    specs = [make_spec(TASKS[i % len(TASKS)], rng) for i in range(config.autoencoder.pool_size)]
    images = render_specs(specs, 100 + config.seed)
    with _progress("autoencoder", config.autoencoder.steps + config.autoencoder.decoder_steps) as advance:
        autoencoder.train_autoencoder(
            vae, images, config.autoencoder, seed=config.seed, bf16=config.bf16, on_step=advance
        )
        autoencoder.sharpen_decoder(
            vae, images, config.autoencoder, seed=config.seed, bf16=config.bf16, on_step=advance
        )
    vae.save_pretrained(folder)
    return vae


def _continue_from(folder: Path, model: pretrain.MiniBase) -> None:
    """Loads transformer and text encoders of an earlier base into ``model``."""
    pipeline = StableDiffusion3Pipeline.from_pretrained(folder, dtype=torch.float32)
    model.transformer.load_state_dict(pipeline.transformer.state_dict())
    for encoder, saved in zip(model.encoders, (pipeline.text_encoder, pipeline.text_encoder_2), strict=True):
        encoder.load_state_dict(saved.state_dict())


def assemble(
    out: Path,
    vae: AutoencoderTiny,
    tokenizer: Any,
    model: pretrain.MiniBase,
    ema: dict[str, Tensor],
) -> None:
    """Writes a `StableDiffusion3Pipeline` folder, the large parts in half precision, that any diffusers user loads."""
    model.load_state_dict(ema)
    null_t5, null_tokenizer = text.build_null_t5()
    pipeline = StableDiffusion3Pipeline(
        transformer=model.transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae,
        text_encoder=model.encoders[0],
        tokenizer=tokenizer,
        text_encoder_2=model.encoders[1],
        tokenizer_2=tokenizer,
        text_encoder_3=null_t5,
        tokenizer_3=null_tokenizer,
    )
    # transformers loads weights as they are saved, diffusers as float32: half text encoders would not fit the rest
    for part in (model.transformer, vae):
        part.half()
    pipeline.save_pretrained(out)
    # AutoencoderTiny writes keys that it does not read, warns of one at every load, and names our folder in the other
    path = out / "vae" / "config.json"
    config = json.loads(path.read_text())
    for key in ("block_out_channels", "_name_or_path"):
        config.pop(key, None)
    path.write_text(json.dumps(config, indent=2) + "\n")


def bundle_student(run: Path, model: Path) -> None:
    """Puts a distilled run's LoRAs beside the pipeline in ``model``, in half precision, metadata kept."""
    for source, target in (("lora", bundle.STUDENT_LORA), ("lora_fake", bundle.FAKE_LORA)):
        file = run / source / "pytorch_lora_weights.safetensors"
        if not file.is_file():
            raise UserError(f"{run} holds no {source}: give the folder of a finished `tdm-r1 distill` run")
        with safe_open(file, framework="pt") as opened:
            metadata = opened.metadata()
        (model / target).mkdir(parents=True, exist_ok=True)
        halves = {name: weight.half() for name, weight in load_file(file).items()}
        save_file(halves, model / target / file.name, metadata=metadata)


@contextmanager
def _progress(label: str, total: int) -> Iterator[Any]:
    """A progress bar with ETA; yields ``advance(step, loss)``."""
    columns = (
        TextColumn(label),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("ETA"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[loss]}"),
    )
    with Progress(*columns, refresh_per_second=1) as progress:
        bar = progress.add_task("", total=total, loss="")
        yield lambda step, loss: progress.update(bar, completed=step + 1, loss=f"loss {loss:.4f}" if loss else "")
