"""tdm-r1: reinforce few-step text-to-image flow models with any reward (TDM-R1, arXiv 2603.07700).

The short way in::

    from tdm_r1 import FewStepModel, Run, load_recipe
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .config import RunConfig, load_recipe
    from .sampling import FewStepModel
    from .trainer import Run

__all__ = ["FewStepModel", "Run", "RunConfig", "load_recipe"]

_HOME = {"FewStepModel": "sampling", "Run": "trainer", "RunConfig": "config", "load_recipe": "config"}


def __getattr__(name: str) -> Any:
    """Imports torch and diffusers when they are asked for, so that the command line answers at once."""
    if name in _HOME:
        return getattr(import_module(f".{_HOME[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
