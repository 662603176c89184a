"""Measures of any pictures, and alarms on metrics that have become worse than chance explains."""

from __future__ import annotations

import json
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch

from tdm_r1.config.run import RunConfig
from tdm_r1.evaluate.measures import measure
from tdm_r1.models.lora_files import read_lora
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
    assert [alarm.name for alarm in alarms({"good": 0.0, "bad": 9.0})] == ["good", "bad"]
    assert alarms({"good": 0.0})[0].times == pytest.approx(70)
    assert alarms({"good": math.nan}) == []
    assert str(found[0]) == "good 0.64 (at the start 0.7, 6.0 times its noise)"


def config_of(make: Make, what: str) -> RunConfig:
    """A run whose metrics may not get worse at all."""
    evaluation = {"every": 1, "prompts": 6, "images_per_prompt": 2, "alarm_at": 1e-9, "on_alarm": what}
    return make(iterations=6, save_every=10, tdm={"generator": {"learning_rate": 0.05}}, evaluation=evaluation)


@pytest.mark.slow
@pytest.mark.parametrize("what", ["warn", "stop", "back"])
def test_an_alarm_warns_stops_or_goes_back(what: str, tiny_config: Make, capsys: pytest.CaptureFixture[str]):
    run = Run(config_of(tiny_config, what))
    run.fit()
    rows = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    counts = {row["iteration"]: row["eval/alarms"] for row in rows if "eval/alarms" in row}
    assert counts[0] == 0
    first = next(iteration for iteration, count in counts.items() if count)
    assert "alarm: " in capsys.readouterr().out
    exported = json.loads((run.folder / "exported.json").read_text())["iteration"]
    if what == "warn":
        assert max(counts) == 6
        assert exported == 6
        return
    assert max(counts) == first < 6
    assert exported == (first if what == "stop" else first - 1)
    saved = load_state(run.files.checkpoint(exported))["roles"]["generator_ema"]
    assert len(saved) > 0
    for name, value in run.roles.state("generator_ema").items():
        assert torch.equal(value, saved[name])
    assert read_lora(run.folder / "lora").weights.keys()
    again = Run(run.config)
    again.open(resume=True)
    assert again.iteration == first
    assert again.sound == first - 1
