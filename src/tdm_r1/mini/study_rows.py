"""The rows of the study: the paper's baselines and ablations, the authors' release, and its choices one at a time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

MANY_STEPS = {"steps": 10, "guidance": 2.0}  # of the many-step policies, in rollouts and when they are measured
BASE_STEPS, BASE_GUIDANCE = 20, 2.0  # of the base and of models that are sampled as it is


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Args:
        name: in tables and files.
        what: a few words, and where the paper has it.
        recipe: of its run; None for a model that is measured as it is.
        changes: settings by dotted name.
        model: what is measured: the run's generator, the start, the base, the run's surrogate with many steps.
        after: a row whose finished run this one needs, and what it takes of it: the surrogate, to be sampled; the
            surrogate, to be used frozen; the generator, merged, as the teacher.
        group: the part of the page.
        budget: times the study's scored images.
    """

    name: str
    what: str
    recipe: str | None = None
    changes: Mapping[str, Any] = field(default_factory=dict)
    model: Literal["generator", "start", "base", "surrogate"] = "generator"
    after: tuple[str, Literal["surrogate", "frozen", "teacher"]] | None = None
    group: Literal["methods", "ablations", "release", "rewards", "batch", "search"] = "methods"
    budget: float = 1.0

    def file(self, seed: int) -> str:
        """Name of the row's files."""
        name = "".join(letter for letter in self.name if letter not in ":,")
        return f"{name.replace(' ', '-')}-{seed}"


def policy(name: str, learning_rate: float, *, many_steps: bool = True, **own: Any) -> dict[str, Any]:
    """A baseline's settings on top of the recipe ``mini``: in few or many steps, its own group of settings."""
    changes: dict[str, Any] = {"algorithm": name, f"{name}.optimizer.learning_rate": learning_rate}
    if many_steps:
        changes |= {"model.student_lora": None, **{f"sampler.{key}": value for key, value in MANY_STEPS.items()}}
    elif name == "dgpo":
        own = {"time_low": 0.0, **own}
    return changes | {f"{name}.{key}": value for key, value in own.items()}


