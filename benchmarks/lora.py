"""What LoRA roles cost: the forward pass of the bare backbone, of an adapter, and of a merged adapter.

Run: ``python benchmarks/lora.py`` (prints samples a second, best of five, and ratios).
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from tdm_r1.config.load import load_recipe
from tdm_r1.models.specification import Role
from tdm_r1.train.run import Run

BATCH = 128


def rate(call: Callable[[], object]) -> float:
    call()
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - start)
    return BATCH / best


def main() -> None:
    run = Run(load_recipe("mini").override({"model.merge": True}))
    x = torch.randn(BATCH, *run.backbone.latent_shape)
    t, c = torch.full((BATCH,), 0.6), run.embed(["a red circle"] * BATCH)

    def forward(role: Role, merge: bool) -> None:
        run.roles.merge = merge
        with torch.no_grad(), run.roles.use(role) as velocity:
            velocity(x, t, c)

    def backward() -> None:
        with run.roles.use(Role.FAKE) as velocity:
            velocity(x, t, c).square().mean().backward()

    bare = rate(lambda: forward(Role.TEACHER, False))
    for name, value in (
        ("backbone, forward", bare),
        ("adapter, forward", rate(lambda: forward(Role.FAKE, False))),
        ("merged adapter, forward", rate(lambda: forward(Role.FAKE, True))),
        ("adapter, forward and backward", rate(backward)),
        ("decoding", rate(lambda: run.backbone.decode(x))),
    ):
        print(f"{name:32s} {value:8.0f} samples/s   {bare / value:5.2f} x the backbone's time")


if __name__ == "__main__":
    main()
