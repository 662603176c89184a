"""Settings of the task."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import Field, field_validator

from ..settings import Settings
from .registry import TAKES, TASKS


class TaskConfig(Settings):
    """Where prompts come from."""

    name: str = Field(
        "mini",
        description="mini (shapes), mini_signs, prompts (a file), geneval (prompts drawn from its families), or your "
        "own as package.module:Name.",
    )
    prompts: Path | None = Field(
        None,
        description="A .txt (one a line), .jsonl, .json, .csv or .tsv (prompt + metadata) file, or OWNER/NAME/FILE of "
        "a hub's dataset; for geneval, the official metadata to evaluate on.",
    )
    eval_prompts: Path | None = Field(
        None, description="A file of prompts to evaluate on, where task.prompts is trained on; else the same."
    )
    weights: dict[str, float] | None = Field(
        None, description="Share of each family in training; default: equal (mini), Flow-GRPO's (geneval)."
    )
    kl: str | None = Field(
        None,
        description="Where batch.kl_prompts are drawn from: a task's name or a file of prompts; default: this task.",
    )
    settings: dict[str, Any] = Field({}, description="Settings of a task of your own.")

    @field_validator("name")
    @classmethod
    def _known(cls, value: str) -> str:
        TASKS.check(value)
        return value


def check_task(t: TaskConfig) -> None:
    """Raises ValueError on settings that the task does not take."""
    if t.name not in TAKES:
        return
    for name in ("prompts", "eval_prompts", "weights"):
        value = getattr(t, name)
        if value is not None and name not in TAKES[t.name]:
            shown = str(value) if isinstance(value, Path) else value
            raise ValueError(
                f"task.{name} = {shown} with task.name = {t.name!r}, which does not take it: set task.{name} to null "
                f"(--task.{name.replace('_', '-')} None)"
            )
    if t.name == "prompts" and t.prompts is None:
        raise ValueError("task.prompts = None with task.name = 'prompts': give a file of prompts")
