"""`tdm-r1 mini pretrain`."""

from __future__ import annotations

import tyro

from . import named_model


def main(args: list[str]) -> int:
    from ..build import MiniConfig, build, preset

    name, rest = named_model(args)
    out = build(tyro.cli(MiniConfig, default=preset(name), args=rest, prog=f"tdm-r1 mini pretrain {name}"))
    print(f"Wrote {out}")
    return 0
