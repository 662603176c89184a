"""Settings of the algorithms, and the rules between them. Free of torch.

Descriptions name the source of a default: the paper (TDM-R1), another project, or ours.
"""

from __future__ import annotations

from typing import Any, Literal, Protocol

from pydantic import Field, field_validator, model_validator

from ..models.settings import ModelConfig
from ..settings import SHAPES_CHECKPOINT, Settings
from .baseline_settings import DGPOConfig, FlowGRPOConfig, NFTConfig
from .optimizer_settings import OptimizerConfig
from .release_settings import ReleaseConfig

Solver = Literal["euler", "dpm", "stochastic"]
NoiseRange = Literal["to_noise", "interval"]


class SamplerConfig(Settings):
    """The few-step sampler, in training and afterwards."""

    steps: int = Field(4, ge=1, description="Forward evaluations per image, K; default: paper.")
    shift: float = Field(3.0, gt=0, description="Shift of the time grid towards noise; default: SD3.")
    solver: Solver = Field("euler", description="euler, dpm (Flow-DPM-Solver, as the paper) or stochastic.")
    guidance: float = Field(
        1.0,
        ge=1,
        description="Guidance scale of sampling, for many-step models; few-step ones need none; default: none.",
    )


class BatchConfig(Settings):
    """One iteration's samples."""

    prompts: int = Field(8, ge=1, description="Prompts (groups) per iteration; default: ours.")
    group: int = Field(24, ge=1, description="Samples per prompt that are scored, G; default: paper.")
    trained: int | None = Field(
        None,
        ge=1,
        description="Samples per group used in each update; default: all (ours). The surrogate uses those with the "
        "highest and lowest scores.",
    )
    kl_prompts: int = Field(
        0,
        ge=0,
        description="More prompts per iteration, of one sample each, without reward: KL alone holds the generator "
        "there, to keep abilities that are not rewarded. They are drawn from task.kl; default: none, ours.",
    )
    micro_batch: int = Field(
        128, ge=1, description="Samples that go through the network at once; does not affect results."
    )

    @property
    def trained_of_group(self) -> int:
        """Samples of a group that each update sees."""
        return self.trained or self.group


class TDMConfig(Settings):
    """Settings of TDM. Those of the mini recipes were measured (docs/notes)."""

    generator: OptimizerConfig = OptimizerConfig(learning_rate=2e-4, decay_share=0.5)
    fake: OptimizerConfig = OptimizerConfig(learning_rate=4e-4)
    fake_steps: int = Field(2, ge=1, description="Fake-score updates per generator update; default: ours, docs/notes.")
    teacher_guidance: float = Field(3.0, ge=1, description="Guidance scale of the teacher, 1 for none; default: ours.")
    generator_ema_decay: float = Field(
        0.98,
        ge=0,
        lt=1,
        description="EMA decay of the averaged generator, which is evaluated and exported; default: ours.",
    )
    fake_scores: Literal["one", "two"] = Field(
        "two",
        json_schema_extra=SHAPES_CHECKPOINT,
        description="one: a fake score for all points of the trajectory (TDM). two: x_0 has its own, trained on the "
        "final samples alone; default: ours, docs/method.md.",
    )
    noise_range: NoiseRange = Field(
        "to_noise",
        description="t of the fake score and the KL part is drawn in [t_k, 1) or in [t_k, t_{k+1}); TDM has both.",
    )
    normalizer_floor: float = Field(0.05, gt=0, description="Least value of DMD's normaliser; default: ours.")


