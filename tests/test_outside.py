"""Components from outside, by ``package.module:Name``, without a change to the package."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from outside.components import Lines, Negative
from tdm_r1 import cli
from tdm_r1.config.load import load_recipe
from tdm_r1.config.run import RunConfig, dump, validate
from tdm_r1.errors import UserError
from tdm_r1.models.lora_files import read_lora
from tdm_r1.rewards.registry import load_reward
from tdm_r1.train.run import Run

pytestmark = pytest.mark.slow

Make = Callable[..., RunConfig]
ALGORITHM = "outside.algorithm:BestOfGroup"


@pytest.fixture
def config(tiny_config: Make) -> RunConfig:
    return tiny_config(
        algorithm=ALGORITHM,
        algorithm_settings={"decay": 0.25},
        model={"family": "outside.components:Negative"},
        task={"name": "outside.components:Animals", "weights": None, "settings": {"animals": ["cat", "dog"]}},
        reward="outside.components:LeftBrightness",
        trackers=("outside.components:Lines",),
        evaluation={"also": ("mini",)},
    )


def test_a_run_of_components_from_outside(config: RunConfig, tmp_path: Path):
    run = Run(config)
    assert isinstance(run.backbone, Negative)
    before = run.roles.state("slow")
    last = run.fit()
    assert last is not None
    assert last.metrics["brightness"] > 0
    assert "mini/strict" in last.metrics
    after = run.roles.state("slow")
    assert any(not torch.equal(after[name], w) for name, w in before.items())
    assert read_lora(run.folder / "lora").rank == config.model.lora.rank
    assert not (run.folder / "lora_fake").exists()
    rows = [json.loads(line) for line in (tmp_path / "mini.lines").read_text().splitlines()]
    assert [r["iteration"] for r in rows if "reward/mean" in r.get("metrics", ())] == [1, 2]
    assert {r["image"] for r in rows if "image" in r} == {"curves", "samples"}
    again = Run(load_recipe(str(run.folder)).override({"iterations": 3}))
    again.open(resume=True)
    assert again.iteration == 2
    for name, w in after.items():
        assert torch.equal(again.roles.state("slow")[name], w)
    again.step()


def test_the_command_line_takes_them_too(config: RunConfig, tmp_path: Path, capsys):
    (tmp_path / "mine.yaml").write_text(dump(config.override({"name": "mine", "iterations": 1})))
    assert cli.main(["train", str(tmp_path / "mine.yaml"), "--dry-run"]) == 0
    assert "no estimate" in capsys.readouterr().out
    assert cli.main(["train", str(tmp_path / "mine.yaml")]) == 0
    assert (tmp_path / "mine" / "lora").is_dir()


def test_a_tracker_that_raises_costs_its_own_record_alone(config: RunConfig, monkeypatch, capsys):
    def broken(self, iteration: int, metrics: dict) -> None:
        raise ConnectionError("the server is gone")

    monkeypatch.setattr(Lines, "log", broken)
    run = Run(config.override({"iterations": 1}))
    assert run.fit() is not None
    assert (run.folder / "lora").is_dir()
    shown = " ".join(capsys.readouterr().out.split())
    assert shown.count("tracker outside.components:Lines: ConnectionError: the server is gone") == 1


def test_a_reward_of_a_package_is_a_function_or_a_class():
    images = np.zeros((2, 64, 64, 3), np.uint8)
    prompts, metadata = ["a cat", "a dog"], [{"name": "cat"}, {"name": "dog"}]
    assert load_reward("outside.components:LeftBrightness")(images, prompts, metadata).tolist() == [0, 0]
    with pytest.raises(ValueError, match=r"reward = 'outside\.nothing:f': outside\.nothing cannot be imported"):
        load_reward("outside.nothing:f")
    with pytest.raises(ValueError, match=r"outside\.components has no 'f'; it has: .*LeftBrightness"):
        load_reward("outside.components:f")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"algorithm": "ppo"},
            r"^algorithm = 'ppo': known are tdm_r1, tdm_r1_release, .*; your own is named as package\.module:Name$",
        ),
        ({"task": {"name": "words"}}, r"^task\.name = 'words': known are mini, mini_signs, prompts, geneval; your own"),
        ({"model": {"family": "flux"}}, r"^model\.family = 'flux': known are sd3, z_image; your own"),
        ({"trackers": ["wandb"]}, r"^trackers = 'wandb': your own is named as package\.module:Name"),
        ({"evaluation": {"also": ["words"]}}, r"^evaluation\.also = 'words': known are"),
    ],
)
def test_unknown_names_say_what_there_is(values: dict, message: str):
    with pytest.raises(UserError, match=message):
        validate(values)


def test_settings_of_an_algorithm_from_outside_are_checked(config: RunConfig):
    with pytest.raises(ValueError, match="decai"):
        Run(config.override({"algorithm_settings": {"decai": 0.5}}))
