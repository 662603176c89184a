"""What an iteration costs at full size: SD3.5-M and Z-Image with random weights, 512 px, on one GPU.

Seconds and peak memory of each part, what `tdm_r1.estimate` expected, and the share of the GPU's peak arithmetic (model
FLOP utilisation, and hardware's, which counts what checkpointing computes again). The reward is random numbers. With
``--tiny`` the same code runs on small transformers and a CPU.

Run: ``python benchmarks/gpu_iteration.py`` (writes docs/results/gpu_iteration.json and .md).
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch

from phases import Phases
from tdm_r1.algorithms.tdm_r1 import TDMR1
from tdm_r1.config import RunConfig, load_recipe
from tdm_r1.estimate import GPU_FLOPS, estimate, random_backbone, random_conditioning
from tdm_r1.trainer import cast_roles

MODELS = {"sd35_medium": "sd35m_geneval", "z_image": "zimage_geneval"}  # architecture and recipe
TINY: dict[str, dict[str, Any]] = {
    "sd35_medium": {
        "num_layers": 2,
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "caption_projection_dim": 32,
        "joint_attention_dim": 48,
        "pooled_projection_dim": 32,
        "dual_attention_layers": [0],
    },
    "z_image": {
        "dim": 64,
        "n_layers": 2,
        "n_refiner_layers": 1,
        "n_heads": 2,
        "n_kv_heads": 2,
        "cap_feat_dim": 24,
        "axes_dims": [8, 12, 12],
        "axes_lens": [1024, 64, 64],
    },
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--prompts", type=int, default=2)
    parser.add_argument("--group", type=int, default=24)
    parser.add_argument("--micro-batch", type=int, default=None, help="instead of the recipe's")
    parser.add_argument("--iterations", type=int, default=2, help="measured, after one that warms up")
    parser.add_argument("--resolution", type=int, default=512)
    parser.add_argument("--keep-activations", action="store_true", help="no gradient checkpointing")
    parser.add_argument("--tiny", action="store_true", help="small transformers, for a machine without a GPU")
    parser.add_argument("--out", type=Path, default=Path("docs/results/gpu_iteration.json"))
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows = []
    for name in args.models:
        config = load_recipe(MODELS[name]).override(
            {
                "iterations": args.iterations + 1,
                "batch.prompts": args.prompts,
                "batch.group": args.group,
                "batch.micro_batch": args.micro_batch or load_recipe(MODELS[name]).batch.micro_batch,
                "model.resolution": args.resolution,
                "model.gradient_checkpointing": not args.keep_activations,
                "model.teacher": None,  # one transformer: a second one costs its weights and no time
                "model.offload": False,
            }
        )
        rows.append(measure(name, config, args.iterations, device, TINY[name] if args.tiny else {}))
        print(json.dumps(rows[-1], indent=1))
    result = {"device": _device_name(), "torch": torch.__version__, "tiny": args.tiny, "models": rows}
    args.out.write_text(json.dumps(result, indent=1))
    args.out.with_suffix(".md").write_text(markdown(result))
    print(f"Wrote {args.out} and .md")


def measure(name: str, config: RunConfig, iterations: int, device: str, sizes: dict[str, Any]) -> dict[str, Any]:
    """One model's row; ``sizes`` of the transformer in place of the architecture's own."""
    torch.manual_seed(0)
    backbone = random_backbone(name, config, device=device, **sizes)
    with torch.device(device):
        roles = cast_roles(config, backbone, None)
    algorithm = TDMR1(
        roles,
        random_conditioning(backbone, 1, device=device),
        config.sampler,
        config.tdm,
        config.surrogate,
        config.balance,
        iterations=iterations + 1,
        group_size=config.batch.group,
        trained=config.batch.trained or config.batch.group,
        micro_batch=config.batch.micro_batch,
    )
    noise = torch.Generator().manual_seed(1)

    def score(latents: torch.Tensor) -> torch.Tensor:
        backbone.decode(latents)
        return torch.rand(len(latents), generator=noise).to(device)

    def step() -> None:
        c = random_conditioning(backbone, config.batch.prompts, device=device)
        c = c.rows(torch.arange(config.batch.prompts).repeat_interleave(config.batch.group))
        x_1 = torch.randn(len(c), *backbone.latent_shape, generator=noise).to(device)
        algorithm.step(c, x_1, score, noise)

    step()  # warm-up
    phases = Phases(algorithm, backbone)
    start = time.perf_counter()
    for _ in range(iterations):
        step()
    seconds = (time.perf_counter() - start) / iterations
    expected = estimate(config, **sizes)
    once = estimate(config.override({"model.gradient_checkpointing": False}), **sizes)
    assert expected is not None
    assert once is not None
    held = sum(size for what, size in expected.held.items() if what != "text encoders")  # there are none here
    return {
        "model": name,
        "samples": config.batch.prompts * config.batch.group,
        "micro_batch": config.batch.micro_batch,
        "resolution": config.model.resolution,
        "gradient_checkpointing": config.model.gradient_checkpointing,
        "seconds": round(seconds, 3),
        "petaflops": sum(expected.flops.values()) / 1e15,
        "model_utilisation": sum(once.flops.values()) / seconds / GPU_FLOPS,
        "hardware_utilisation": sum(expected.flops.values()) / seconds / GPU_FLOPS,
        "expected_peak": (held + max(expected.working[p] for p in phases.seconds)) / 2**30,
        "parts": {
            part: {
                "seconds": round(s / iterations, 4),
                "peak_gib": phases.peak[part] / 2**30 if part in phases.peak else None,
                "expected_gib": (held + expected.working[part]) / 2**30,
            }
            for part, s in phases.seconds.items()
        },
    }


def _device_name() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"


def markdown(result: dict) -> str:
    lines = [
        "# One iteration at full size" + (" (tiny transformers: a test of the script)" if result["tiny"] else ""),
        "",
        f"Written by `python benchmarks/gpu_iteration.py` on {result['device']}, torch {result['torch']}. Random "
        "weights and rewards.",
    ]
    for row in result["models"]:
        checkpointing = "with" if row["gradient_checkpointing"] else "without"
        lines += [
            "",
            f"## {row['model']}",
            "",
            f"{row['samples']} samples of {row['resolution']} px, micro-batches of {row['micro_batch']}, "
            f"{checkpointing} gradient checkpointing: {row['seconds']:.2f} s an iteration, "
            f"{row['petaflops']:.3g} PFLOP, "
            f"{100 * row['hardware_utilisation']:.3g} % of an H100's peak ({100 * row['model_utilisation']:.3g} % "
            f"without what checkpointing computes again); {row['expected_peak']:.2f} GiB expected.",
            "",
            "| part | seconds | peak, GiB | expected, GiB |",
            "|---|---|---|---|",
        ]
        for part, p in row["parts"].items():
            peak = "" if p["peak_gib"] is None else f"{p['peak_gib']:.2f}"
            lines.append(f"| {part} | {p['seconds']:.3f} | {peak} | {p['expected_gib']:.2f} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