class SurrogateConfig(Settings):
    """How the surrogate reward is learned from group preferences."""

    weights: Literal["lora", "full"] = Field(
        "lora",
        json_schema_extra=SHAPES_CHECKPOINT,
        description="lora: an adapter on the backbone (paper). full: a transformer of its own, as is its average; it "
        "needs more memory; ours, docs/notes. With model.roles = full it is full in any case.",
    )
    loss: Literal["anchored", "preference"] = Field(
        "anchored", description="anchored: a convex regression, ours. preference: Eq. 9 and 18 of the paper."
    )
    reference: Literal["dynamic", "static", "fake"] = Field(
        "static", description="dynamic: average of phi (paper). static: phi's start, ours. fake: the fake score."
    )
    baseline: Literal["reference", "fake"] = Field(
        "fake", description="What the anchored target is measured from; fake makes it exact; default: ours, docs/notes."
    )
    trust_region: Literal["none", "clip", "anchor"] = Field(
        "none",
        description="Of the preference loss: none (paper), a clip of the log-ratio, or a quadratic anchor to the "
        "reference (both ours).",
    )
    clip: float = Field(
        1e-3,
        gt=0,
        description="Largest gain |l_phi - l_ref| that still gives gradient (trust_region clip); default: ours.",
    )
    anchor_weight: float = Field(
        10.0, ge=0, description="Weight of |v_phi - v_ref|^2 (trust_region anchor); default: ours."
    )
    beta: float = Field(100.0, gt=0, description="default: paper; tied to losses that are means over dimensions.")
    kappa: float = Field(1.0, gt=0, description="Scale of the anchored target; default: ours.")
    trained_share: float = Field(
        1.0,
        gt=0,
        le=1,
        description="Share of a group's trained samples that the surrogate learns from: those with the highest and "
        "lowest scores, at least two; default: all (paper). Half of them takes less time, and lowers the score of "
        "longer runs (docs/notes).",
    )
    measured_groups: int = Field(
        2, ge=0, description="Fresh groups per iteration on which phi is measured first; default: ours."
    )
    draws: int = Field(
        4,
        ge=0,
        description="(k, t, noise) draws, each an update, per rollout; 0 for a frozen surrogate, which starts from "
        "model.surrogate_lora; default: ours, docs/notes.",
    )
    points: Literal["all", "final"] = Field(
        "final",
        description="Trajectory points that phi learns from: every x_{t_k} (paper), or x_0 alone; default: ours.",
    )
    time_range: tuple[float, float] = Field(
        (0.3, 0.95),
        description="Noise levels at which phi is trained and used; outside, the KL part acts alone; default: ours.",
    )
    shared_noise: bool = Field(True, description="One t, k and noise per group; default: DGPO.")
    reference_decay: float = Field(0.995, ge=0, lt=1, description="Decay of the dynamic reference; default: ours.")
    ema_decay: float = Field(
        0.98, ge=0, lt=1, description="Decay of the average of phi whose direction is used; default: ours, docs/notes."
    )
    added_delta: float = Field(
        1.5,
        ge=0,
        description="Weight at which the averaged phi's change of weights is added to generator and fake score; 0: the "
        "paper; default: ours, docs/method.md.",
    )
    added_delta_exported: float | None = Field(
        None,
        gt=0,
        description="The same for the averaged generator, which is evaluated and exported; training does not use it. "
        "None: as added_delta. Ours, docs/notes.",
    )
    optimizer: OptimizerConfig = OptimizerConfig(learning_rate=3e-4, betas=(0.9, 0.99))

    @field_validator("time_range")
    @classmethod
    def _ordered(cls, value: tuple[float, float]) -> tuple[float, float]:
        low, high = value
        if not 0 <= low < high <= 1:
            raise ValueError("must satisfy 0 <= low < high <= 1; use for example 0.3 0.95")
        return value

    @model_validator(mode="after")
    def _check(self) -> SurrogateConfig:
        if self.added_delta_exported and not self.added_delta:
            raise ValueError(
                f"surrogate.added_delta_exported = {self.added_delta_exported} with added_delta = 0: the exported "
                "generator adds what training adds; set surrogate.added_delta, or added_delta_exported to null"
            )
        if self.reference == "dynamic" and self.ema_decay >= self.reference_decay:
            raise ValueError(
                f"surrogate.ema_decay = {self.ema_decay} with reference_decay = {self.reference_decay}: the reward is "
                "the averaged phi against its dynamic reference, a slower average; lower ema_decay"
            )
        return self


class BalanceConfig(Settings):
    """The weight of the reward's part of the generator's direction against the KL part."""

    policy: Literal["fixed", "ratio"] = Field(
        "fixed",
        description="fixed: a guidance scale, ours. ratio: a slow, bounded controller towards reward:KL = ratio.",
    )
    scale: float = Field(
        4.0, ge=0, description="The guidance scale, and the controller's start; default: ours, docs/notes."
    )
    ratio: float = Field(2.0, gt=0, description="reward:KL of the gradient; default: paper.")
    limit: float | None = Field(
        0.1,
        gt=0,
        description="Largest component of the reward's part against the KL part: its mean size over the normaliser, "
        "times the negative cosine between the two. While it is larger, a controller weakens the scale and what is "
        "added to the generator. null for no limit. It acts with policy fixed alone; default: ours, docs/notes.",
    )
    rate: float = Field(0.02, gt=0, description="The controller's step in log scale; default: ours.")
    bounds: tuple[float, float] = Field((0.5, 20.0), description="Bounds of the controlled scale; default: ours.")


