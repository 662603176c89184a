"""Settings of the baselines: DGPO, Flow-GRPO, DiffusionNFT. Free of torch.

Defaults are those of each method's own code for Stable Diffusion 3.5 Medium unless a description says otherwise.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from ..settings import Settings
from .optimizer_settings import OptimizerConfig


class PolicyConfig(Settings):
    """What the baselines have in common: one model that is trained on its own samples."""

    optimizer: OptimizerConfig = OptimizerConfig(
        learning_rate=3e-4, betas=(0.9, 0.999), weight_decay=1e-4, warmup_steps=1
    )
    ema_decay: float = Field(
        0.9,
        ge=0,
        lt=1,
        description="EMA decay of the weights that are evaluated and exported; after n updates at most "
        "(1 + n) / (10 + n).",
    )
    deviation: Literal["batch", "group"] = Field(
        "batch", description="Scores are divided by the whole batch's deviation, or by their group's."
    )
    advantage_clip: float = Field(5.0, gt=0, description="Largest |A|.")


class DGPOConfig(PolicyConfig):
    """DGPO (arXiv 2510.08425); defaults: its authors' code for SD3.5-M, where nothing else is said."""

    deviation: Literal["batch", "group"] = Field(
        "group", description="Scores are divided by their group's deviation (GenEval), or the whole batch's (OCR)."
    )
    beta: float = Field(100.0, gt=0, description="Of the sigmoid over a group; it does not scale the gradient.")
    kl_weight: float = Field(0.02, ge=0, description="Weight of |v - v_ref|^2.")
    clip: float = Field(1e-2, gt=0, description="PPO's clip against an average of the weights.")
    draws: int = Field(4, ge=1, description="Noise levels of an update, shared by all samples.")
    time_low: float = Field(
        0.6, ge=0, le=1, description="Least noise level, unshifted, of the sampler's steps that are drawn from."
    )
    roll_out_average_after: int = Field(
        500,
        ge=0,
        description="Updates after which samples come from the average that the clip is taken against (200 for OCR).",
    )
    direct_weight: float = Field(
        1.0, gt=0, description="For tdm_direct_rl: the weight of this loss beside TDM's; default: ours."
    )


class FlowGRPOConfig(PolicyConfig):
    """Flow-GRPO (arXiv 2505.05470); defaults: its authors' code for SD3.5-M, where nothing else is said."""

    noise_level: float = Field(
        0.7, gt=0, description="a in the sampler's noise, a sqrt(t / (1 - t)); fewer steps need less."
    )
    clip: float = Field(1e-4, gt=0, description="PPO's clip of the likelihood ratio.")
    kl_weight: float = Field(0.04, ge=0, description="Weight of the KL to the start, of each step of the sampler.")
    updates: int = Field(2, ge=1, description="Updates per rollout, each on as many of its samples.")


class NFTConfig(PolicyConfig):
    """DiffusionNFT (arXiv 2509.16117); defaults: its authors' code for SD3.5-M, where nothing else is said."""

    mixture: float = Field(1.0, gt=0, description="b in v+ = b v + (1 - b) v_old and v- = (1 + b) v_old - b v.")
    kl_weight: float = Field(1e-4, ge=0, description="Weight of |v - v_ref|^2.")
    old_decay: float = Field(
        0.5,
        ge=0,
        lt=1,
        description="Bound of the decay of the average that makes the samples, which is 0.001 n after n updates.",
    )
