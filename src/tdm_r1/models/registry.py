"""Model families and bundled models by name. Nothing heavy is imported here."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..plugins import Registry

FAMILIES = Registry(
    "model.family", {"sd3": "tdm_r1.models.sd3:SD3Backbone", "z_image": "tdm_r1.models.z_image:ZImageBackbone"}
)
BUNDLED = Registry("model.path", {"mini": "tdm_r1.mini.bundle:mini", "mini_signs": "tdm_r1.mini.bundle:mini_signs"})


@dataclass(frozen=True)
class BundledModel:
    """A model that comes with the package: a pipeline folder and the two LoRAs of its few-step student."""

    pipeline: Path
    student_lora: Path
    fake_lora: Path
    max_sequence_length: int


def bundled(name: str) -> BundledModel | None:
    """The bundled model of that name; None if there is none. Raises UserError if its folder is missing."""
    return BUNDLED.load(name)() if name in BUNDLED.entries else None


def lora_path(lora: str) -> str | Path:
    """Where a LoRA is: a folder or hub id; a bundled model's name means its few-step student."""
    found = bundled(lora)
    return found.student_lora if found else lora


def with_strength(text: str) -> tuple[str, float | None]:
    """``folder@0.125`` as ("folder", 0.125); without a number behind the last @ the text itself, and None."""
    name, at, number = text.rpartition("@")
    try:
        return (name, float(number)) if at else (text, None)
    except ValueError:
        return text, None