class AlgorithmSettings(Protocol):
    """What an algorithm reads of a run's settings (`config.RunConfig` has it)."""

    @property
    def algorithm(self) -> str: ...
    @property
    def iterations(self) -> int: ...
    @property
    def model(self) -> ModelConfig: ...
    @property
    def batch(self) -> BatchConfig: ...
    @property
    def sampler(self) -> SamplerConfig: ...
    @property
    def tdm(self) -> TDMConfig: ...
    @property
    def surrogate(self) -> SurrogateConfig: ...
    @property
    def balance(self) -> BalanceConfig: ...
    @property
    def release(self) -> ReleaseConfig: ...
    @property
    def dgpo(self) -> DGPOConfig: ...
    @property
    def flow_grpo(self) -> FlowGRPOConfig: ...
    @property
    def nft(self) -> NFTConfig: ...
    @property
    def algorithm_settings(self) -> dict[str, Any]: ...


def check_tdm(settings: AlgorithmSettings) -> None:
    """Raises ValueError on settings with which TDM cannot run."""
    c, b = settings, settings.batch
    check_unguided(settings)
    if b.trained is not None and b.trained > b.group:
        raise ValueError(f"batch.trained = {b.trained} is more than batch.group = {b.group}: lower it")
    if c.tdm.fake_scores == "two" and b.prompts * b.trained_of_group < 2:
        raise ValueError(
            "tdm.fake_scores = two with one sample an iteration: each fake score learns from half of them; raise "
            "batch.prompts or batch.group, or set tdm.fake_scores to one"
        )
    if c.tdm.fake_scores == "two" and c.sampler.steps < 2:
        raise ValueError(
            f"tdm.fake_scores = two with sampler.steps = {c.sampler.steps}: x_0 is the only point of the trajectory; "
            "use more steps, or set tdm.fake_scores to one"
        )


def check_release(settings: AlgorithmSettings) -> None:
    """Raises ValueError on settings with which the authors' released algorithm cannot run."""
    c, b = settings.release, settings.batch
    check_whole_groups(settings)
    check_unguided(settings)
    if c.trained_steps > settings.sampler.steps:
        raise ValueError(
            f"release.trained_steps = {c.trained_steps} is more than sampler.steps = {settings.sampler.steps}: lower it"
        )
    if c.time_block and b.group % c.time_block:
        raise ValueError(
            f"release.time_block = {c.time_block} with batch.group = {b.group}: a group is made of whole blocks; use a "
            "divisor, or null for the whole group"
        )


def check_tdm_alone(settings: AlgorithmSettings) -> None:
    """Raises ValueError on settings with which TDM cannot run by itself."""
    check_tdm(settings)
    check_no_surrogate(settings)
    check_no_kl_prompts(settings)


def check_no_surrogate(settings: AlgorithmSettings) -> None:
    """Raises ValueError if a surrogate is named where there is none."""
    lora, name = settings.model.surrogate_lora, settings.algorithm
    if lora:
        raise ValueError(f"model.surrogate_lora = {lora!r}: {name} has no surrogate; set it to null")


def check_no_kl_prompts(settings: AlgorithmSettings) -> None:
    """Raises ValueError if there are prompts without reward where the algorithm takes none."""
    n, name = settings.batch.kl_prompts, settings.algorithm
    if n:
        raise ValueError(f"batch.kl_prompts = {n}: {name} has none; set it to 0, or use tdm_r1")


def check_draws(settings: AlgorithmSettings) -> None:
    """Raises ValueError if DGPO is to draw more noise levels than its sampler has."""
    d, steps = settings.dgpo, settings.sampler.steps
    known = sum(1 - k / steps >= d.time_low - 1e-9 for k in range(steps))
    if d.draws > known:
        raise ValueError(
            f"dgpo.draws = {d.draws} with sampler.steps = {steps} and dgpo.time_low = {d.time_low}: the sampler has "
            f"{known} such noise levels; lower dgpo.draws or dgpo.time_low"
        )


