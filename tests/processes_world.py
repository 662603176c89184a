"""What several processes compute on the mixture world; `test_processes` compares it with what one computes.

python -m torch.distributed.run --standalone --nproc-per-node 2 tests/processes_world.py FOLDER
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from mixture_world import TEACHER, conditioning, experiment, finished, reward
from tdm_r1.algorithms.dgpo import DGPO
from tdm_r1.algorithms.flow_grpo import FlowGRPO
from tdm_r1.algorithms.nft import DiffusionNFT
from tdm_r1.algorithms.protocol import Algorithm, Batch
from tdm_r1.algorithms.tdm import TDM
from tdm_r1.algorithms.tdm_direct_rl import TDMDirectRL
from tdm_r1.algorithms.tdm_r1 import TDMR1
from tdm_r1.algorithms.tdm_r1_release import TDMR1Release
from tdm_r1.core import processes
from tdm_r1.core.randomness import Normal
from tdm_r1.train.launch import joined

GROUP = 6
Score = Callable[[Tensor], Tensor]


def only_first_group(latents: Tensor) -> Tensor:
    """No difference in any other group: processes without signal."""
    scores = reward(latents)
    scores[GROUP:] = 1.0
    return scores


def some_missing(latents: Tensor) -> Tensor:
    """A few are missing here and there, and all of the second group."""
    scores = reward(latents)
    scores[::5] = torch.nan
    scores[GROUP : 2 * GROUP] = torch.nan
    return scores


def nothing(latents: Tensor) -> Tensor:
    return torch.zeros(len(latents), dtype=torch.float64)


PREFERENCE = {"loss": "preference", "trust_region": "anchor", "anchor_weight": 0.1}
CASES: dict[str, tuple[type[Algorithm], int, int, dict, Score]] = {  # algorithm, prompts, micro-batch, settings, scores
    "tdm": (TDM, 5, 4, {"tdm": {"fake_scores": "two"}, "sampler": {"solver": "dpm"}}, reward),
    "stochastic": (TDM, 5, 4, {"sampler": {"solver": "stochastic"}}, reward),
    "tdm_r1": (TDMR1, 5, 4, {"tdm": {"fake_scores": "two"}}, reward),
    "extremes": (TDMR1, 5, 6, {"batch": {"trained": 4}}, some_missing),
    "one group": (TDMR1, 5, 4, {}, only_first_group),
    "no signal": (TDMR1, 4, 6, {}, nothing),
    "preference": (TDMR1, 5, 12, {"surrogate": PREFERENCE}, some_missing),
    "groups of many processes": (TDMR1, 4, 4, {"surrogate": PREFERENCE}, reward),
    "fewer groups than processes": (TDMR1, 1, 6, {"surrogate": PREFERENCE}, reward),
    "release": (TDMR1Release, 5, 12, {}, some_missing),
    "release, one group": (TDMR1Release, 1, 12, {}, reward),
    "dgpo": (DGPO, 5, 12, {"dgpo": {"time_low": 0.0}}, some_missing),
    "flow_grpo": (FlowGRPO, 5, 6, {}, only_first_group),
    "nft": (DiffusionNFT, 5, 6, {}, reward),
    "tdm_direct_rl": (TDMDirectRL, 5, 12, {"dgpo": {"time_low": 0.0}}, reward),
}


def trained(case: str) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Weights of all roles after three iterations, and the last one's metrics."""
    kind, prompts, micro_batch, settings, score = CASES[case]
    batch = {"prompts": prompts, "group": GROUP, "micro_batch": micro_batch}
    found = experiment(kind, TEACHER, **(settings | {"batch": batch | settings.get("batch", {})}))
    metrics: dict[str, float] = {}
    for i in range(3):
        noise = torch.Generator().manual_seed(i)
        n, x_1 = prompts * GROUP, Normal.drawn(noise, (2, 1, 1))
        beside = (conditioning(7), x_1.first(n + 7)[n:]) if kind is TDMR1 else ()
        batch = Batch(conditioning(n), x_1.first(n), GROUP, noise, *beside)
        metrics = finished(found.algorithm.step(batch), score)
    weights = {
        f"{spec.name}/{name}": p.detach().clone()
        for spec in found.roles.specs
        for name, p in found.roles.weights(spec.name).items()
    }
    return weights, {name: value for name, value in metrics.items() if not name.startswith("seconds")}


def main(folder: Path) -> None:
    with joined():
        for case in CASES:
            weights, metrics = trained(case)
            for other in processes.gather_each(weights):
                assert all(torch.equal(other[name], p) for name, p in weights.items()), case
            if processes.rank() == 0:
                found = {name: p.tolist() for name, p in weights.items()}
                (folder / f"{case}.json").write_text(json.dumps({"weights": found, "metrics": metrics}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
