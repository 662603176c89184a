"""`tdm-r1 import-release`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tyro
from tyro.conf import Positional


@dataclass
class ImportRelease:
    """Turns a checkpoint that the authors released (Z-Image: TDM-R1; SD3.5-Medium: TDM) into a LoRA for diffusers.

    Only tensors are unpickled; a file with anything else, or whose shapes do not fit, is refused. Not yet run on the
    real files: compare pictures, since shapes alone cannot show that the tensors have the assumed order.
    """

    checkpoint: Positional[Path]
    """tdmr1_zimage_ema.ckpt or tdm_sd3-5_lora.ckpt."""
    out: Path = Path("released_lora")
    """The LoRA's folder."""


def main(args: list[str]) -> int:
    command = tyro.cli(ImportRelease, args=args, prog="tdm-r1 import-release")
    from ..models.release import convert_release

    print(f"Wrote {convert_release(command.checkpoint, command.out)}")
    return 0
