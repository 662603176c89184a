"""What an iteration costs at full size: SD3.5-M and Z-Image with random weights, 512 px, on one GPU.

A pipeline of random weights is written to a temporary folder, text encoders and all (16 to 20 GB), and the recipe's
own run trains on it, with another transformer for the teacher where the recipe has one: loading, text encoders, every
part of an iteration, saving. Seconds and peak memory of each, what `tdm_r1.train.estimate` expected, and the share of
the GPU's peak arithmetic (model FLOP utilisation, and hardware's, which counts what checkpointing computes again). The
reward is random numbers. With ``--tiny`` the same code runs on small networks and a CPU.

Run: ``python benchmarks/gpu_iteration.py`` (writes docs/results/gpu_iteration.json and .md).
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from phases import Phases
from tdm_r1.config.load import load_recipe
from tdm_r1.config.run import RunConfig
from tdm_r1.models.architectures import architectures, random_pipeline
from tdm_r1.train.estimate import GPU_FLOPS, estimate
from tdm_r1.train.run import Run

sys.path.append(str(Path(__file__).parent.parent / "tests"))
from tiny_models import TEMPLATE, letters_tokenizer

MODELS = {  # recipe and architecture
    "sd35m_geneval": "sd35_medium",
    "sd35m_geneval_release": "sd35_medium",
    "zimage_geneval": "z_image",
}
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
TINY_TEXT: dict[str, dict[str, Any]] = {  # text encoders that fit them
    "CLIPTextModelWithProjection": {"hidden_size": 16, "projection_dim": 16, "num_attention_heads": 2},
    "T5EncoderModel": {"d_model": 48, "d_ff": 16, "num_layers": 1},
    "Qwen3Model": {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "vocab_size": 64},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--recipes", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--prompts", type=int, default=2)
    parser.add_argument("--group", type=int, default=24)
    parser.add_argument("--micro-batch", type=int, default=None, help="instead of the recipe's")
    parser.add_argument("--iterations", type=int, default=2, help="measured, after one that warms up")
    parser.add_argument("--resolution", type=int, default=512)
    parser.add_argument("--checkpointing", choices=("on", "off", "auto"), default="auto", help="of gradients")
    parser.add_argument("--precision", choices=("model", "float32"), default="model", help="in which adapters compute")
    parser.add_argument("--tiny", action="store_true", help="small networks, for a machine without a GPU")
    parser.add_argument("--out", type=Path, default=Path("docs/results/gpu_iteration.json"))
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for name in dict.fromkeys(args.recipes):
            recipe = load_recipe(name)
            block = recipe.release.time_block
            config = recipe.override(
                {
                    "iterations": args.iterations + 1,
                    "batch.prompts": args.prompts,
                    "batch.group": args.group,
                    "batch.micro_batch": args.micro_batch or recipe.batch.micro_batch,
                    "model.resolution": args.resolution,
                    "model.gradient_checkpointing": args.checkpointing == "on"
                    if args.checkpointing != "auto"
                    else "auto",
                    "model.lora.precision": args.precision,
                    "distill_with": None,
                    "model.student_lora": None,
                    "release.time_block": block if block and args.group % block == 0 else None,
                }
            )
            place = Path(folder) / MODELS[name]
            for other in Path(folder).iterdir():  # two models are too much for some disks
                if other != place:
                    shutil.rmtree(other)
            rows.append(measure(name, config, place, args.iterations, tiny=args.tiny))
            print(json.dumps(rows[-1], indent=1), flush=True)
    result = {"device": _device_name(), "torch": torch.__version__, "tiny": args.tiny, "models": rows}
    args.out.write_text(json.dumps(result, indent=1))
    args.out.with_suffix(".md").write_text(markdown(result))
    print(f"Wrote {args.out} and .md")


def measure(recipe: str, config: RunConfig, folder: Path, iterations: int, *, tiny: bool) -> dict[str, Any]:
    """One recipe's row; ``folder`` takes the random pipeline, unless it is there, and the run."""
    name = MODELS[recipe]
    if not (folder / "pipeline").exists():
        save_random_pipeline(name, folder / "pipeline", getattr(torch, config.model.dtype), tiny=tiny)
    here: dict[str, Any] = {"output": folder, "name": recipe, "model.path": str(folder / "pipeline")}
    here |= {"model.teacher": here["model.path"]} if config.model.teacher else {}
    start = time.perf_counter()
    run = Run(config.override(here), reward=random_scores)
    loading = time.perf_counter() - start
    run.step()  # warm-up
    phases = Phases(run.algorithm, run.backbone)
    phases.wrap(run.backbone, "encode", "text encoders")
    start = time.perf_counter()
    for _ in range(iterations):
        metrics = run.step()
    seconds = (time.perf_counter() - start) / iterations
    counted = seconds - phases.seconds["text encoders"] / iterations  # the estimate leaves them out
    start = time.perf_counter()
    run.save()
    run.export(run.folder)
    saving = time.perf_counter() - start
    sizes = TINY[name] if tiny else {}
    config = config.override({"model.gradient_checkpointing": run.backbone.transformer.is_gradient_checkpointing})
    expected = estimate(config, **sizes)
    once = estimate(config.override({"model.gradient_checkpointing": False}), **sizes)
    assert expected is not None
    assert once is not None
    held = sum(expected.held.values())
    return {
        "model": name,
        "command": _command(),
        "recipe": recipe,
        "samples": config.batch.prompts * config.batch.group,
        "micro_batch": config.batch.micro_batch,
        "resolution": config.model.resolution,
        "gradient_checkpointing": expected.recomputed,
        "precision": config.model.lora.precision,
        "loading": round(loading, 1),
        "seconds": round(seconds, 3),
        "saving": round(saving, 2),
        "finite": all(np.isfinite(value) for value in metrics.values()),
        "petaflops": sum(expected.flops.values()) / 1e15,
        "model_utilisation": sum(once.flops.values()) / counted / GPU_FLOPS,
        "hardware_utilisation": sum(expected.flops.values()) / counted / GPU_FLOPS,
        "expected_peak": expected.peak / 2**30,
        "parts": {
            part: {
                "seconds": round(s / iterations, 4),
                "peak_gib": phases.peak[part] / 2**30 if part in phases.peak else None,
                "expected_gib": (held + expected.working[part]) / 2**30,
            }
            for part, s in phases.seconds.items()
        },
    }


