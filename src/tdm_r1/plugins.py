"""Components by name: built-in ones, and ``package.module:Name`` from outside. Each is imported when it is used."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from importlib import import_module
from typing import Any


class Registry:
    """What a setting may name.

    Args:
        setting: the setting, for errors.
        entries: name -> ``module:attribute``.
    """

    def __init__(self, setting: str, entries: Mapping[str, str]) -> None:
        self.setting = setting
        self.entries = dict(entries)

    def check(self, name: str, setting: str | None = None) -> None:
        """Raises ValueError if ``name`` is neither known nor of the form ``package.module:Name``. Imports nothing."""
        if name not in self.entries and not is_outside(name):
            known = f"known are {', '.join(self.entries)}; " if self.entries else ""
            raise ValueError(f"{setting or self.setting} = {name!r}: {known}your own is named as package.module:Name")

    def load(self, name: str) -> Any:
        """The object that ``name`` means. Raises ValueError saying why there is none."""
        self.check(name)
        return import_name(self.entries.get(name, name), self.setting)


def is_outside(name: str) -> bool:
    """Whether a name is of the form ``package.module:Name``."""
    module, _, attribute = name.partition(":")
    return attribute.isidentifier() and all(part.isidentifier() for part in module.split("."))


def import_name(name: str, setting: str) -> Any:
    """The object at ``package.module:Name``; modules in the working folder count, as for ``python -m``.

    Raises ValueError naming ``setting`` and what is wrong.
    """
    module_name, _, attribute = name.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        module = import_module(module_name)
    except Exception as error:  # it is a user's: anything may be wrong with it
        raise ValueError(f"{setting} = {name!r}: {module_name} cannot be imported ({told(error)})") from error
    if not hasattr(module, attribute):
        have = ", ".join(n for n in vars(module) if callable(getattr(module, n)) and not n.startswith("_"))
        raise ValueError(f"{setting} = {name!r}: {module_name} has no {attribute!r}; it has: {have or 'nothing'}")
    return getattr(module, attribute)


def told(error: Exception) -> str:
    """What is wrong with a module that cannot be imported."""
    return str(error) if isinstance(error, ImportError) else f"{type(error).__name__}: {error}"
