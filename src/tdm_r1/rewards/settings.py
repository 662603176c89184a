"""Settings of scoring."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from ..settings import Settings


class ScoringConfig(Settings):
    """Where and how rewards are computed. Every default is ours."""

    workers: int = Field(0, ge=0, description="Processes for each reward; 0 scores in the training process.")
    timeout: float = Field(60.0, gt=0, description="Seconds that a worker or a server may take for a chunk.")
    load_timeout: float = Field(
        1800.0, gt=0, description="Seconds that a worker may take to load its reward, downloads included."
    )
    chunk: int = Field(16, ge=1, description="Samples a call, in workers and to a server.")
    normalize: Literal["none", "group"] = Field(
        "none", description="group: each reward of a sum is given mean 0 and deviation 1 in each group first."
    )
