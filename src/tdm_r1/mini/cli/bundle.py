"""`tdm-r1 mini bundle`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tyro
from tyro.conf import Positional


@dataclass
class Bundle:
    """Puts a distilled run's LoRAs beside a mini pipeline folder, so that TDM_R1_MINI can point to it."""

    run: Positional[Path]
    """The folder of a finished `tdm-r1 distill mini_distill` run."""
    model: Path = Path("runs/mini_pretrain/model")
    """The pipeline folder that `tdm-r1 mini pretrain` wrote."""


def main(args: list[str]) -> int:
    command = tyro.cli(Bundle, args=args, prog="tdm-r1 mini bundle")
    from ..build import bundle_student

    bundle_student(command.run, command.model)
    print(f"Wrote the 4-step LoRAs into {command.model}")
    return 0