AS_SEARCHED = {  # this project's recipe, when it was searched
    "balance.limit": None,
    "balance.scale": 8.0,
    "surrogate.added_delta": 1.0,
}
DIRECT: dict[str, Any] = {"algorithm": "tdm_direct_rl", "tdm.fake_scores": "one", "dgpo.time_low": 0.0}
UNTUNED = {  # rewards on which the recipe is tried unchanged
    "jpeg": "jpeg_compressibility",
    "size": "tdm_r1.mini.preferences:size",
    "count": "tdm_r1.mini.preferences:count",
}
ROWS = (
    Row("base", "the base in 20 guided steps", model="base"),
    Row("start", "TDM: the 4-step start", model="start"),
    Row("dgpo-many", "DGPO on the base in 10 guided steps", "mini", policy("dgpo", 1e-3)),
    Row("grpo-many", "Flow-GRPO on the base in 10 guided steps", "mini", policy("flow_grpo", 1e-3)),
    Row("grpo", "Flow-GRPO on the 4-step start", "mini", policy("flow_grpo", 3e-4, many_steps=False, noise_level=0.7)),
    Row("nft", "DiffusionNFT on the 4-step start", "mini", policy("nft", 3e-4, many_steps=False, kl_weight=0.3)),
    Row("dgpo", "DGPO on the 4-step start", "mini", policy("dgpo", 1e-3, many_steps=False, kl_weight=0.1)),
    Row(
        "dgpo-no-kl",
        "DGPO on the 4-step start without KL",
        "mini",
        policy("dgpo", 3e-4, many_steps=False, kl_weight=0.0),
    ),
    Row(
        "tdm-direct",
        "TDM + direct RL loss (Fig. 4, 5)",
        "mini",
        DIRECT | {"dgpo.direct_weight": 16.0},
    ),
    Row(
        "dgpo-then-tdm", "DGPO teacher, then TDM (Fig. 9)", "mini", {"algorithm": "tdm"}, after=("dgpo-many", "teacher")
    ),
    Row("paper", "TDM-R1, the paper's surrogate, clipped", "mini_paper", {"surrogate.trust_region": "clip"}),
    Row("release", "TDM-R1, the authors' code", "mini_release"),
    Row("tdm-r1", "TDM-R1, this project's recipe", "mini"),
    Row("p-phi", "its surrogate in 20 guided steps (Table 2)", model="surrogate", after=("tdm-r1", "surrogate")),
    # one choice at a time, from this project's recipe
    Row("stochastic", "stochastic trajectory (Fig. 4)", "mini", {"sampler.solver": "stochastic"}, group="ablations"),
    Row("all points", "surrogate on all x_{t_k}", "mini", {"surrogate.points": "all"}, group="ablations"),
    Row(
        "dynamic reference",
        "an average of the surrogate as reference",
        "mini",
        {"surrogate.reference": "dynamic", "surrogate.added_delta": 0.0},
        group="ablations",
    ),
    Row(
        "not added",
        "the surrogate's change is not added to the generator",
        "mini",
        {"surrogate.added_delta": 0.0},
        group="ablations",
    ),
    Row(
        "frozen",
        "the surrogate of tdm-r1's run, not trained on (Fig. 8)",
        "mini",
        {"surrogate.draws": 0, "surrogate.added_delta": 0.0, "model.surrogate_lora": "lora_surrogate"},
        after=("tdm-r1", "frozen"),
        group="ablations",
    ),
    Row("one fake score", "one fake score for all points", "mini", {"tdm.fake_scores": "one"}, group="ablations"),
    Row(
        "stale",
        "scored while the batch before is learned from",
        "mini",
        {"scoring.staleness": 1},
        group="ablations",
    ),
    Row(
        "extremes",
        "surrogate on half of each group, its extremes",
        "mini",
        {"surrogate.trained_share": 0.5},
        group="ablations",
    ),
    # one choice at a time, from the authors' release
    *(
        Row(f"release: {name}", what, "mini_release", {f"release.{key}": value}, group="release", budget=0.5)
        for name, what, key, value in (
            ("linear", "linear loss in place of the sigmoid", "loss", "linear"),
            ("beta 100", "beta of the paper", "beta", 100.0),
            ("no clip", "no PPO clip", "clip", None),
            ("no distance hold", "no hold by distance", "distance_limit", None),
            ("dynamic", "dynamic reference (paper)", "reference", "dynamic"),
            ("group deviation", "advantages by the group's deviation (paper)", "deviation", "group"),
            ("equal steps", "all x_{t_k} alike (paper)", "step_weights", "equal"),
            ("own noise", "noise not shared in a group (Flow-Factory)", "shared_noise", False),
            ("all steps", "all four steps trained (Flow-Factory)", "trained_steps", 4),
            ("unguided surrogate", "surrogate without guidance", "surrogate_guidance", 1.0),
            ("guided KL", "KL to the guided teacher (paper)", "kl", "guided"),
            ("one normaliser", "the KL's normaliser for the reward too (paper)", "normalizer", "kl"),
            ("fake to point", "fake score back to x_s (ours)", "fake_target", "point"),
            ("low t", "surrogate's t from .30 (the release's for OCR)", "surrogate_low", 0.3),
        )
    ),
    # rewards that nobody tuned on
    *(Row(f"reward: {name}", reward, "mini", {"reward": reward}, group="rewards") for name, reward in UNTUNED.items()),
    # small batches and the release's, on more images
    *(
        Row(
            f"{name}: {p} x {g}",
            f"{what}, {p} x {g} images",
            recipe,
            AS_SEARCHED | {"batch.prompts": p, "batch.group": g, "batch.micro_batch": p * g},
            budget=2.4,
            group="batch",
        )
        for name, what, recipe in (
            ("tdm-r1", "this project's recipe as it was searched", "mini"),
            ("release", "the authors' code", "mini_release"),
        )
        for p, g in ((8, 16), (48, 24))
    ),
)
