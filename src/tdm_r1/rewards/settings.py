"""Settings of scoring."""

from __future__ import annotations

import re
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from ..settings import Settings

SECRET = re.compile(r"TOKEN|SECRET|PASSW|CREDENTIAL|(API|ACCESS|PRIVATE)_?KEY", re.IGNORECASE)


def require_no_secret(reward: str) -> None:
    """Raises ValueError on a server's URL with a name or password in it: settings are written to the run's folder."""
    if found := re.search(r"https?://[^/@\s]+@([^/\s]*)", reward):
        raise ValueError(
            f"reward has a name or password before {found[1]!r}, and settings are kept in files: leave it out; a token "
            "goes into the environment variable TDM_R1_TOKEN"
        )


class ScoringConfig(Settings):
    """Where and how rewards are computed. Every default is ours."""

    workers: int = Field(
        0, ge=0, description="Processes, or Ray actors, for each reward; 0 scores in the training process."
    )
    backend: Literal["processes", "ray"] = Field(
        "processes", description="What the workers are: processes of this machine, or actors of Ray."
    )
    ray_address: str | None = Field(
        None, description="Of a Ray cluster (auto: the one of this machine); default: a Ray of this run's own."
    )
    gpus: float = Field(
        0.0, ge=0, description="GPUs of each Ray actor: 0.25 lets four share one; with 0 rewards run on the CPU there."
    )
    environments: dict[str, dict[str, Any]] = Field(
        {}, description="Ray's runtime_env by reward, for packages that the run lacks: {my.py:score: {pip: [lpips]}}."
    )
    timeout: float = Field(60.0, gt=0, description="Seconds that a worker or a server may take for a chunk.")
    load_timeout: float = Field(
        1800.0, gt=0, description="Seconds that a worker may take to load its reward, downloads included."
    )
    chunk: int = Field(16, ge=1, description="Samples a call, in workers and to a server.")
    staleness: int = Field(
        0,
        ge=0,
        le=1,
        description="1: a batch is scored while the one before it is learned from, so that its samples come from "
        "weights one iteration older (docs/rewards.md); 0: the run waits for the scores.",
    )
    normalize: Literal["none", "group"] = Field(
        "none", description="group: each reward of a sum is given mean 0 and deviation 1 in each group first."
    )

    @field_validator("environments")
    @classmethod
    def _without_secrets(cls, value: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        for reward, environment in value.items():
            for name in environment.get("env_vars", {}):
                if SECRET.search(name):
                    raise ValueError(
                        f"scoring.environments has {name} for {reward!r}, and settings are kept in files: set it where "
                        "Ray is started"
                    )
        return value

    @model_validator(mode="after")
    def _of_one_backend(self) -> ScoringConfig:
        if self.backend == "ray":
            if not self.workers:
                raise ValueError("scoring.backend = 'ray' with scoring.workers = 0: there are no actors; raise workers")
            return self
        for name in ("ray_address", "gpus", "environments"):
            if value := getattr(self, name):
                raise ValueError(f"scoring.{name} = {value!r} with scoring.backend = 'processes': it is for 'ray'")
        return self