def check_policy(settings: AlgorithmSettings) -> None:
    """Raises ValueError on settings with which DGPO, Flow-GRPO and DiffusionNFT cannot run."""
    check_whole_groups(settings)
    check_no_surrogate(settings)
    if settings.algorithm == "dgpo":
        check_draws(settings)
    if settings.sampler.steps < 2:
        raise ValueError(
            f"sampler.steps = {settings.sampler.steps}: the baselines train more than one step; use 2 or more"
        )


def check_direct(settings: AlgorithmSettings) -> None:
    """Raises ValueError on settings with which TDM with a direct loss cannot run."""
    check_tdm(settings)
    check_whole_groups(settings)
    check_no_surrogate(settings)
    check_draws(settings)


def check_whole_groups(settings: AlgorithmSettings) -> None:
    """Raises ValueError where a group cannot be compared as a whole."""
    b, name = settings.batch, settings.algorithm
    check_groups(settings)
    check_no_kl_prompts(settings)
    if b.trained is not None:
        raise ValueError(f"batch.trained = {b.trained}: {name} trains on all samples; set it to null")
    if b.micro_batch < b.group:
        raise ValueError(
            f"batch.micro_batch = {b.micro_batch} with batch.group = {b.group}: a micro-batch holds whole groups; "
            "raise it, or lower the group"
        )


def check_unguided(settings: AlgorithmSettings) -> None:
    """Raises ValueError if a few-step generator were sampled with guidance."""
    if settings.sampler.guidance != 1:
        raise ValueError(
            f"sampler.guidance = {settings.sampler.guidance} with algorithm = {settings.algorithm}: its generator "
            "learns guidance from the teacher and is sampled without; set it to 1"
        )


def check_groups(settings: AlgorithmSettings) -> None:
    """Raises ValueError if there is nothing to compare inside a group."""
    group = settings.batch.group
    if group < 2:
        raise ValueError(f"batch.group = {group}: {settings.algorithm} compares samples of one prompt; use 2 or more")


def check_tdm_r1(settings: AlgorithmSettings) -> None:
    """Raises ValueError on settings with which TDM-R1 cannot run."""
    check_tdm(settings)
    c, b, s = settings, settings.batch, settings.surrogate
    check_groups(settings)
    if b.trained == 1:
        raise ValueError("batch.trained = 1: one sample of a group has nothing to be compared with; use 2 or more")
    if s.draws == 0 and not c.model.surrogate_lora:
        raise ValueError(
            "surrogate.draws = 0 without model.surrogate_lora: a surrogate that is never trained has no reward signal; "
            "name a trained one, or use 1 or more"
        )
    if s.draws == 0 and s.reference == "dynamic":
        raise ValueError(
            "surrogate.draws = 0 with surrogate.reference = dynamic: a frozen surrogate equals its own average, so "
            "there is no reward; set surrogate.reference to static"
        )
    if c.model.surrogate_lora and s.weights == "full":
        raise ValueError(
            f"model.surrogate_lora = {c.model.surrogate_lora!r} with surrogate.weights = full: a LoRA starts adapters "
            "alone; set surrogate.weights to lora"
        )
    if s.added_delta and c.model.roles == "full":
        raise ValueError(
            f"surrogate.added_delta = {s.added_delta} with model.roles = full: it is added to adapters alone; set it "
            "to 0"
        )
    if s.added_delta and s.weights == "full" and c.model.shard:
        raise ValueError(
            f"surrogate.added_delta = {s.added_delta} with surrogate.weights = full and model.shard = True: the change "
            "of weights that are spread cannot be added; set added_delta to 0, or surrogate.weights to lora"
        )
    if s.added_delta and s.weights == "full" and c.model.dtype != "float32":
        raise ValueError(
            f"surrogate.added_delta = {s.added_delta} with surrogate.weights = full and model.dtype = {c.model.dtype}: "
            "small changes to a copy of the backbone's weights are lost in that precision; set added_delta to 0"
        )
    if s.added_delta and s.weights == "full" and c.model.teacher:
        raise ValueError(
            f"surrogate.added_delta = {s.added_delta} with surrogate.weights = full and model.teacher = "
            f"{c.model.teacher!r}: the change of full weights is added to their own base alone; "
            "set surrogate.weights to lora, or added_delta to 0"
        )
    if c.tdm.fake_scores == "two" and s.reference == "fake":
        raise ValueError(
            "surrogate.reference = fake with tdm.fake_scores = two: which of them is not defined; set tdm.fake_scores "
            "to one, or use another reference"
        )
