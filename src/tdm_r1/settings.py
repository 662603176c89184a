"""The base of every group of settings, and marks of those that a run cannot change once it has begun."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, JsonValue, model_validator

# json_schema_extra of settings: those that say which weights a checkpoint holds, and those read at a run's start alone
SHAPES_CHECKPOINT: dict[str, JsonValue] = {"fixed": "checkpoint"}
STARTS_RUN: dict[str, JsonValue] = {"fixed": "start"}


class Settings(BaseModel):
    """A group of settings: unknown names are errors, and nothing changes after validation.

    A group that is given in part keeps the rest of its own default, not of its class's.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _keep_defaults(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        own = {name: field.default for name, field in cls.model_fields.items()}
        return {
            name: own[name].model_dump() | value
            if isinstance(own.get(name), Settings) and isinstance(value, dict)
            else value
            for name, value in values.items()
        }


def fixed_settings(model: type[BaseModel], mark: dict[str, JsonValue], prefix: str = "") -> set[str]:
    """Dotted names of the settings with a mark, in a schema and the groups inside it."""
    found = set()
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            found |= fixed_settings(field.annotation, mark, f"{prefix}{name}.")
        extra: Any = field.json_schema_extra
        if extra and mark.items() <= extra.items():
            found.add(prefix + name)
    return found
