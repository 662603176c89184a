"""How much of one batch's surrogate gradient is signal, by trajectory point and noise level.

The generator stays as it is; gradients g_b of the anchored loss at phi = ref are taken on independent batches. Their
mean's squared norm, without the bias of the noise, is (|sum g|^2 - sum |g|^2) / (n (n - 1)); over the mean |g|^2 it is
the share of a batch's gradient that is signal.

Run: ``python benchmarks/surrogate_signal.py`` (writes docs/results/surrogate_signal.json and surrogate_signal.md).
"""

from __future__ import annotations

import argparse
import json
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from tdm_r1.advantages import group_advantages
from tdm_r1.algorithms.tdm import Rollout
from tdm_r1.algorithms.tdm_r1 import TDMR1
from tdm_r1.config import load_recipe
from tdm_r1.randomness import numpy_rng, torch_rng
from tdm_r1.roles import Role
from tdm_r1.trainer import Run

SETTINGS: dict[str, dict[str, Any]] = {
    "every x_{t_k}, any t": {},
    "every x_{t_k}, noise not shared": {"surrogate.shared_noise": False},
    "every x_{t_k}, baseline the reference": {"surrogate.baseline": "reference"},
    "every x_{t_k}, t in .3 to .95": {"surrogate.time_range": (0.3, 0.95)},
    "x_0, any t": {"surrogate.points": "final"},
    "x_0, t in 0 to .3": {"surrogate.points": "final", "surrogate.time_range": (0.0, 0.3)},
    "x_0, t in .3 to .6": {"surrogate.points": "final", "surrogate.time_range": (0.3, 0.6)},
    "x_0, t in .6 to .8": {"surrogate.points": "final", "surrogate.time_range": (0.6, 0.8)},
    "x_0, t in .8 to .95": {"surrogate.points": "final", "surrogate.time_range": (0.8, 0.95)},
    "x_0, t in .3 to .95": {"surrogate.points": "final", "surrogate.time_range": (0.3, 0.95)},
}


class Sums:
    """Running sums of gradients and of their squared norms."""

    def __init__(self) -> None:
        self.total: Tensor | None = None
        self.squares = 0.0
        self.n = 0

    def add(self, g: Tensor) -> None:
        self.total = g if self.total is None else self.total + g
        self.squares += float(g.square().sum())
        self.n += 1

    def report(self) -> dict[str, float]:
        assert self.total is not None
        signal = (float(self.total.square().sum()) - self.squares) / (self.n * (self.n - 1))
        size = self.squares / self.n
        return {"size": size**0.5, "signal_share": signal / size}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, default=24)
    parser.add_argument("--seed", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("docs/results/surrogate_signal.json"))
    args = parser.parse_args()
    plain = load_recipe("mini").override(
        {"surrogate.points": "all", "surrogate.time_range": (0.0, 1.0), "surrogate.carried": 0.0}
    )
    run = Run(plain)
    group, algorithm = plain.batch.group, tdm_r1_of(run)
    sums = {name: Sums() for name in SETTINGS}
    for b in range(args.batches):
        rollout, advantage = scored_rollout(run, args.seed, b)
        for name, changes in SETTINGS.items():
            algorithm.config = plain.override(changes).surrogate
            noise = torch_rng(args.seed, b, "draws")
            gradient: list[Tensor] = []
            with mock.patch.object(algorithm.surrogate, "step", partial(collect, run, gradient)):  # no update
                algorithm.fit_surrogate(rollout, advantage, advantage.nonzero()[:, 0], noise)
            sums[name].add(gradient[0])
    samples = plain.batch.prompts * group
    result = {"batches": args.batches, "samples": samples, "settings": {n: s.report() for n, s in sums.items()}}
    args.out.write_text(json.dumps(result, indent=1))
    args.out.with_suffix(".md").write_text(markdown(result))
    print(args.out.with_suffix(".md").read_text())


def tdm_r1_of(run: Run) -> TDMR1:
    assert isinstance(run.algorithm, TDMR1)  # the recipe `mini` is one of TDM-R1
    return run.algorithm


def scored_rollout(run: Run, seed: int, number: int) -> tuple[Rollout, Tensor]:
    """A batch of the student's trajectories and their advantages."""
    c = run.config.batch
    prompts = run.task.train_prompts(c.prompts, numpy_rng(seed, number, "prompts"))
    prompts = [p for p in prompts for _ in range(c.group)]
    noise = torch_rng(seed, number, "initial noise")
    x_1 = torch.randn((len(prompts), *run.backbone.latent_shape), generator=noise)
    rollout = tdm_r1_of(run).tdm.roll_out(run.embed([p.text for p in prompts]), x_1, noise)
    scores = run.scorer(run.backbone.decode(rollout.trajectory.final), prompts)
    rewards = torch.tensor(scores.values, dtype=torch.float32)
    return rollout, group_advantages(rewards.reshape(-1, c.group)).advantage.flatten()


def collect(run: Run, into: list[Tensor]) -> float:
    """Takes the surrogate's gradient away; returns its norm as an optimizer's step would."""
    parameters = run.roles.parameters(Role.SURROGATE)
    into.append(torch.cat([p.grad.flatten() for p in parameters if p.grad is not None]))
    for p in parameters:
        p.grad = None
    return float(into[-1].norm())


def markdown(result: dict) -> str:
    lines = [
        "# Where the surrogate's signal lies",
        "",
        f"Written by `python benchmarks/surrogate_signal.py --batches {result['batches']}`:",
        f"the anchored loss at phi = ref, batches of {result['samples']} scored samples, one draw each.",
        "",
        "| learned from | size of the gradient | share of it that is signal |",
        "|---|---|---|",
    ]
    lines += [
        f"| {name} | {row['size']:.4f} | {100 * row['signal_share']:.1f} % |"
        for name, row in result["settings"].items()
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
