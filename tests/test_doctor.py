"""`tdm-r1 doctor`: what can run, what has to be mended first, on the bundled model and on small random real ones."""

from __future__ import annotations

from pathlib import Path

import pytest

import tiny_models
from tdm_r1.cli import main
from tdm_r1.config.load import load_recipe
from tdm_r1.config.run import RunConfig, validate
from tdm_r1.rewards.registry import BUILT_IN
from tdm_r1.train.doctor import Finding, _judged, examine, example_picture


def findings(config: RunConfig, **more: bool) -> dict[str, list[Finding]]:
    found: dict[str, list[Finding]] = {}
    for one in examine(config, **more):
        found.setdefault(one.what, []).append(one)
    return found


def test_the_mini_model_can_run(tmp_path: Path, capsys: pytest.CaptureFixture):
    small = ["--batch.group", "4", "--output", str(tmp_path)]
    assert main(["doctor", "mini", *small]) == 0
    shown = capsys.readouterr().out
    assert "Ready. Start it with: tdm-r1 train mini --batch.group 4" in shown
    for what in ("device", "disk", "model", "prompts", "reward mini", "iteration"):
        assert f"ok   {what}: " in shown
    assert "fix " not in shown
    assert not list(tmp_path.iterdir())  # it leaves nothing


@pytest.mark.parametrize("family", ["sd3", "z_image"])
def test_small_models_of_the_real_classes_can_run(family: str, tmp_path: Path):
    if family == "sd3":
        path = tiny_models.sd3(tmp_path / "model", dual=True)
    else:
        path = tiny_models.z_image(tmp_path / "model")
    prompts = tmp_path / "prompts.txt"
    prompts.write_text('a sign that says "HELLO"\na sign that says "7"\n')
    config = {
        "model": {"path": str(path), "resolution": 32, "lora": {"rank": 2}, "max_sequence_length": 48},
        "batch": {"prompts": 4, "group": 3},
        "task": {"name": "prompts", "prompts": str(prompts)},
        "reward": "jpeg_compressibility",
        "output": str(tmp_path),
    }
    found = findings(validate(config))
    assert all(one.ok for name in ("device", "disk", "model", "prompts", "iteration") for one in found[name])
    assert "4 of 4 groups" in found["iteration"][0].text
    assert "2 to train on" in found["prompts"][0].text
    assert found["few-step start"][0].ok is None  # the model itself, as it is


def test_what_is_missing_is_named_and_the_rest_is_checked_all_the_same(tmp_path: Path, capsys: pytest.CaptureFixture):
    args = ["--model.path", str(tmp_path), "--model.student-lora", "None", "--reward", str(tmp_path / "r.py:f")]
    assert main(["doctor", "mini", *args]) == 1
    shown = capsys.readouterr().out
    assert "fix  model: " in shown
    assert "fix  reward: " in shown
    assert "ok   prompts: " in shown
    assert "note iteration: not tried" in shown
    assert "2 to fix" in shown


def test_a_model_that_is_too_large_for_the_machine_is_said_so():
    config = load_recipe("sd35m_geneval").override({"model.device": "cpu"})
    found = next(iter(examine(config, iteration=False)))
    assert found.what == "device"
    assert found.ok is False
    assert "use a machine with a GPU" in found.text


@pytest.mark.parametrize(("score", "ok"), [(0.5, True), (1.2, False), (float("nan"), False)])
def test_a_score_outside_its_bounds_is_a_fault(score: float, ok: bool):
    assert _judged("ocr", score, ("it broke",)).ok is ok
    assert ("it broke" in _judged("ocr", score, ("it broke",)).text) is (score != score)


def test_the_example_picture_can_be_read():
    pytest.importorskip("rapidocr")
    reward = BUILT_IN["ocr"].make()
    prompt = 'a sign that says "HELLO"'
    scores = reward(example_picture(prompt, 256)[None], [prompt], [{}])
    assert float(getattr(scores, "values", scores)[0]) == 1.0
    assert all(entry.bounds[0] < entry.bounds[1] for entry in BUILT_IN.values())
