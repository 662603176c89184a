"""Where the bundled mini model lies: an SD3 pipeline folder, two LoRAs beside it, and the metrics' network."""

from __future__ import annotations

import os
from pathlib import Path

MAX_SEQUENCE_LENGTH = 1  # zero tokens in the absent T5's place; what the base was trained with
STUDENT_LORA = "tdm_4step"  # folders beside the pipeline's own
FAKE_LORA = "tdm_4step_fake"


def bundle_path() -> Path:
    """The folder of the mini model: $TDM_R1_MINI if set, else the one that came with the package."""
    override = os.environ.get("TDM_R1_MINI")
    return Path(override) if override else Path(__file__).parent / "model"
