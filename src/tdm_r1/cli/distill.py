"""`tdm-r1 distill`: `train` for recipes of TDM alone."""

from __future__ import annotations

from . import train


def main(args: list[str]) -> int:
    return train.main(args, prog="distill")
