"""Settings of one role's optimizer. Free of torch."""

from __future__ import annotations

from pydantic import Field

from ..settings import SHAPES_CHECKPOINT, Settings


class OptimizerConfig(Settings):
    """AdamW of one role."""

    learning_rate: float = Field(1e-4, gt=0, description="default: ours, one for each role.")
    betas: tuple[float, float] = Field((0.0, 0.95), description="default: TDM (PixArt).")
    weight_decay: float = Field(0.0, ge=0, description="default: ours.")
    max_grad_norm: float = Field(1.0, gt=0, description="default: ours.")
    warmup_steps: int = Field(10, ge=1, description="Updates of linear warm-up; default: ours.")
    decay_share: float = Field(
        0.0, ge=0, le=1, description="Last share of the run in which the rate falls linearly to zero; default: ours."
    )
    eight_bit: bool = Field(
        False,
        description="AdamW's averages in 8 bits (bitsandbytes): for full weights, of little use for LoRA.",
        json_schema_extra=SHAPES_CHECKPOINT,
    )
