"""What LoRA roles cost beside the bare transformer: peft's layer, this project's, and merged copies.

Two models on this machine: the mini model in float32, and a random SD3 of 512 channels in bfloat16, as the real models
are. Every kind is timed in turn, several times; the best counts.

Run: ``python benchmarks/lora.py`` (writes docs/results/lora.json and lora.md).
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners import lora
from torch import Tensor

from tdm_r1.config.load import load_recipe
from tdm_r1.models.architectures import random_pipeline
from tdm_r1.models.create import create_roles
from tdm_r1.models.load import adapter_settings, load_backbones
from tdm_r1.models.lora_layer import Linear
from tdm_r1.models.protocol import Conditioning
from tdm_r1.models.roles import Roles
from tdm_r1.models.sd3 import SD3Backbone
from tdm_r1.models.specification import AddedDelta, Role, RoleSpec
from tdm_r1.train.estimate import random_conditioning

ROUNDS = 7
BATCH = {"mini, float32": 128, "SD3 of 512 channels, bfloat16": 8}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("docs/results/lora.json"))
    args = parser.parse_args()
    result = {
        "threads": torch.get_num_threads(),
        "processor": platform.processor() or platform.machine(),
        "models": {name: measure(name, batch) for name, batch in BATCH.items()},
    }
    args.out.write_text(json.dumps(result, indent=1))
    args.out.with_suffix(".md").write_text(markdown(result))
    print(args.out.with_suffix(".md").read_text())


def measure(name: str, batch: int) -> dict[str, dict[str, float]]:
    """Milliseconds a sample, forward and with backward, of each kind of role."""
    backbone, config = model(name)
    x = torch.randn(batch, *backbone.latent_shape)
    merge = name.startswith("mini")
    if merge:
        c = Conditioning.join(backbone.encode(["a red circle"])).expand(batch)
    else:
        c = random_conditioning(backbone, batch, device="cpu")
    inputs = x, torch.rand(batch), c
    roles = create_roles(specs(), backbone, config, merge=merge)
    kinds: dict[str, tuple[Role, AbstractContextManager[None]]] = {"transformer alone": (Role.TEACHER, nullcontext())}
    for role, what in ((Role.SURROGATE, "one adapter"), (Role.FAKE, "two adapters")):
        kinds[f"{what}, peft's layer"] = (role, layers(roles, pefts=True))
        kinds[f"{what}, float32"] = (role, layers(roles, precise=True))
        if merge:
            kinds[f"{what}, merged"] = (role, nullcontext())
        else:
            kinds[f"{what}, the model's precision"] = (role, layers(roles))
    best: dict[str, dict[str, float]] = {kind: {} for kind in kinds}
    for once in range(ROUNDS + 1):
        for kind, (role, context) in kinds.items():
            with context:
                for what, passes in (("forward", forward), ("both", both)):
                    if what == "both" and role == Role.TEACHER:
                        continue
                    seconds = timed(partial(passes, roles, role, inputs)) / batch * 1e3
                    best[kind][what] = min(best[kind].get(what, seconds), seconds) if once > 1 else seconds
    return best  # without the first, which warms up


def model(name: str) -> tuple[Any, LoraConfig]:
    settings = load_recipe("mini").model
    if name.startswith("mini"):
        return load_backbones(settings)[0], adapter_settings(settings)
    sizes = {"num_layers": 4, "num_attention_heads": 8, "caption_projection_dim": 512, "joint_attention_dim": 512}
    pipeline = random_pipeline("sd35_medium", device="cpu", dtype=torch.bfloat16, dual_attention_layers=[0], **sizes)
    backbone = SD3Backbone(pipeline, max_sequence_length=1, resolution=256)
    own = load_recipe("sd35m_geneval").model
    return backbone, adapter_settings(own)


def specs() -> list[RoleSpec]:
    """As in TDM-R1: a surrogate, and a fake score to which the surrogate's average is added."""
    return [
        RoleSpec(Role.SURROGATE, trained=True),
        RoleSpec(Role.SURROGATE_EMA),
        RoleSpec(Role.FAKE, trained=True, added=AddedDelta(Role.SURROGATE_EMA, 1.5)),
    ]


class layers(AbstractContextManager[None]):
    """Inside, adapters are not merged, and act by peft's layer, or in float32."""

    def __init__(self, roles: Roles, *, pefts: bool = False, precise: bool = False) -> None:
        self.roles, self.pefts, self.precise, self.merge = roles, pefts, precise, roles.merge

    def __enter__(self) -> None:
        self.own, self.roles.merge = Linear.forward, False
        for module in self.roles.transformer(Role.TEACHER).modules():
            if isinstance(module, Linear):
                module.precise = self.precise
        if self.pefts:
            Linear.forward = lora.Linear.forward  # type: ignore[method-assign]

    def __exit__(self, *error: object) -> None:
        Linear.forward, self.roles.merge = self.own, self.merge  # type: ignore[method-assign]


def timed(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def forward(roles: Roles, role: Role, inputs: tuple[Tensor, Tensor, Conditioning]) -> None:
    with torch.no_grad(), roles.use(role) as velocity:
        velocity(*inputs)


def both(roles: Roles, role: Role, inputs: tuple[Tensor, Tensor, Conditioning]) -> None:
    with roles.use(role) as velocity:
        velocity(*inputs).square().mean().backward()


def markdown(result: dict) -> str:
    lines = [
        "# What adapters cost",
        "",
        "Written by `python benchmarks/lora.py`: the best of several times, taken in turn. In brackets the multiple of "
        "the transformer's own forward pass. "
        f"{result['threads']} thread(s) of a CPU; on a GPU this was not measured.",
    ]
    for name, kinds in result["models"].items():
        bare = kinds["transformer alone"]["forward"]
        lines += ["", f"## {name}, {BATCH[name]} samples", "", "| | forward, ms a sample | forward and backward |"]
        lines += ["|---|---|---|"]
        for kind, found in kinds.items():
            cells = (f"{found[w]:.2f} ({found[w] / bare:.2f})" if w in found else "" for w in ("forward", "both"))
            lines.append(f"| {kind} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
