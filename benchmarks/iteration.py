"""What one iteration of TDM-R1 costs: seconds, share and network evaluations of each part.

Run: ``python benchmarks/iteration.py`` (writes docs/results/iteration.json and iteration.md).
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tdm_r1.algorithms.tdm_r1 import TDMR1
from tdm_r1.config import load_recipe
from tdm_r1.roles import Role, Roles
from tdm_r1.trainer import Run


class Meter:
    """Seconds and network evaluations (samples through any role's transformer) spent inside named parts."""

    def __init__(self, roles: Roles) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.forward: dict[str, int] = defaultdict(int)
        self.backward: dict[str, int] = defaultdict(int)
        self.part = "other"
        for transformer in {id(t): t for t in (roles.transformer(r) for r in Role if r in roles)}.values():
            transformer.register_forward_pre_hook(self._count, with_kwargs=True)

    def _count(self, module: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        counter = self.backward if torch.is_grad_enabled() else self.forward
        counter[self.part] += len(kwargs["hidden_states"])

    def wrap(self, owner: Any, method: str, part: str) -> None:
        inner: Callable = getattr(owner, method)

        def timed(*args: Any, **kwargs: Any) -> Any:
            outer, self.part = self.part, part
            start = time.perf_counter()
            try:
                return inner(*args, **kwargs)
            finally:
                self.seconds[part] += time.perf_counter() - start
                self.part = outer

        setattr(owner, method, timed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--recipe", default="mini")
    parser.add_argument("--iterations", type=int, default=10)
    parser.add_argument("--out", type=Path, default=Path("docs/results/iteration.json"))
    args = parser.parse_args()
    config = load_recipe(args.recipe)
    run = Run(config)
    run.step()  # warm-up
    meter = Meter(run.roles)
    algorithm = run.algorithm
    if not isinstance(algorithm, TDMR1):
        parser.error(f"--recipe {args.recipe}: its algorithm is {config.algorithm}; give a recipe of tdm_r1")
    meter.wrap(algorithm.tdm, "roll_out", "rollout")
    meter.wrap(run.backbone, "decode", "decode")
    meter.wrap(run.scorer, "each", "reward")
    meter.wrap(algorithm, "measure_surrogate", "diagnostics")
    meter.wrap(algorithm, "fit_surrogate", "surrogate")
    meter.wrap(algorithm.tdm, "fit_fake", "fake score")
    meter.wrap(algorithm.tdm, "fit_generator", "generator")
    start = time.perf_counter()
    for _ in range(args.iterations):
        run.step()
    total = (time.perf_counter() - start) / args.iterations
    samples = config.batch.prompts * config.batch.group
    parts = {
        name: {
            "seconds": round(seconds / args.iterations, 4),
            "share": round(seconds / args.iterations / total, 3),
            "forward": round(meter.forward[name] / args.iterations / samples, 2),
            "forward_with_gradient": round(meter.backward[name] / args.iterations / samples, 2),
        }
        for name, seconds in meter.seconds.items()
    }
    result = {
        "recipe": args.recipe,
        "iterations": args.iterations,
        "samples": samples,
        "seconds": round(total, 3),
        "threads": torch.get_num_threads(),
        "processor": platform.processor() or platform.machine(),
        "parts": parts,
    }
    args.out.write_text(json.dumps(result, indent=1))
    args.out.with_suffix(".md").write_text(markdown(result))
    print(args.out.with_suffix(".md").read_text())


def markdown(result: dict) -> str:
    lines = [
        "# One iteration",
        "",
        "Written by `python benchmarks/iteration.py`. Network evaluations are per sample of the rollout.",
        "The reward works beside the decoder, in a thread of its own: its seconds are not added to the others.",
        "",
        f"Recipe `{result['recipe']}`, {result['samples']} samples, {result['seconds']} s an iteration on "
        f"{result['threads']} threads, mean of {result['iterations']} iterations.",
        "",
        "| part | seconds | share | evaluations without gradient | evaluations with gradient |",
        "|---|---|---|---|---|",
    ]
    for name, p in result["parts"].items():
        lines.append(
            f"| {name} | {p['seconds']} | {100 * p['share']:.0f} % | {p['forward']} | {p['forward_with_gradient']} |"
        )
    largest = max(result["parts"], key=lambda n: result["parts"][n]["seconds"])
    lines += ["", f"The next speed-up lies in: {largest}."]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
