"""Settings of the model: which checkpoints to load, their precision, and the adapters on them."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator

from ..settings import SHAPES_CHECKPOINT, STARTS_RUN, Settings
from .registry import FAMILIES

LORA_TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")


class LoraSettings(Settings):
    """The LoRA adapters in which the roles' weights are."""

    rank: int = Field(32, ge=1, description="default: paper.", json_schema_extra=SHAPES_CHECKPOINT)
    alpha: int = Field(64, ge=1, description="default: the authors' Z-Image LoRA.", json_schema_extra=SHAPES_CHECKPOINT)
    precision: Literal["model", "float32"] = Field(
        "model",
        description="In which adapters compute: the model's (the authors' code), or float32, which on a bfloat16 model "
        "is slower and needs more memory. Their weights and updates are float32 in any case.",
    )
    targets: tuple[str, ...] = Field(
        LORA_TARGETS,
        description="Modules by the end of their names; default: ours, the attention's projections.",
        json_schema_extra=SHAPES_CHECKPOINT,
    )


class ModelConfig(Settings):
    """Which checkpoints to load, and their precision."""

    path: str = Field(
        "mini", description="'mini', 'mini_signs', a hub id or a folder with a diffusers pipeline: student and teacher."
    )
    family: str | None = Field(
        None,
        description="Class of the model: sd3, z_image or your own as package.module:Class; else by the pipeline's "
        "class.",
    )
    teacher: str | None = Field(None, description="Another pipeline as teacher, if the student's base differs.")
    student_lora: str | None = Field(
        None,
        description="A LoRA, by folder or hub id, that the generator starts from.",
        json_schema_extra=STARTS_RUN,
    )
    student_lora_scale: float | None = Field(
        None,
        gt=0,
        json_schema_extra=STARTS_RUN,
        description="Scale at which its publisher loads student_lora, where one is named (TDM-SD3: 0.125); needed for "
        "a file without adapter metadata.",
    )
    fake_lora: str | None = Field(
        None,
        description="A LoRA folder that the fake score starts from; else the model at `path`.",
        json_schema_extra=STARTS_RUN,
    )
    surrogate_lora: str | None = Field(
        None,
        description="A LoRA folder that the surrogate starts from, as a run leaves it in lora_surrogate; else the "
        "teacher.",
        json_schema_extra=STARTS_RUN,
    )
    max_sequence_length: int = Field(256, ge=1, le=512, description="Tokens of a prompt; mini models use their own.")
    t5: bool = Field(
        True, description="SD3: load T5, by far the largest of its text encoders; without it CLIP alone reads prompts."
    )
    resolution: int | None = Field(None, ge=16, description="Side of the images in px; else the model's own.")
    dtype: Literal["float32", "bfloat16"] = Field("float32", description="Precision of the frozen backbone.")
    device: str = Field(
        "auto",
        description="auto, cpu or cuda; CUDA_VISIBLE_DEVICES selects the GPU, also for rewards in the same process.",
    )
    roles: Literal["lora", "full"] = Field(
        "lora",
        description="lora: every role is an adapter on one backbone. full: every role is a copy of it.",
        json_schema_extra=SHAPES_CHECKPOINT,
    )
    shard: bool = Field(
        False,
        description="Spread transformers over the processes of the run (FSDP2): the frozen ones, and those of roles of "
        "full weights with their optimizers; adapters stay whole in each.",
    )
    merge: bool = Field(
        False,
        description="Run every adapter as a merged copy of the weights, also where it is trained: faster for small "
        "models, costs memory; in float32 alone.",
    )
    gradient_checkpointing: Literal["auto"] | bool = Field(
        "auto",
        description="Recompute activations in the backward pass instead of keeping them: slower, less memory. auto: "
        "where they do not fit into a GPU's free memory by the estimate of --dry-run, with model.shard, and where no "
        "estimate is known. Rewards that start later on the same GPU (scoring.workers) are not counted: true then. "
        "Default: ours.",
    )
    offload: bool = Field(
        False, description="Keep text encoders and autoencoder in main memory while they are not used."
    )
    decode_batch: int = Field(32, ge=1, description="Images that the autoencoder decodes at once.")
    vae_tiling: bool = Field(
        False, description="Decode images in overlapping tiles: less memory at high resolutions, faint seams."
    )
    lora: LoraSettings = LoraSettings()

    @field_validator("family")
    @classmethod
    def _known(cls, value: str | None) -> str | None:
        if value is not None:
            FAMILIES.check(value)
        return value


def check_model(m: ModelConfig) -> None:
    """Raises ValueError on settings of the model that contradict each other."""
    loras = {f"model.{name}": getattr(m, name) for name in ("student_lora", "fake_lora", "surrogate_lora")}
    for name, value in loras.items():
        if m.roles == "full" and value:
            raise ValueError(
                f"{name} = {value!r} with model.roles = full: a LoRA starts adapters alone; merge it into the model at "
                f"model.path and set {name} to null"
            )
    if m.shard and m.merge:
        raise ValueError(
            "model.shard = True with model.merge = True: merged copies are whole; set model.merge to false"
        )
    if m.merge and m.dtype != "float32":
        raise ValueError(
            f"model.merge = True with model.dtype = {m.dtype}: small changes to merged weights are lost in {m.dtype}; "
            "set model.merge to false"
        )
