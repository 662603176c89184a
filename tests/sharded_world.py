"""What processes compute whose frozen transformer is spread over them; `test_processes` compares it with one process.

python -m torch.distributed.run --standalone --nproc-per-node 2 tests/sharded_world.py FOLDER
"""

from __future__ import annotations

import errno
import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageWriter
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_leaves, tree_map_only

import tiny_models
from mixture_world import with_sgd
from tdm_r1.config.run import RunConfig, validate
from tdm_r1.core import processes, shards
from tdm_r1.train.launch import joined
from tdm_r1.train.run import Run

CASES: dict[str, tuple[str, dict[str, Any]]] = {  # the model's class, and settings
    "sd3": ("sd3", {}),
    "z_image": ("z_image", {}),
    "checkpointing": ("sd3", {"model": {"gradient_checkpointing": True}}),
    "another teacher": ("sd3", {"model": {"teacher": "teacher"}}),
    "release": ("sd3", {"algorithm": "tdm_r1_release"}),
    "full": ("sd3", {"model": {"roles": "full"}, "surrogate": {"draws": 2, "added_delta": 0.0}}),
    "full surrogate": ("z_image", {"surrogate": {"draws": 2, "weights": "full", "added_delta": 0.0}}),
}


def config_of(case: str, folder: Path, *, shard: bool) -> RunConfig:
    kind, more = CASES[case]
    model = {"path": str(folder / kind), "resolution": 16, "lora": {"rank": 2}, "shard": shard} | more.get("model", {})
    if "teacher" in model:
        model["teacher"] = str(folder / "teacher")
    return validate(
        {
            "iterations": 2,
            "model": model,
            "batch": {"prompts": 3, "group": 3, "micro_batch": 3},
            "tdm": {"teacher_guidance": 2.0},
            "surrogate": {"draws": 2},
            "reward": "jpeg_compressibility",
            "evaluation": {"prompts": 3},
            "output": str(folder),
        }
        | {name: value for name, value in more.items() if name != "model"}
    )


def make(folder: Path) -> None:
    """The models' folders."""
    tiny_models.sd3(folder / "sd3", dual=True)
    tiny_models.sd3(folder / "teacher", dual=True, seed=1)
    tiny_models.z_image(folder / "z_image")
    (folder / "prompts.txt").write_text("a cat\na red dog\nthree birds\n")


def trained(case: str, folder: Path, *, shard: bool) -> dict[str, Tensor]:
    """Weights of all roles after an iteration, and what this process keeps of the frozen transformer."""
    run = Run(config_of(case, folder, shard=shard))
    with_sgd(run, 0.02)  # AdamW would make steps of full size of what is rounding
    run.step()
    weights = states(run)
    frozen = [p for n, p in run.backbone.transformer.named_parameters() if ".lora_" not in n]
    assert all(isinstance(p, DTensor) for p in frozen) is shard
    kept = sum(p.to_local().numel() if isinstance(p, DTensor) else p.numel() for p in frozen)
    return weights | {"kept": torch.tensor([kept, sum(p.numel() for p in frozen)])}


def states(run: Run) -> dict[str, Tensor]:
    return {f"{s.name}/{n}": p for s in run.roles.specs for n, p in run.roles.state(s.name).items()}


def fitted(folder: Path, *, shard: bool) -> RunConfig:
    """The settings of a whole run of two iterations with roles of full weights."""
    config = config_of("full", folder, shard=shard)
    changes = {"name": "fitted", "save_every": 1, "evaluation.every": 1, "evaluation.grid_prompts": 2}
    return config.override(changes | {"task.name": "prompts", "task.prompts": folder / "prompts.txt"})


def shares(state: dict[str, Any]) -> list[Tensor]:
    """What this process has of every tensor of an algorithm's state."""
    tensors = [leaf for leaf in tree_leaves(state) if isinstance(leaf, Tensor)]
    assert any(isinstance(p, DTensor) for p in tensors)
    return [p.to_local() if isinstance(p, DTensor) else p for p in tensors]


def a_full_disk(run: Run) -> None:
    """Saving raises what all other code takes for a full disk, and leaves the checkpoints as they were."""

    def no_space(*args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    before = sorted((run.folder / "checkpoints").iterdir())
    with (
        patch.object(HuggingFaceStorageWriter, "write_data", no_space),
        pytest.raises(OSError, match=r"cannot write .*\.shares: OSError: .*No space left"),
    ):
        run.save()
    assert sorted((run.folder / "checkpoints").iterdir()) == before


def fit(folder: Path) -> None:
    """The run, and once more from its first checkpoint."""
    found = []
    for again in (False, True):
        run = Run(fitted(folder, shard=True))
        run.fit(resume=again, start_from=1 if again else None)
        found.append(states(run))
        own = run.algorithm.state()
        run.algorithm.load_state(tree_map_only(Tensor, shards.gathered, own))  # as a run of one process has saved them
        assert all(map(torch.equal, *map(shares, (own, run.algorithm.state())))), "whole"
    assert all(torch.equal(p, found[1][n]) for n, p in found[0].items()), "resumed"
    plain = Run(fitted(folder, shard=False))  # several processes, each of which has all weights
    plain.load(plain.checkpoints()[-1])
    assert all(torch.equal(p, found[0][n]) for n, p in states(plain).items()), "not spread"
    plain.step()
    a_full_disk(run)
    if processes.rank() == 0:
        save_file(found[0], folder / "fitted.safetensors")


def main(folder: Path) -> None:
    with joined():
        fit(folder)
        for case in CASES:
            weights = trained(case, folder, shard=True)
            for other in processes.gather_each(weights):
                assert all(torch.equal(other[name], p) for name, p in weights.items() if name != "kept"), case
            weights["kept"] = torch.stack(processes.gather_each(weights["kept"]))
            if processes.rank() == 0:
                save_file({n: p.contiguous().clone() for n, p in weights.items()}, folder / f"{case}.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
