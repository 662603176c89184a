"""tdm-r1: reinforce few-step text-to-image flow models with any reward (TDM-R1, arXiv 2603.07700).

The short way in::

    from tdm_r1 import FewStepModel, Run, load_recipe
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .config.load import load_recipe
    from .config.run import RunConfig
    from .evaluate.sampling import FewStepModel
    from .train.run import Run

__all__ = ["FewStepModel", "Run", "RunConfig", "load_recipe"]

_HOME = {
    "FewStepModel": "evaluate.sampling",
    "Run": "train.run",
    "RunConfig": "config.run",
    "load_recipe": "config.load",
}


def __getattr__(name: str) -> Any:
    """Imports a name when it is used, so that `import tdm_r1` is fast."""
    if name in _HOME:
        return getattr(import_module(f".{_HOME[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
