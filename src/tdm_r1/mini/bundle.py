"""The bundled mini models: SD3 pipeline folders, each with two LoRAs and the metrics' network beside it."""

from __future__ import annotations

import os
from pathlib import Path

from ..errors import UserError
from ..models.registry import BundledModel

MAX_SEQUENCE_LENGTH = 1  # zero tokens in the absent T5's place; what the bases were trained with
STUDENT_LORA = "tdm_4step"  # folders beside the pipeline's own
FAKE_LORA = "tdm_4step_fake"
MODELS = {"mini": "TDM_R1_MINI", "mini_signs": "TDM_R1_MINI_SIGNS"}  # name: the variable that names another folder


def bundle_path(name: str = "mini") -> Path:
    """The folder of a mini model: its environment variable if that is set, else the one that came with the package.

    Raises UserError if there is none.
    """
    override = os.environ.get(MODELS[name])
    folder = Path(override) if override else Path(__file__).parent / "models" / name
    if not folder.is_dir():
        raise UserError(f"{folder} does not exist: set {MODELS[name]} to the folder of a {name} model")
    return folder


def mini() -> BundledModel:
    """The model of shapes."""
    return _bundled("mini")


def mini_signs() -> BundledModel:
    """The model of shapes and signs."""
    return _bundled("mini_signs")


def _bundled(name: str) -> BundledModel:
    folder = bundle_path(name)
    return BundledModel(folder, folder / STUDENT_LORA, folder / FAKE_LORA, MAX_SEQUENCE_LENGTH)
