"""Recipes by name, by path and by a run's folder; and how two configurations differ."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from ..errors import UserError
from ..settings import SHAPES_CHECKPOINT, STARTS_RUN, fixed_settings
from .recipes import recipe_names, recipe_text
from .run import CONFIG_FILE, RunConfig, validate


def load_recipe(name: str) -> RunConfig:
    """A recipe by name, by path, or a run's own configuration by its folder.

    A recipe may say ``extends: OTHER`` and give its differences alone. A run's configuration means the folder that it
    lies in, wherever that was copied.

    Raises UserError naming the field, the value and the fix.
    """
    values = _recipe_values(name)
    if not _is_folder(name):
        return validate(values)
    folder = Path(name) if Path(name).name not in ("", "..") else Path(name).resolve()
    try:
        config = validate(values).override({"output": folder.parent, "name": folder.name})
    except UserError as error:
        raise UserError(f"{folder / CONFIG_FILE}: {error}") from error
    return config.override(_own_distillation(config)) if config.distill_with else config


def distillation(config: RunConfig) -> RunConfig:
    """The settings of the distillation that ``config.distill_with`` names, with the run's model, sampler, micro-batch.

    Raises UserError if that recipe does not distil.
    """
    settings = {"output": config.folder, "name": "distill", "seed": config.seed}
    none = dict.fromkeys(("teacher", "student_lora_scale", "fake_lora", "surrogate_lora"))
    settings |= {"model": config.model.model_dump() | none}
    settings |= {"sampler": config.sampler.model_dump(), "batch.micro_batch": config.batch.micro_batch}
    recipe = load_recipe(str(config.distill_with)).override(settings)
    if recipe.algorithm != "tdm":
        raise UserError(f"distill_with = {config.distill_with!r}: its algorithm is {recipe.algorithm}; name one of tdm")
    return recipe


def _own_distillation(config: RunConfig) -> dict[str, str]:
    """The LoRAs that a run distilled for its start, where its folder lies now."""
    found = {}
    for name in ("student_lora", "fake_lora"):
        lora = Path(getattr(config.model, name) or "")
        here = config.folder / "distill" / lora.name
        if lora.parent.name == "distill" and here.is_dir():
            found[f"model.{name}"] = str(here)
    return found


def run_of(lora: str | Path) -> RunConfig | None:
    """The settings of the run that wrote a LoRA's folder, where they lie beside it and can be read."""
    folder = str(Path(lora).parent.resolve())  # in full: runs are often called as their recipes
    try:
        return load_recipe(folder) if _is_folder(folder) else None
    except UserError:
        return None  # of another version


def _is_folder(name: str) -> bool:
    return name not in recipe_names() and (Path(name) / CONFIG_FILE).is_file()


def differences(old: RunConfig, new: RunConfig) -> list[tuple[str, Any, Any]]:
    """(dotted name, old value, new value) of each setting that is not the same; where the folder is does not count."""
    a, b = (_flat(config.model_dump(mode="json", exclude={"output", "name"})) for config in (old, new))
    return [(name, a.get(name), b.get(name)) for name in a | b if a.get(name) != b.get(name)]


def require_same_run(before: RunConfig, now: RunConfig) -> None:
    """Raises UserError if a resumed run changes what it cannot: which weights its checkpoint holds, or its start."""
    shaping, starting = (fixed_settings(RunConfig, mark) for mark in (SHAPES_CHECKPOINT, STARTS_RUN))
    lora = now.folder / "lora"
    start = f" with --model.student-lora {lora}" if lora.is_dir() and now.model.roles == "lora" else ""
    for name, old, new in differences(before, now):
        if name in shaping:
            raise UserError(
                f"{name} = {new!r}: the run was started with {old!r}, and its checkpoints hold weights for that; leave "
                f"{name} as it was, or start a new run{start}"
            )
        if name in starting and not _same_path(old, new):
            raise UserError(
                f"{name} = {new!r}: the run was started with {old!r}, and a start is not made again on --resume; leave "
                f"{name} as it was, or start a new run"
            )


def _same_path(one: Any, other: Any) -> bool:
    return isinstance(one, str) and isinstance(other, str) and Path(one).resolve() == Path(other).resolve()


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def _recipe_values(name: str, seen: tuple[str, ...] = ()) -> dict[str, Any]:
    if name in seen:
        raise UserError(f"extends = {name!r}: recipe {name!r} extends itself; name another one")
    values = _parsed(name)
    if "extends" in values:
        base = values.pop("extends")
        return _merged(_recipe_values(str(base), (*seen, name)), values)
    return values


def _parsed(name: str) -> dict[str, Any]:
    """What a recipe's file says. Raises UserError, with the file's name, if that is no group of settings."""
    path = Path(name)
    if name not in recipe_names():
        if _is_folder(name):
            path = path / CONFIG_FILE
        elif path.suffix not in (".yaml", ".yml") or not path.is_file():
            raise UserError(
                f"recipe {name!r} is neither a run's folder, nor a YAML file, nor one of: {', '.join(recipe_names())}"
            )
    try:
        text = recipe_text(name) if name in recipe_names() else path.read_text(encoding="utf-8")
        values = yaml.load(text, _Unambiguous)
    except UnicodeDecodeError as error:
        raise UserError(f"recipe {str(path)!r} is no text in UTF-8: a YAML file is needed") from error
    except yaml.YAMLError as error:
        raise UserError(f"recipe {str(path)!r} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        held = "nothing" if values is None else f"a {type(values).__name__}"
        raise UserError(f"recipe {str(path)!r} holds {held}: settings are needed, such as `extends: mini`")
    return values


class _Unambiguous(yaml.SafeLoader):
    """A key that is given twice is an error, not the last one's value."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        if twice := [key for key in keys if keys.count(key) > 1]:
            raise yaml.constructor.ConstructorError(None, None, f"{twice[0]} is given twice", node.start_mark)
        return super().construct_mapping(node, deep)


def _merged(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """``base`` with ``changes`` in place of its own; groups of settings are merged key by key."""
    merged = dict(base)
    for key, value in changes.items():
        old = merged.get(key)
        merged[key] = _merged(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged
