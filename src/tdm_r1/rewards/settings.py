"""Settings of scoring."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, Literal
from urllib.parse import parse_qsl, urlsplit

from pydantic import Field, field_validator, model_validator

from ..settings import Settings

SECRET = re.compile(r"(^|_)(TOKEN|SECRET|KEY|AUTH|CREDENTIALS?|PASS\w*)$", re.IGNORECASE)  # of a variable, a query


def require_no_secret(text: str, setting: str) -> None:
    """Raises ValueError if a URL in a setting's text holds a secret, which the error does not tell.

    That is a password, a name before the host other than ``git``, or a query by a name such as ``token``.
    """
    for url in re.findall(r"[a-zA-Z][\w+.-]*://\S+", text):
        parts = urlsplit(url)
        queries = [name for name, _ in parse_qsl(parts.query)]
        if parts.password or parts.username not in (None, "git") or any(map(SECRET.search, queries)):
            raise ValueError(
                f"{setting} has a URL with a name, a password or a token for {parts.hostname}, and settings are kept "
                "in files: leave it out; a scoring server's token goes into the environment variable TDM_R1_TOKEN"
            )


def _texts(value: Any) -> Iterator[str]:
    """Every text in nested lists and mappings."""
    if isinstance(value, Mapping):
        value = [*value.keys(), *value.values()]
    if isinstance(value, list | tuple):
        for item in value:
            yield from _texts(item)
    elif isinstance(value, str):
        yield value


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
            for text in _texts(environment):
                require_no_secret(text, f"scoring.environments of {reward!r}")
            for name in environment.get("env_vars") or ():
                if SECRET.search(str(name)):
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
                shown = list(value) if name == "environments" else value  # whose contents may be secret
                raise ValueError(f"scoring.{name} = {shown!r} with scoring.backend = 'processes': it is for 'ray'")
        return self
