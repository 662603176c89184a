"""Builds a mini model from a seed: autoencoder, metrics' network, base model, and the pipeline folder they go to.

Every stage is resumable: what lies in the working folder is used, what does not is made.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import yaml
from diffusers import AutoencoderTiny, FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..config.run import CONFIG_FILE
from ..core.randomness import numpy_rng
from ..errors import UserError
from ..files import write_text
from ..settings import Settings
from . import autoencoder, bundle, features, pretrain, signs, text
from .autoencoder import AutoencoderConfig
from .pretrain import PretrainConfig
from .worlds import modules_of, render_specs


class MiniConfig(Settings):
    """How a mini model is made."""

    seed: int = 0
    work: Path = Path("runs/mini_pretrain")  # checkpoints and caches; resumed from
    out: Path = Path("runs/mini_pretrain/model")  # the finished pipeline folder
    bf16: bool = False  # train the autoencoder's convolutions in bfloat16: twice as fast on processors that have it
    compiled: bool = False  # torch.compile the transformer: half as fast again, needs a C++ compiler
    start: Path | None = None  # a pipeline folder of this command to train on, with its autoencoder, not from zero
    new_pictures: bool = False  # with start: train its autoencoder on, and a metrics' network, for families new to it
    autoencoder: AutoencoderConfig = AutoencoderConfig()
    base: PretrainConfig = PretrainConfig()


def preset(name: str) -> MiniConfig:
    """How the bundled model ``name`` is made; that of shapes and signs goes on from the one of shapes."""
    if name == "mini":
        return MiniConfig()
    shapes = {tag: round(0.4 * weight, 3) for tag, weight in PretrainConfig().task_weights.items()}
    return MiniConfig(
        work=Path(f"runs/{name}_pretrain"),
        out=Path(f"runs/{name}_pretrain/model"),
        start=bundle.bundle_path("mini"),
        new_pictures=True,
        autoencoder=AutoencoderConfig(steps=1600, learning_rate=8e-4),
        base=PretrainConfig(steps=3600, task_weights=shapes | {signs.TASK: 0.6}),
    )


def build(config: MiniConfig) -> Path:
    """Runs whatever stage is missing and writes the pipeline folder; returns its path.

    Raises UserError if the working folder is of another model: its pictures would go with this one's captions.
    """
    if config.start and not (config.start / "model_index.json").is_file():
        raise UserError(f"start = {str(config.start)!r} is no pipeline folder: give what `tdm-r1 mini path` prints")
    _same_model(config)
    made = config.work if config.new_pictures or not config.start else config.start  # autoencoder, metrics' network
    vae = _autoencoder(config, made / "vae")
    net = made / "features.safetensors"
    if not net.exists():
        steps = 800
        with _progress("metrics' network", steps) as advance:
            trained = features.train_features(config.base.tags, seed=config.seed, steps=steps, on_step=advance)
        features.save_features(trained, net)
    tokenizer = text.build_tokenizer(word for world in modules_of(config.base.tags) for word in world.WORDS)
    torch.manual_seed(config.seed)
    model = pretrain.MiniBase(tokenizer)
    if config.start:
        _continue_from(config.start, model, tokenizer)
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


def _same_model(config: MiniConfig) -> None:
    """Keeps the settings in the working folder, and refuses it if they are others than those it was begun with."""
    free: Any = {"work": True, "out": True, "bf16": True, "compiled": True, "base": {"steps", "save_every"}}
    file, wanted = config.work / CONFIG_FILE, config.model_dump(mode="json", exclude=free)
    begun = yaml.safe_load(file.read_text(encoding="utf-8")) if file.exists() else wanted
    if not file.exists() and any(config.work.glob("*.safetensors")):
        raise UserError(
            f"work = {str(config.work)!r} is of an earlier version: give another --work, or delete that folder"
        )
    if other := [name for name in wanted | begun if wanted.get(name) != begun.get(name)]:
        raise UserError(
            f"work = {str(config.work)!r} holds a model that was begun with another {', '.join(other)} "
            f"({CONFIG_FILE} there): give another --work and --out, or delete that folder"
        )
    write_text(file, yaml.safe_dump(wanted, sort_keys=False))


def _autoencoder(config: MiniConfig, folder: Path) -> AutoencoderTiny:
    if folder.exists():
        return _load_autoencoder(folder)
    torch.manual_seed(config.seed)
    vae = _load_autoencoder(config.start / "vae") if config.start else autoencoder.build_autoencoder()
    rng = numpy_rng(config.seed, 0, "autoencoder scenes")
    images = render_specs(config.base.draw_specs(config.autoencoder.pool_size, rng), 100 + config.seed)
    with _progress("autoencoder", config.autoencoder.steps + config.autoencoder.decoder_steps) as advance:
        autoencoder.train_autoencoder(
            vae, images, config.autoencoder, seed=config.seed, bf16=config.bf16, on_step=advance
        )
        autoencoder.sharpen_decoder(
            vae, images, config.autoencoder, seed=config.seed, bf16=config.bf16, on_step=advance
        )
    vae.save_pretrained(folder)
    return vae


def _load_autoencoder(folder: Path) -> AutoencoderTiny:
    return AutoencoderTiny.from_pretrained(folder).to(memory_format=torch.channels_last)


def _continue_from(folder: Path, model: pretrain.MiniBase, tokenizer: text.CLIPTokenizer) -> None:
    """Loads transformer and text encoders of an earlier base into ``model``; words without a token there stay new."""
    pipeline = StableDiffusion3Pipeline.from_pretrained(folder, dtype=torch.float32)
    model.transformer.load_state_dict(pipeline.transformer.state_dict())
    old = pipeline.tokenizer.get_vocab()
    known = [(new, old[token]) for token, new in tokenizer.get_vocab().items() if token in old]
    rows, source = torch.tensor(known).unbind(1)
    for encoder, saved in zip(model.encoders, (pipeline.text_encoder, pipeline.text_encoder_2), strict=True):
        state, fresh = saved.state_dict(), encoder.state_dict()
        words = next(name for name in state if name.endswith("token_embedding.weight"))
        fresh[words][rows] = state[words][source].to(fresh[words])
        encoder.load_state_dict(state | {words: fresh[words]})


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
