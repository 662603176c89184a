"""How near the surrogate's direction comes to the exact one, by noise level.

For one prompt and many of the student's pictures x_0^j with advantages A_j, Bayes' rule over that sample gives, at any
x_t, the exact direction of the expected advantage, cov(A, x_0 | x_t): the weights are q(x_t | x_0^j). The surrogate's
own direction, learnt from scored batches as in a run, is compared with it: ``cosine``, and ``projection``, the share of
the exact direction that it has. The same sum gives the exact mean of x_0, which the fake score should know.

The weights need a sample that is dense at that noise level: ``effective`` says how many pictures share the weight.

Run: ``python benchmarks/surrogate_direction.py`` (writes docs/results/surrogate_direction.json and .md).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from torch import Tensor

from surrogate_signal import scored_rollout, tdm_r1_of
from tdm_r1 import flow
from tdm_r1.algorithms.tdm import few_step_sample
from tdm_r1.backbones import Conditioning
from tdm_r1.config import load_recipe
from tdm_r1.mini.world import prompt_of
from tdm_r1.randomness import torch_rng
from tdm_r1.roles import Role
from tdm_r1.tasks import Prompt
from tdm_r1.trainer import Run

TIMES = (0.98, 0.95, 0.92, 0.9, 0.87, 0.84)
PROBES = 200  # pictures that are noised; the others are the sample
_CIRCLE, _SQUARE = {"class": "circle", "count": 1}, {"class": "square", "count": 1}
SPECS: list[dict[str, Any]] = [
    {"tag": "position", "include": [_CIRCLE, {"class": "cross", "count": 1, "position": ["left of", 0]}]},
    {"tag": "color_attr", "include": [_CIRCLE | {"color": "red"}, _SQUARE | {"color": "blue"}]},
    {"tag": "counting", "include": [{"class": "triangle", "count": 3}]},
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, default=60, help="scored batches that the surrogate learns from")
    parser.add_argument("--samples", type=int, default=10_000, help="pictures of each prompt")
    parser.add_argument("--seed", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("docs/results/surrogate_direction.json"))
    args = parser.parse_args()
    run = Run(load_recipe("mini").override({"surrogate.carried": 0.0}))  # the student stays as it is
    algorithm = tdm_r1_of(run)
    for b in track(range(args.batches), "the surrogate learns"):
        rollout, advantage = scored_rollout(run, args.seed, b)
        noise = torch_rng(args.seed, b, "draws")
        for _ in range(run.config.surrogate.draws):
            algorithm.fit_surrogate(rollout, advantage, advantage.nonzero()[:, 0], noise)
            algorithm.update_reference()
    rows = []
    for spec in SPECS:
        c = run.embed([prompt_of(spec)])
        x_0, advantage = scored_samples(run, spec, c, args.samples)
        rows += [{"prompt": prompt_of(spec), "t": t} | compare(run, c, x_0, advantage, t) for t in TIMES]
    result = {"batches": args.batches, "samples": args.samples, "rows": rows}
    args.out.write_text(json.dumps(result, indent=1))
    args.out.with_suffix(".md").write_text(markdown(result))
    print(args.out.with_suffix(".md").read_text())


@torch.no_grad()  # sampling
def scored_samples(run: Run, spec: dict, c: Conditioning, n: int) -> tuple[Tensor, Tensor]:
    """The student's final latents [n, D] for one prompt, and their advantages [n] over the whole sample."""
    noise, prompt = torch.Generator().manual_seed(0), Prompt(prompt_of(spec), spec)
    latents, rewards = [], []
    for _ in track(range(n // 500), prompt.text):
        x_1 = torch.randn((500, *run.backbone.latent_shape), generator=noise)
        final = few_step_sample(run.roles, Role.GENERATOR, c.expand(500), x_1, run.config.sampler, None).final
        latents.append(final.flatten(1))
        rewards.append(torch.from_numpy(run.scorer(run.backbone.decode(final), [prompt] * 500).values))
    reward = torch.cat(rewards).float()
    return torch.cat(latents), (reward - reward.mean()) / reward.std()


@torch.no_grad()  # a comparison
def compare(run: Run, c: Conditioning, x_0: Tensor, advantage: Tensor, t: float) -> dict[str, float]:
    probes, bank, of_bank = x_0[:PROBES], x_0[PROBES:], advantage[PROBES:]
    eps = torch.randn(probes.shape, generator=torch.Generator().manual_seed(5))
    x_t = (1 - t) * probes + t * eps
    weights = (-torch.cdist(x_t, (1 - t) * bank).square() / (2 * t * t)).softmax(1)
    mean = weights @ bank
    exact = weights @ (of_bank[:, None] * bank) - (weights @ of_bank)[:, None] * mean
    x, times, company = x_t.reshape(PROBES, *run.backbone.latent_shape), torch.full((PROBES,), t), c.expand(PROBES)
    predicted = {}
    for role in (Role.SURROGATE_EMA, Role.TEACHER, Role.FAKE):
        with run.roles.use(role) as velocity:
            predicted[role] = flow.x0_from_v(velocity(x, times, company), x, times).flatten(1)
    own = predicted[Role.SURROGATE_EMA] - predicted[Role.TEACHER]
    figures = {
        "effective": float((1 / weights.square().sum(1)).median()),
        "exact": float(exact.norm(dim=1).mean()),
        "cosine": float(torch.nn.functional.cosine_similarity(own, exact).mean()),
        "projection": float((own * exact).sum() / exact.square().sum()),
        "fake_error": float((predicted[Role.FAKE] - mean).norm(dim=1).mean()),
    }
    return {name: round(value, 4) for name, value in figures.items()}


def markdown(result: dict) -> str:
    lines = [
        "# The surrogate's direction against the exact one",
        "",
        "Written by `python benchmarks/surrogate_direction.py`: a surrogate that learnt from "
        f"{result['batches'] * 128:,} scored pictures of",
        f"the 4-step student, against Bayes' rule over {result['samples']:,} scored pictures of each prompt. "
        "Lengths are in latents;",
        "projection is the share of the exact direction that the surrogate has; fake error is the distance of the",
        "fake score's mean of x_0 from the exact mean.",
        "",
        "| prompt | t | effective pictures | length of the exact direction | cosine | projection | fake error |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in result["rows"]:
        lines.append(
            f"| {r['prompt']} | {r['t']:g} | {r['effective']:.0f} | {r['exact']:.2f} | {r['cosine']:.2f} | "
            f"{r['projection']:.2f} | {r['fake_error']:.2f} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
