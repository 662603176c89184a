"""Loads what the settings of the model name: backbones, devices, starts."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from peft import LoraConfig

from ..core import processes
from ..errors import UserError
from .pipeline import PipelineBackbone, load_backbone
from .registry import bundled, lora_path
from .settings import ModelConfig


@dataclass(frozen=True)
class Checkpoints:
    """Where a model's parts are; a bundled model fills in what its name stands for."""

    path: str
    student_lora: str | Path | None
    fake_lora: str | Path | None
    max_sequence_length: int


def resolve_model(config: ModelConfig) -> Checkpoints:
    """The checkpoints that the settings mean."""
    student = lora_path(config.student_lora) if config.student_lora else None
    found = bundled(config.path)
    if found is None:
        return Checkpoints(config.path, student, config.fake_lora, config.max_sequence_length)
    fake: str | Path | None = config.fake_lora
    if config.student_lora == config.path:
        fake = fake or found.fake_lora
    return Checkpoints(str(found.pipeline), student, fake, found.max_sequence_length)


def resolve_device(name: str) -> str:
    """``auto`` is the first GPU if there is one. Raises UserError on a device that is not there."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.zeros(1, device=name)
    except (RuntimeError, AssertionError) as error:
        why = str(error).splitlines()[0]
        raise UserError(f"model.device = {name!r} cannot be used: {why}; set it to auto or cpu") from error
    return name


def load_backbones(config: ModelConfig) -> tuple[PipelineBackbone, PipelineBackbone | None]:
    """The student's backbone, and the teacher's where it is another one."""
    m, checkpoints = config, resolve_model(config)
    load = partial(
        load_backbone,
        family=m.family,
        max_sequence_length=checkpoints.max_sequence_length,
        dtype=getattr(torch, m.dtype),
        device=resolve_device(m.device),
        resolution=m.resolution,
        decode_batch=m.decode_batch,
        tiling=m.vae_tiling,
        offload=m.offload,
        gradient_checkpointing=m.gradient_checkpointing is True,
        t5=m.t5,
        apart=m.shard and processes.count() > 1,
    )
    student = load(checkpoints.path)
    return student, load(m.teacher, beside=student) if m.teacher else None


def adapter_settings(config: ModelConfig) -> LoraConfig:
    """peft's settings of the roles' adapters."""
    return LoraConfig(
        r=config.lora.rank,
        lora_alpha=config.lora.alpha,
        init_lora_weights="gaussian",
        target_modules=list(config.lora.targets),
    )
