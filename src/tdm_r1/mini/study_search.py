"""The search of each method's learning rates and weights, one seed each.

The rows of the methods (`study_rows`) have the best of these: the highest trained metric among those whose Frechet
distance is within two noise floors of the start's; where there are none, the highest.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import product
from typing import Any

from .study_rows import DIRECT, ROWS, UNTUNED, Row, policy

BLOCKS = [
    *("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"),
    *("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2"),
]
OURS: dict[str, dict[str, Any]] = {  # of this project's recipe, one choice at a time
    "scale 4": {"balance.scale": 4.0},
    "scale 16": {"balance.scale": 16.0},
    "limit .1": {"balance.limit": 0.1},
    "limit .2": {"balance.limit": 0.2},
    "limit .3": {"balance.limit": 0.3},
    "surrogate lr 3e-4": {"surrogate.optimizer.learning_rate": 3e-4},
    "surrogate lr 1.2e-3": {"surrogate.optimizer.learning_rate": 1.2e-3},
    "ema .98": {"surrogate.ema_decay": 0.98},
    "ema .99": {"surrogate.ema_decay": 0.99},
    "added 2": {"surrogate.added_delta": 2.0},
    "kappa 2": {"surrogate.kappa": 2.0},
    "draws 8": {"surrogate.draws": 8},
    "full surrogate": {"surrogate.weights": "full"},
    "generator lr 1e-3": {"tdm.generator.learning_rate": 1e-3},
    "fake steps 3": {"tdm.fake_steps": 3},
    "alpha 64": {"model.lora.alpha": 64.0},
    "attention and ff": {"model.lora.targets": BLOCKS},
    "bfloat16": {"model.dtype": "bfloat16", "model.merge": False},
    "kl prompts": {"batch.kl_prompts": 32, "task.kl": "mini"},
    "kl prompts, limit .2": {"batch.kl_prompts": 32, "task.kl": "mini", "balance.limit": 0.2},
    "kl prompts, scale 4": {"batch.kl_prompts": 32, "task.kl": "mini", "balance.scale": 4.0},
}


def _search() -> Iterator[Row]:
    few = partial(policy, many_steps=False)
    for v in _grid(lr=(1e-4, 3e-4, 1e-3), kl=(0.0, 0.02, 0.1, 0.5)):
        yield _searched("dgpo", few("dgpo", v["lr"], kl_weight=v["kl"]), v)
    for v in _grid(lr=(1e-4, 3e-4, 1e-3), kl=(0.0, 0.1, 0.3, 1.0)):
        yield _searched("nft", few("nft", v["lr"], kl_weight=v["kl"]), v)
    for v in _grid(lr=(1e-4, 3e-4, 1e-3), kl=(0.0, 0.04), noise=(0.3, 0.7)):
        yield _searched("grpo", few("flow_grpo", v["lr"], noise_level=v["noise"], kl_weight=v["kl"]), v)
    for v in _grid(lr=(1e-4, 3e-4, 1e-3)):
        yield _searched("dgpo-many", policy("dgpo", v["lr"]), v)
        yield _searched("grpo-many", policy("flow_grpo", v["lr"]), v)
    for v in _grid(weight=(1.0, 4.0, 16.0), lr=(2e-4, 5e-4)):
        settings = {"dgpo.direct_weight": v["weight"], "tdm.generator.learning_rate": v["lr"]}
        yield _searched("tdm-direct", dict(DIRECT) | settings, v)
    for v in _grid(lr=(1e-4, 3e-4), surrogate=(3e-4, 1e-3), beta=(1.0, 10.0)):
        settings = {"release.generator.learning_rate": v["lr"], "release.surrogate.learning_rate": v["surrogate"]}
        yield _searched("release", settings | {"release.beta": v["beta"]}, v, "mini_release")
    for v in _grid(lr=(1e-4, 3e-4), region=("none", "clip")):
        settings = {"surrogate.optimizer.learning_rate": v["lr"], "surrogate.trust_region": v["region"]}
        yield _searched("paper", settings, v, "mini_paper")
    for label, changes in OURS.items():
        yield Row(f"tdm-r1: {label}", label, "mini", changes, group="search")
    for name, reward in UNTUNED.items():
        for v in _grid(limit=(0.1, 0.2)):
            yield _searched(f"reward: {name}", {"reward": reward, "balance.limit": v["limit"]}, v)


def _grid(**values: Sequence[Any]) -> Iterator[dict[str, Any]]:
    """Every combination of the values."""
    yield from (dict(zip(values, combination, strict=True)) for combination in product(*values.values()))


def _searched(method: str, changes: Mapping[str, Any], varied: Mapping[str, Any], recipe: str = "mini") -> Row:
    what = ", ".join(f"{name} {value}" for name, value in varied.items())
    return Row(f"{method}: {what}", what, recipe, changes, group="search")


SEARCHED = tuple(_search())
ALL = ROWS + SEARCHED
