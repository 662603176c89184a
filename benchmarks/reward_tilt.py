"""How far the reward itself allows to go: the 4-step student's samples, tilted by exp(advantage / beta).

KL-regularised reinforcement aims at the start's distribution times exp(advantage / beta). Drawing each prompt's
pictures again with those weights shows that distribution without any training: what strict score it has, and what the
reward's side effects cost in held-out metrics. A surrogate that is no better than the reward cannot do better.

Run: ``python benchmarks/reward_tilt.py`` (writes docs/results/reward_tilt.json and reward_tilt.md);
``--recipe mini_ocr --out docs/results/reward_tilt_signs.json`` for signs that an OCR reads; ``--reward
jpeg_compressibility --inverse-betas 0 0.1 0.2 0.5 1 --out docs/results/reward_tilt_jpeg.json`` for another reward.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from pathlib import Path

import numpy as np
import torch
from rich.progress import track

from tdm_r1.config.load import load_recipe
from tdm_r1.core.groups import standardized
from tdm_r1.evaluate.evaluation import generate
from tdm_r1.models.specification import Role
from tdm_r1.train.run import Run

INVERSE_BETAS = (0.0, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="mini")
    parser.add_argument("--reward", default=None, help="instead of the recipe's")
    parser.add_argument("--inverse-betas", type=float, nargs="+", default=list(INVERSE_BETAS))
    parser.add_argument("--samples", type=int, default=48, help="of each of the evaluation's prompts")
    parser.add_argument("--repeats", type=int, default=4, help="draws, over which mean and deviation are taken")
    parser.add_argument("--out", type=Path, default=Path("docs/results/reward_tilt.json"))
    args = parser.parse_args()
    config = load_recipe(args.recipe)
    run = Run(config.override({"reward": args.reward}) if args.reward else config)
    e = run.config.evaluation
    prompts = run.task.eval_prompts(e.prompts)
    images, rewards = samples(run, args.samples)
    advantages = standardized(rewards)[0]
    rng = np.random.default_rng(0)
    repeated = [p for p in prompts for _ in range(e.images_per_prompt)]
    rows = []
    for inverse_beta in track(args.inverse_betas, "tilting"):
        found = []
        for _ in range(args.repeats):
            drawn = tilted(advantages, inverse_beta, e.images_per_prompt, rng)
            pictures = np.take_along_axis(images, drawn[:, :, None, None, None], axis=1)
            metrics = run.task.metrics(pictures.reshape(-1, *images.shape[2:]), repeated, e.images_per_prompt)
            overall = {name: value for name, value in metrics.items() if "/" not in name}
            found.append({"reward": np.nanmean(np.take_along_axis(rewards, drawn, axis=1))} | overall)
        columns = {name: [f[name] for f in found] for name in found[0]}
        rows.append(
            {"inverse_beta": inverse_beta}
            | {name: round(float(np.mean(values)), 4) for name, values in columns.items()}
            | {f"{name}_deviation": round(float(np.std(values, ddof=1)), 4) for name, values in columns.items()}
        )
    result = {
        "command": shlex.join(["python", *sys.argv]),
        "recipe": args.recipe,
        "prompts": len(prompts),
        "samples": args.samples,
        "rows": rows,
    }
    args.out.write_text(json.dumps(result, indent=1))
    args.out.with_suffix(".md").write_text(markdown(result))
    print(args.out.with_suffix(".md").read_text())


def samples(run: Run, n: int) -> tuple[np.ndarray, np.ndarray]:
    """``n`` pictures of every evaluation prompt, uint8 [P, n, H, W, 3], and their rewards [P, n]."""
    prompts = run.task.eval_prompts(run.config.evaluation.prompts)
    noise = torch.Generator().manual_seed(31)
    images, rewards = [], []
    for prompt in track(prompts, "sampling"):
        x_1 = torch.randn((n, *run.backbone.latent_shape), generator=noise)
        sampling = run.few_step(Role.GENERATOR)
        own = generate(run.backbone, run.roles, sampling, run.embed, [prompt.text] * n, x_1, batch=n, seed=0)
        images.append(own)
        rewards.append(run.scorer(own, [prompt] * n).values)
    return np.stack(images), np.stack(rewards)


def tilted(advantages: np.ndarray, inverse_beta: float, n: int, rng: np.random.Generator) -> np.ndarray:
    """Indices [P, n] of pictures drawn without repetition, with probabilities that rise as exp(advantage / beta)."""
    # the n largest of log-weight plus Gumbel noise are draws without repetition (Efraimidis and Spirakis)
    keys = inverse_beta * advantages + rng.gumbel(size=advantages.shape)
    return np.argsort(-keys, axis=1)[:, :n]


def markdown(result: dict) -> str:
    shown = [name.removesuffix("_deviation") for name in result["rows"][0] if name.endswith("_deviation")]
    lines = [
        "# How far the reward itself allows to go",
        "",
        f"Written by `{result['command']}`:",
        f"{result['samples']} pictures of each of {result['prompts']} prompts by the",
        f"4-step student that recipe `{result['recipe']}` starts from, drawn again within each prompt with weights "
        "exp(advantage / beta).",
        "This is what reinforcement with a KL term aims at, without any training. Mean and deviation over draws.",
        "",
        "| 1 / beta | " + " | ".join(shown) + " |",
        "|---|" + "---|" * len(shown),
    ]
    for row in result["rows"]:
        cells = [f"{row[name]:.3f} ± {row[f'{name}_deviation']:.3f}" for name in shown]
        lines.append(f"| {row['inverse_beta']:g} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
