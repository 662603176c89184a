"""Our backbones and few-step sampler against diffusers' own pipelines: the same prompts, noise and sigmas.

On small random models of the real classes (tests/tiny_models.py); the tests hold the same comparison to half a level.

Run: ``python benchmarks/parity.py`` (writes docs/results/parity.json and .md).
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig

from tdm_r1.evaluate.evaluation import Sampling, generate
from tdm_r1.models.create import create_roles
from tdm_r1.models.embedder import Embedder
from tdm_r1.models.pipeline import load_backbone
from tdm_r1.models.specification import Role

sys.path.append(str(Path(__file__).parent.parent / "tests"))
import tiny_models

MODELS: dict[str, Callable[[Path], Path]] = {
    "SD3": tiny_models.sd3,
    "SD3.5 (dual attention, QK-norm)": partial(tiny_models.sd3, dual=True),
    "Z-Image": tiny_models.z_image,
}
PROMPTS = ["a red circle left of a blue square", "two crosses"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("docs/results/parity.json"))
    args = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        for number, (name, make) in enumerate(MODELS.items()):
            folder = make(Path(temporary) / str(number))
            rows += [compare(name, folder, guidance, side) for side in (64, 96) for guidance in (1.0, 2.5)]
    args.out.write_text(json.dumps(rows, indent=1))
    args.out.with_suffix(".md").write_text(markdown(rows))
    print(args.out.with_suffix(".md").read_text())


def compare(name: str, folder: Path, guidance: float, side: int) -> dict:
    """The largest difference of a picture's value in [0, 1], over two prompts in 4 steps."""
    backbone = load_backbone(str(folder), max_sequence_length=48, dtype=torch.float32, device="cpu", resolution=side)
    x_1 = torch.randn(2, *backbone.latent_shape, generator=torch.Generator().manual_seed(0))
    sampling = Sampling(Role.TEACHER, steps=4, shift=3.0, guidance=guidance)
    ours = generate(
        backbone, create_roles((), backbone, LoraConfig()), sampling, Embedder(backbone), PROMPTS, x_1, batch=2, seed=0
    )
    theirs = tiny_models.pipeline_pictures(folder, PROMPTS, x_1, guidance)
    return {
        "model": name,
        "side": side,
        "guidance": guidance,
        "levels": float(np.abs(ours - 255 * theirs).max()),
        "spread": float(255 * theirs.std()),
    }


def markdown(rows: list[dict]) -> str:
    lines = [
        "# Parity with diffusers' pipelines",
        "",
        "Written by `python benchmarks/parity.py` on small random models of the same classes, float32, 4 steps. Ours",
        "are 8-bit pictures, theirs are not rounded: half a level of 255 is rounding alone.",
        "",
        "| model | px | guidance | largest difference, levels | deviation of the pictures, levels |",
        "|---|---|---|---|---|",
    ]
    for r in rows:
        lines.append(f"| {r['model']} | {r['side']} | {r['guidance']} | {r['levels']:.4f} | {r['spread']:.1f} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
