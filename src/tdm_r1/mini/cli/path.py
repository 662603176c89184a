"""`tdm-r1 mini path`."""

from __future__ import annotations

from ..bundle import bundle_path
from . import named_model


def main(args: list[str]) -> int:
    print(bundle_path(named_model(args)[0]))
    return 0
