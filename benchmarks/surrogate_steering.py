"""How far the surrogate's direction is worth following, and at which noise levels.

The student stays as it is. A surrogate learns from its scored pictures, as in a run; then the student is sampled with
``v + w (v_phi - v_ref)`` in some of its steps. Strict says what the direction knows of the reward, the Frechet distance
what following it costs; `balance.scale` is of the order of the w that pays.

Run: ``python benchmarks/surrogate_steering.py`` (writes docs/results/surrogate_steering.json and .md).
"""

from __future__ import annotations

import argparse
import json
from functools import partial
from pathlib import Path

import numpy as np
import torch
from rich.progress import track
from torch import Tensor

from surrogate_signal import scored_rollout, tdm_r1_of
from tdm_r1 import flow, solvers
from tdm_r1.backbones import Conditioning
from tdm_r1.config import load_recipe
from tdm_r1.evaluation import Evaluator
from tdm_r1.randomness import torch_rng
from tdm_r1.roles import Role
from tdm_r1.trainer import Run

ALL = (0.9, 0.75, 0.5)  # the student's steps but the first, where x_t is noise alone
SETTINGS = [(w, ALL) for w in (0, 2, 4, 8, 16)] + [(w, (t,)) for t in ALL for w in (6, 18)]
SHOWN = ("strict", "soft", "cleanliness", "frechet", "diversity")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, default=48, help="scored batches that the surrogate learns from")
    parser.add_argument("--seed", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("docs/results/surrogate_steering.json"))
    args = parser.parse_args()
    run = Run(load_recipe("mini").override({"surrogate.carried": 0.0}))  # the student stays as it is
    algorithm = tdm_r1_of(run)
    for b in track(range(args.batches), "the surrogate learns"):
        rollout, advantage = scored_rollout(run, args.seed, b)
        noise = torch_rng(args.seed, b, "draws")
        for _ in range(run.config.surrogate.draws):
            algorithm.fit_surrogate(rollout, advantage, advantage.nonzero()[:, 0], noise)
            algorithm.update_reference()
    evaluator = run.evaluator()
    rows = []
    for weight, times in track(SETTINGS, "steering"):
        metrics = run.task.metrics(
            steered(run, evaluator, weight, times), evaluator.prompts, evaluator.images_per_prompt
        )
        rows.append({"weight": weight, "times": times, **{k: round(metrics[k], 4) for k in SHOWN}})
    scored = args.batches * run.config.batch.prompts * run.config.batch.group
    result = {"batches": args.batches, "scored": scored, "pictures": len(evaluator.prompts), "rows": rows}
    args.out.write_text(json.dumps(result, indent=1))
    args.out.with_suffix(".md").write_text(markdown(result))
    print(args.out.with_suffix(".md").read_text())


@torch.no_grad()  # sampling
def steered(run: Run, evaluator: Evaluator, weight: float, times: tuple[float, ...]) -> np.ndarray:
    """The evaluation's pictures, uint8 [B, H, W, 3], with phi's direction added in the steps from ``times``."""
    c = run.embed([p.text for p in evaluator.prompts])
    grid = flow.few_step_grid(run.config.sampler.steps, run.config.sampler.shift)

    def velocity(c: Conditioning, x_t: Tensor, t: Tensor) -> Tensor:
        with run.roles.use(Role.GENERATOR) as of_student:
            v = of_student(x_t, t, c)
        if weight == 0 or not any(abs(float(t[0]) - at) < 1e-3 for at in times):
            return v
        with run.roles.use(Role.SURROGATE_EMA) as of_phi:
            v = v + weight * of_phi(x_t, t, c)
        with run.roles.use(Role.TEACHER) as of_reference:
            return v - weight * of_reference(x_t, t, c)

    pictures = []
    for part in torch.arange(len(c)).split(run.config.batch.micro_batch):
        own = c.rows(part)
        final = solvers.sample(partial(velocity, own), evaluator.x_1[part], grid).final
        pictures.append(run.backbone.decode(final))
    return np.concatenate(pictures)


def markdown(result: dict) -> str:
    lines = [
        "# How far the surrogate's direction is worth following",
        "",
        f"Written by `python benchmarks/surrogate_steering.py --batches {result['batches']}`:",
        f"a surrogate that learnt from {result['scored']:,} scored pictures of the 4-step student, which stays",
        f"as it is; {result['pictures']:,} pictures a row, the same noise.",
        "",
        "| weight w | in the steps from t = | " + " | ".join(SHOWN) + " |",
        "|---|---|" + "---|" * len(SHOWN),
    ]
    for row in result["rows"]:
        where = ", ".join(f"{t:g}" for t in row["times"]) if row["weight"] else "none"
        lines.append(f"| {row['weight']} | {where} | " + " | ".join(f"{row[k]:.3f}" for k in SHOWN) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
