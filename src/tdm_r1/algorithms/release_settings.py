"""Settings of the authors' released training code for TDM-R1 (`tdm_r1_release`). Free of torch.

Defaults are the release's for GenEval unless a description says otherwise; an alternative beside one is the paper's or
ours, so that each choice can be tried alone.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from ..settings import SHAPES_CHECKPOINT, Settings
from .optimizer_settings import OptimizerConfig


class ReleaseConfig(Settings):
    """TDM-R1 as the authors released it for Stable Diffusion 3.5 Medium."""

    generator: OptimizerConfig = OptimizerConfig(
        learning_rate=7.5e-5, betas=(0.0, 0.999), weight_decay=1e-4, warmup_steps=1
    )
    fake: OptimizerConfig = OptimizerConfig(learning_rate=3e-4, betas=(0.0, 0.999), weight_decay=1e-4, warmup_steps=1)
    surrogate: OptimizerConfig = OptimizerConfig(
        learning_rate=3e-4, betas=(0.9, 0.999), weight_decay=1e-4, warmup_steps=1
    )
    generator_ema_decay: float = Field(
        0.9,
        ge=0,
        lt=1,
        description="EMA decay of the averaged generator, which is evaluated and exported; after n updates at most "
        "(1 + n) / (10 + n); default: release.",
    )
    trained_steps: int = Field(
        2, ge=1, description="Steps of the trajectory that an iteration trains, the same for all; default: release."
    )
    time_block: int | None = Field(
        None,
        ge=1,
        description="Consecutive samples that share t, and the surrogate's step; default: the whole group, ours "
        "(release: the 12 samples on one GPU).",
    )
    deviation: Literal["batch", "group"] = Field(
        "batch", description="Scores are divided by the whole batch's deviation (release) or their group's (paper)."
    )
    advantage_clip: float | None = Field(5.0, gt=0, description="Largest |A|, null for none; default: release.")

    fake_target: Literal["clean", "point"] = Field(
        "clean",
        description="The fake score learns the velocity to the step's clean prediction (release), or back to x_s as in "
        "Eq. 1 (ours).",
    )
    fake_anchor: float = Field(0.02, ge=0, description="Weight of |v_fake - v_teacher|^2; default: release.")

    loss: Literal["sigmoid", "linear"] = Field(
        "sigmoid", description="sigmoid: Eq. 9, its slope held constant (release). linear: slope 1/2 throughout (ours)."
    )
    beta: float = Field(1.0, gt=0, description="Of the sigmoid; default: release (10 for OCR and HPS; paper: 100).")
    reference: Literal["static", "dynamic"] = Field(
        "static",
        json_schema_extra=SHAPES_CHECKPOINT,
        description="static: the teacher (release). dynamic: an average of phi (paper).",
    )
    reference_decay: float = Field(0.995, ge=0, lt=1, description="Decay of the dynamic reference; default: ours.")
    clip: float | None = Field(
        1e-3,
        gt=0,
        json_schema_extra=SHAPES_CHECKPOINT,
        description="PPO's clip against an average that trails by less than an update; null for none; default: "
        "release (2e-3 for ImageReward and HPS).",
    )
    distance_limit: float | None = Field(
        0.05,
        gt=0,
        description="Mean |v_phi - v_ref|^2 above which samples that have moved their way are held; null for never; "
        "default: release.",
    )
    anchor: float = Field(0.001, ge=0, description="Weight of |v_phi - v_ref|^2; default: release.")
    step_weights: Literal["late", "equal"] = Field(
        "late",
        description="late: the surrogate's step is drawn 1 : 2 : 3 : 4 towards x_0, and its loss weighted as much over "
        "K (release). equal: neither (paper).",
    )
    surrogate_low: float = Field(
        0.55,
        ge=0,
        lt=0.95,
        description="Least t of the surrogate's training, unshifted; default: release (.30 for OCR).",
    )
    shared_noise: bool = Field(
        True, description="One noise per group for the surrogate and the reward's part; default: release."
    )

    teacher_guidance: float = Field(4.5, ge=1, description="Guidance scale of the teacher; default: release.")
    tdm_weight: float = Field(
        0.3,
        ge=0,
        le=1,
        description="Weight of guidance as a reward; the surrogate's is one minus it; default: release.",
    )
    kl: Literal["unguided", "guided"] = Field(
        "unguided",
        description="unguided: KL to the teacher without guidance, which is a reward beside it (release). guided: KL "
        "to the guided teacher (paper).",
    )
    surrogate_guidance: float = Field(
        2.5, ge=1, description="Guidance scale of the surrogate; default: release (4.5 OCR, 3.5 ImageReward and HPS)."
    )
    reward_low: float = Field(
        0.25,
        ge=0,
        lt=0.95,
        description="Least t of the reward's part, unshifted; default: release (.30 OCR, .40 ImageReward and HPS).",
    )
    normalizer: Literal["each", "kl"] = Field(
        "each", description="The reward's part has its own normaliser (release) or the KL part's (paper)."
    )
    rewarded_steps: int | None = Field(
        None,
        ge=1,
        description="First steps that get the reward; the others get tdm_weight times TDM; default: all (release: 2 "
        "for ImageReward and HPS).",
    )
    normalizer_floor: float = Field(1e-3, gt=0, description="Least value of the normalisers; default: ours.")
