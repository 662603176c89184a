"""Writes a run's roles for plain diffusers."""

from __future__ import annotations

from pathlib import Path

from ..files import whole_folder
from ..models.export import exported
from ..models.load import adapter_settings
from ..models.pipeline import PipelineBackbone
from ..models.roles import Roles
from ..models.settings import ModelConfig
from ..models.specification import evaluated


def export_roles(folder: Path, config: ModelConfig, backbone: PipelineBackbone, roles: Roles) -> None:
    """What the roles declare: LoRAs, or, where roles have weights of their own, the evaluated one as a whole
    transformer."""
    if config.roles == "full":
        with whole_folder(folder / "transformer") as partial:
            roles.transformer(evaluated(roles.specs)).save_pretrained(partial)
        return
    for spec in roles.specs:
        if spec.exported_as:
            with whole_folder(folder / spec.exported_as) as partial:
                backbone.save_lora(partial, *exported(roles, spec.name, adapter_settings(config)))