def save_random_pipeline(name: str, folder: Path, dtype: torch.dtype, *, tiny: bool) -> None:
    """A folder as the hub has it, with random weights; the tokenizers know letters alone."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parts: dict[str, Any] = {}
    for i, encoder in enumerate(architectures()[name]["text_encoders"]):
        number = f"_{i + 1}" if i else ""
        kind = getattr(transformers, encoder["class"])
        sizes = encoder["config"] | (TINY_TEXT[encoder["class"]] if tiny else {})
        with torch.device(device):
            parts[f"text_encoder{number}"] = kind(kind.config_class(**sizes)).to(dtype)
        parts[f"tokenizer{number}"] = letters_tokenizer(77)  # CLIP's
        parts[f"tokenizer{number}"].chat_template = TEMPLATE
    pipeline = random_pipeline(name, device=device, dtype=dtype, **(TINY[name] if tiny else {}))
    pipeline.register_modules(**parts)
    pipeline.save_pretrained(folder)


def random_scores(images: np.ndarray, prompts: list[str], metadata: list[dict[str, Any]]) -> np.ndarray:
    return np.random.default_rng(len(images)).random(len(images))


def _command() -> str:
    """What was run, but for where the result went."""
    words = sys.argv[1:]
    if "--out" in words:
        del words[words.index("--out") : words.index("--out") + 2]
    return " ".join(["python benchmarks/gpu_iteration.py", *words])


def _device_name() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"


def markdown(result: dict) -> str:
    lines = [
        "# One iteration at full size" + (" (tiny networks: a test of the script)" if result["tiny"] else ""),
        "",
        f"Written by `benchmarks/gpu_iteration.py` on {result['device']}, torch {result['torch']}. Weights and rewards "
        "are random. Peaks are what PyTorch allocated; expected is `tdm_r1.train.estimate`'s arithmetic. Shares of the "
        "peak leave the text encoders' time out.",
    ]
    for row in result["models"]:
        checkpointing = "with" if row["gradient_checkpointing"] else "without"
        lines += [
            "",
            f"## {row['recipe']}, {row['samples']} samples",
            "",
            f"`{row['command']}`",
            "",
            f"{row['samples']} samples of {row['resolution']} px, micro-batches of {row['micro_batch']}, "
            f"{checkpointing} gradient checkpointing, adapters in {row['precision']} precision ({row['model']}): "
            f"{row['seconds']:.2f} s an iteration, "
            f"{row['petaflops']:.3g} PFLOP, "
            f"{100 * row['hardware_utilisation']:.3g} % of an H100's peak ({100 * row['model_utilisation']:.3g} % "
            f"without what checkpointing computes again); {row['expected_peak']:.2f} GiB expected. Loading took "
            f"{row['loading']:.1f} s, saving {row['saving']:.1f} s.",
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
