"""Writes a run's roles for plain diffusers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..files import whole_folder
from ..models.export import exported
from ..models.load import adapter_settings
from ..models.pipeline import PipelineBackbone
from ..models.roles import Roles
from ..models.settings import ModelConfig
from ..models.specification import evaluated


def export_roles(folder: Path, config: ModelConfig, backbone: PipelineBackbone, roles: Roles, whole: Any) -> None:
    """What the roles declare: an adapter as a LoRA, the evaluated role's own weights as a whole transformer.

    Args:
        whole: the evaluated role's transformer, with all its weights (`Roles.whole`).
    """
    for spec in roles.specs:
        if spec.weights == "full" and spec.name == evaluated(roles.specs):
            with whole_folder(folder / "transformer") as partial:
                whole.save_pretrained(partial)
        elif spec.weights == "lora" and spec.exported_as:
            with whole_folder(folder / spec.exported_as) as partial:
                backbone.save_lora(partial, *exported(roles, spec.name, adapter_settings(config)))
