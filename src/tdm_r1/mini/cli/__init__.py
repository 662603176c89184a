"""The commands of ``tdm-r1 mini``."""

from __future__ import annotations

from ...errors import UserError
from ..bundle import MODELS


def named_model(args: list[str]) -> tuple[str, list[str]]:
    """The mini model that the first argument names, 'mini' if none does, and the other arguments."""
    if not args or args[0].startswith("-"):
        return "mini", args
    if args[0] not in MODELS:
        raise UserError(f"unknown mini model {args[0]!r}: known are {', '.join(MODELS)}")
    return args[0], args[1:]
