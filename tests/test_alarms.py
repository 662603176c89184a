"""Measures of any pictures, and alarms on metrics that have become worse than chance explains."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from typing import ClassVar

import numpy as np
import pytest
import torch

from tdm_r1.config.run import RunConfig
from tdm_r1.errors import UserError
from tdm_r1.evaluate.evaluation import PARTS, SHUFFLES
from tdm_r1.evaluate.measures import measure
from tdm_r1.tasks.protocol import Prompt
from tdm_r1.tasks.settings import TaskConfig
from tdm_r1.train.alarms import Alarms
from tdm_r1.train.checkpoint import load_state
from tdm_r1.train.run import Run

Make = Callable[..., RunConfig]


def stripes(period: int, low: int, high: int) -> np.ndarray:
    """Vertical stripes, [1, 32, 32, 3], each ``period`` px wide."""
    line = np.where(np.arange(32) // period % 2, high, low).astype(np.uint8)
    return np.broadcast_to(line[None, None, :, None], (1, 32, 32, 3)).copy()


def test_sharpness_is_the_mean_step():
    found = measure(stripes(1, 0, 100), 1)
    assert found["pictures/sharpness"] == pytest.approx(50, rel=1e-6)  # 100 across, 0 along
    assert measure(stripes(4, 0, 100), 1)["pictures/sharpness"] == pytest.approx(50 * 7 / 31, rel=1e-6)
    assert found["pictures/saturation"] == 0
    assert "pictures/diversity" not in found


def test_saturation_flat_pictures_and_diversity():
    red = np.zeros((1, 32, 32, 3), np.uint8)
    red[..., 0] = 255
    found = measure(np.concatenate([red, stripes(1, 0, 255), red, red]), 2)
    assert found["pictures/saturation"] == pytest.approx(0.75)
    assert found["pictures/flat"] == 0.75
    # the first pair: stripes have a mean of 127.5 in every cell, red one of 255, 0, 0; the second pair is alike
    assert found["pictures/diversity"] == pytest.approx(127.5 / 2)


def test_what_raises_an_alarm():
    directions = {"good": "up", "bad": "down", "kept": "same", "unknown": "up"}
    start, noise = {"good": 0.7, "bad": 5.0, "kept": 10.0}, {"good": 0.01, "bad": 1.0, "kept": 0.5}
    alarms = Alarms(directions, start, noise, at=3.0)
    assert alarms(start) == []
    assert alarms({"good": 0.9, "bad": 1.0, "kept": 12.4, "unknown": -5.0}) == []
    assert alarms({"good": 0.671, "bad": 7.9, "kept": 6.1}) == []
    found = alarms({"good": 0.64, "bad": 9.0, "kept": 5.0})
    assert [(alarm.name, alarm.times) for alarm in found] == [
        ("good", pytest.approx(6)),
        ("kept", pytest.approx(5)),
        ("bad", pytest.approx(4)),
    ]
    lost = alarms({"good": 0.0, "kept": 10.0})
    assert [(alarm.name, alarm.times) for alarm in lost] == [("bad", math.inf), ("good", pytest.approx(70))]
    assert Alarms(directions, start, {"good": 0.0}, at=3.0)({"good": 0.0}) == []
    with pytest.raises(UserError, match="direction of fid is 'lower'"):
        Alarms({"fid": "lower"}, {}, {}, at=3.0)
    assert str(found[0]) == "good 0.64 (at the start 0.7, 6.0 times its noise)"


class Scripted:
    """A task whose one metric is what is written in `NEXT`, the last one for ever."""

    known: Sequence[Prompt] = ()
    directions: ClassVar = {"quality": "up"}
    NEXT: ClassVar[list[float]] = []

    def __init__(self, config: TaskConfig) -> None:
        del config

    def train_prompts(self, n: int, rng: np.random.Generator) -> list[Prompt]:
        return [Prompt("a red circle")] * n

    def eval_prompts(self, n: int) -> list[Prompt]:
        return [Prompt("a red circle")] * n

    def metrics(self, images: np.ndarray, prompts: Sequence[Prompt], images_per_prompt: int) -> dict[str, float]:
        return {"quality": self.NEXT.pop(0) if len(self.NEXT) > 1 else self.NEXT[0]}


def config_of(make: Make, what: str, after: list[float], **more: object) -> RunConfig:
    """A run with an evaluation after each iteration, of the quality 0.9 at its start and ``after`` then."""
    Scripted.NEXT[:] = [0.9] * (1 + PARTS * SHUFFLES) + after
    evaluation = {"every": 1, "prompts": 8, "images_per_prompt": 2, "on_alarm": what}
    task = {"name": "test_alarms:Scripted", "weights": None}
    settings = {"iterations": 8, "save_every": 1, "evaluation": evaluation, "task": task}
    return make(**(settings | more))


@pytest.mark.slow
@pytest.mark.parametrize("what", ["warn", "stop", "back"])
def test_an_alarm_warns_stops_or_goes_back(what: str, tiny_config: Make, capsys: pytest.CaptureFixture[str]):
    """The sixth evaluation raises one; by then more checkpoints have been written than are kept."""
    run = Run(config_of(tiny_config, what, [0.9, 0.9, 0.8, 0.7, 0.8, 0.3, 0.9]))
    run.fit()
    rows = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    counts = {row["iteration"]: row["eval/alarms"] for row in rows if "eval/alarms" in row}
    assert [i for i, count in counts.items() if count] == [6]  # noise: 1/8 at least; 0.9 to 0.3 is more than 3/8
    assert "alarm: quality 0.3 (at the start 0.9, 4.8 times its noise)" in capsys.readouterr().out
    exported = json.loads((run.folder / "exported.json").read_text())["iteration"]
    assert (max(counts), exported) == {"warn": (8, 8), "stop": (6, 6), "back": (6, 5)}[what]
    saved = load_state(run.files.checkpoint(exported))["roles"]["generator_ema"]
    for name, value in run.roles.state("generator_ema").items():
        assert torch.equal(value, saved[name])
    again = Run(run.config)
    again.open(resume=True)
    assert (again.iteration, again.alarmed, again.sound) == (max(counts), True, 5)


@pytest.mark.slow
def test_a_run_that_is_gone_on_with_keeps_its_start(tiny_config: Make):
    """It stops again at once unless told otherwise; from before the alarm it goes on."""
    run = Run(config_of(tiny_config, "stop", [0.9, 0.9, 0.3]))
    run.fit()
    assert run.iteration == 3
    Scripted.NEXT[:] = [0.3]
    again = Run(run.config)
    again.fit(resume=True)
    assert again.iteration == 3
    Scripted.NEXT[:] = [0.9, 0.3]
    earlier = Run(run.config)
    earlier.fit(resume=True, start_from=1)
    assert earlier.iteration == 3
    assert earlier.alarmed
    other = Run(run.config.override({"evaluation.prompts": 9, "evaluation.on_alarm": "warn"}))
    other.fit(resume=True)
    assert other.iteration == 8
    assert other.alarms.start == {}
