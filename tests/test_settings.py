"""Every setting is read: a key that nothing reads would be a lie. What real runs read is recorded."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from pydantic import BaseModel

import tiny_models
from tdm_r1.config.run import RunConfig, dump
from tdm_r1.mini.build import MiniConfig, build
from tdm_r1.settings import Settings
from tdm_r1.train.estimate import needs
from tdm_r1.train.run import Run
from tdm_r1.train.start import train

pytestmark = pytest.mark.slow

Make = Callable[..., RunConfig]


def fields(model: type[BaseModel]) -> set[tuple[str, str]]:
    """(class, name) of every setting of a schema and the groups in it."""
    found = set()
    for name, info in model.model_fields.items():
        if isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel):
            found |= fields(info.annotation)
        else:
            found.add((model.__name__, name))
    return found


@contextmanager
def recorded(monkeypatch: pytest.MonkeyPatch) -> Iterator[set[tuple[str, str]]]:
    """Which settings are read inside. Validation and copying do not go through attributes."""
    read: set[tuple[str, str]] = set()

    def get(self: Settings, name: str) -> object:
        if name in type(self).model_fields:
            read.add((type(self).__name__, name))
        return BaseModel.__getattribute__(self, name)

    with monkeypatch.context() as patched:
        patched.setattr(Settings, "__getattribute__", get, raising=False)
        yield read


def test_every_setting_of_a_run_is_read(tiny_config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red circle\n")
    distil = tiny_config(algorithm="tdm", iterations=1, surrogate={"added_delta": 0.0}, name="unused")
    recipe = tmp_path / "tdm.yaml"
    recipe.write_text(dump(distil))
    z_image = tiny_models.z_image(tmp_path / "z")
    tiny = {"student_lora": None, "lora": {"rank": 2, "alpha": 2, "targets": ("to_q",)}, "merge": False}
    configs = [
        tiny_config(iterations=1),
        tiny_config(
            surrogate={"loss": "preference", "reference": "dynamic", "trust_region": "anchor", "ema_decay": 0.5},
            balance={"policy": "ratio"},
            tdm={"fake_scores": "one"},
        ),
        tiny_config(surrogate={"loss": "preference", "trust_region": "clip"}, batch={"trained": 2}),
        tiny_config(algorithm="tdm_r1_release", release={"reference": "dynamic"}),
        *(
            tiny_config(algorithm=name, dgpo={"time_low": 0.0})
            for name in ("dgpo", "flow_grpo", "nft", "tdm_direct_rl")
        ),
        tiny_config(
            model=tiny | {"path": str(z_image), "teacher": str(z_image), "resolution": 32, "max_sequence_length": 48},
            task={"name": "prompts", "prompts": prompts, "weights": None},
            scoring={"workers": 1},
            surrogate={"weights": "lora"},
        ),
    ]
    outside = tiny_config(
        algorithm="outside.algorithm:BestOfGroup",
        task={"name": "outside.components:Animals", "weights": None, "settings": {"animals": ["cat"]}},
        reward="jpeg_compressibility + jpeg_incompressibility",
        iterations=2,
        name="outside",
    )
    start = tiny_config(distill_with=str(recipe), iterations=1, name="both")
    with recorded(monkeypatch) as read:
        for config in configs:
            run = Run(config)
            run.step()
            run.scorer.close()
        Run(outside).fit()
        train(start)
        needs(tiny_config())
    assert fields(RunConfig) - read == set()


def test_every_setting_of_a_mini_model_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    values = MiniConfig(work=tmp_path / "work", out=tmp_path / "out").model_dump()
    values["autoencoder"] |= {"pool_size": 8, "steps": 1, "decoder_steps": 1, "batch_size": 4}
    values["base"] |= {"steps": 1, "batch_size": 4, "pool_size": 8}
    config = MiniConfig.model_validate(values)
    with recorded(monkeypatch) as read:
        build(config)
    assert fields(MiniConfig) - read == set()
