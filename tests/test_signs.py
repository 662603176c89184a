"""Signs: renders, captions, words, the reading by templates, the OCR on fresh renders, and the task's metrics."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from scipy import ndimage

from tdm_r1.config.load import load_recipe
from tdm_r1.evaluate.sampling import FewStepModel
from tdm_r1.mini import sign_reader, signs, text, world, worlds
from tdm_r1.mini.bundle import MODELS, bundle_path
from tdm_r1.mini.task import MiniTask, SignTask
from tdm_r1.rewards.registry import load_reward
from tdm_r1.tasks.protocol import Prompt
from tdm_r1.train.run import Run

pytestmark = pytest.mark.slow


def specs(n: int, seed: int = 0) -> list[dict]:
    rng = np.random.default_rng(seed)
    return [signs.make_spec(signs.TASK, rng) for _ in range(n)]


def test_templates_read_fresh_renders():
    asked = specs(300)
    readings = [sign_reader.read(image) for image in worlds.render_specs(asked, seed=5)]
    assert all(r is not None for r in readings)
    assert np.mean([r.text == s["text"] for r, s in zip(readings, asked, strict=True)]) >= 0.98
    assert np.mean([iou for r in readings for iou in r.ious]) > 0.9


def test_an_ocr_reads_fresh_renders():
    asked = specs(20, seed=1)
    scores = load_reward("ocr_line")(worlds.render_specs(asked, seed=6), [signs.prompt_of(s) for s in asked], asked)
    assert np.mean(scores.parts["exact"]) >= 0.95


def test_blur_shows_in_the_reading():
    images = worlds.render_specs(specs(40), seed=7)
    sharp, soft = (
        [sign_reader.read(image) for image in batch]
        for batch in (images, [ndimage.gaussian_filter(i, (1.0, 1.0, 0)) for i in images])
    )
    assert np.mean([r.blur for r in soft]) > 1.3 * np.mean([r.blur for r in sharp])
    ious = [np.mean([iou for r in batch for iou in r.ious]) for batch in (sharp, soft)]
    assert ious[1] < ious[0] - 0.05


@pytest.mark.parametrize("level", [0, 128, 255])
def test_nothing_is_read_where_no_plate_is(level: int):
    assert sign_reader.read(np.full((64, 64, 3), level, np.uint8)) is None


def test_a_plate_without_glyphs_says_nothing():
    image = np.full((64, 64, 3), 240, np.uint8)
    image[20:50, 10:55] = world.COLORS["blue"]
    assert sign_reader.read(image).text == ""


@pytest.mark.parametrize(("height", "width"), [(4, 60), (5, 60), (60, 4)])
def test_a_plate_too_thin_for_glyphs_says_nothing(height: int, width: int):
    image = np.full((64, 64, 3), 240, np.uint8)
    image[2 : 2 + height, 2 : 2 + width] = world.COLORS["blue"]
    assert sign_reader.read(image).text == ""


def test_the_plate_is_found_where_it_was_drawn():
    for i, spec in enumerate(specs(20)):
        sign = signs.make_scene(spec, np.random.default_rng(i))
        top, bottom, left, right = sign_reader.read(signs.render(sign)).box
        assert (top, bottom, left, right) == (sign.top, sign.top + sign.height, sign.left, sign.left + sign.width)
        places = [m.x for m in sign.marks]
        assert sign.left < places[0] < places[1] < sign.left + sign.width
        assert places[1] - places[0] == pytest.approx(0.6 * sign.size, rel=0.25)  # a digit's advance


def test_captions_are_wrong_at_the_stated_rates():
    rng = np.random.default_rng(2)
    spec, n = {"tag": "sign", "text": "59"}, 4000
    seen = Counter(signs.noisy_spec(spec, rng)["text"] for _ in range(n))
    assert set(seen) == {"59", "60", "95"}
    assert seen["60"] / n == pytest.approx(signs.NEXT, abs=0.03)
    assert seen["95"] / n == pytest.approx(signs.SWAPPED, abs=0.03)
    last = {"tag": "sign", "text": "99"}
    assert {signs.noisy_spec(last, rng)["text"] for _ in range(99)} == {"99", "00"}


def test_every_prompt_fits_and_differs():
    tokenizer = text.build_tokenizer([*world.WORDS, *signs.WORDS])
    prompts = [w.prompt_of(s) for w in (world, signs) for s in w.all_specs()]
    rows = tokenizer(prompts).input_ids
    assert max(map(len, rows)) == text.MAX_TOKENS  # nothing is cut off, nothing to spare
    assert len({tuple(r) for r in rows}) == len(prompts) == 560
    assert tokenizer.tokenize('a sign that says "47"')[:4] == ["a</w>", "sign</w>", "that</w>", "says</w>"]


def test_signs_join_the_shapes_where_a_weight_says_so():
    rng = np.random.default_rng(0)
    mixed = Counter(p.metadata["tag"] for p in MiniTask({"counting": 1.0, "sign": 3.0}).train_prompts(400, rng))
    assert mixed["sign"] / 400 == pytest.approx(0.75, abs=0.06)
    assert set(mixed) == {"sign", "counting"}
    assert "sign" not in {p.metadata["tag"] for p in MiniTask().train_prompts(200, rng)}
    assert len({p.text for p in SignTask().eval_prompts(100)}) == 100


def test_metrics_of_fresh_renders(random_model: Path, monkeypatch):
    monkeypatch.setenv("TDM_R1_MINI_SIGNS", str(random_model))  # for the metrics' network
    prompts = [p for p in SignTask().eval_prompts(20) for _ in range(3)]
    images = worlds.render_specs([p.metadata for p in prompts], seed=9)
    found = SignTask().metrics(images, prompts, 3)
    assert found["read"] >= 0.95
    assert found["cleanliness"] > 0.9
    assert found["ground_noise"] == pytest.approx(0, abs=1e-6)
    assert found["diversity"] > 0
    other = [Prompt("", {"tag": "sign", "text": p.metadata["text"][::-1]}) for p in prompts]
    assert SignTask().metrics(images, other, 3)["read"] < 0.3
    assert "blur" not in [k for k, v in found.items() if np.isnan(v)]
    assert np.isnan(SignTask().metrics(np.full_like(images, 200), prompts, 3)["blur"])


def test_the_bundled_student_obeys_imperfectly_and_legibly():
    asked = specs(60, seed=3)
    prompts = [signs.prompt_of(s) for s in asked]
    images = FewStepModel("mini_signs", lora="mini_signs")(prompts)
    scores = load_reward("ocr_line")(images, prompts, asked)
    assert 0.35 < np.mean(scores.values) < 0.8
    assert np.mean([r is not None and len(r.text) == signs.LENGTH for r in map(sign_reader.read, images)]) > 0.8


def test_bundled_models_stay_small():
    files = [f for name in MODELS for f in bundle_path(name).rglob("*") if f.is_file()]
    assert sum(f.stat().st_size for f in files) < 25e6


def test_the_recipe_of_signs_runs_and_looks_at_the_shapes_too(tmp_path: Path):
    small = {"batch.prompts": 2, "batch.group": 4, "evaluation.prompts": 12, "evaluation.images_per_prompt": 2}
    config = load_recipe("mini_ocr").override({"iterations": 1, "output": tmp_path, "evaluation.every": 0} | small)
    last = Run(config).fit()
    assert {"reward", "reward/exact", "read", "frechet", "mini/strict", "mini/frechet"} <= last.metrics.keys()
    assert last.metrics["reward"] > 0.2
