"""The mini world: renders, captions, the detector on fresh renders, and the scores on hand-made detections."""

from collections import Counter

import numpy as np
import pytest

from tdm_r1.mini import preferences, world, worlds
from tdm_r1.mini.detector import Detection, detect, score
from tdm_r1.mini.task import MiniTask, reward


def specs(n: int, seed: int = 0) -> list[dict]:
    rng = np.random.default_rng(seed)
    return [world.make_spec(world.TASKS[i % 6], rng) for i in range(n)]


def test_detector_reads_fresh_renders():
    asked = specs(600)
    images = worlds.render_specs(asked, seed=5)
    scores = [score(detect(i), s) for i, s in zip(images, asked, strict=True)]
    assert np.mean([s.strict for s in scores]) >= 0.98
    assert np.mean([d.iou for i in images for d in detect(i)]) > 0.93


def _another(tag: str, spec: dict, rng: np.random.Generator) -> dict:
    while (other := world.make_spec(tag, rng)) == spec:
        pass
    return other


def test_detector_sees_what_is_wrong():
    """Renders of another prompt of the same family score much lower."""
    rng = np.random.default_rng(1)
    for tag in world.TASKS:
        drawn = [world.make_spec(tag, rng) for _ in range(60)]
        asked = [_another(tag, d, rng) for d in drawn]
        images = worlds.render_specs(drawn, seed=6)
        strict = [score(detect(i), s).strict for i, s in zip(images, asked, strict=True)]
        assert np.mean(strict) < 0.5, tag


def test_blur_and_noise_show_in_the_detections():
    from scipy import ndimage

    images = worlds.render_specs(specs(60), seed=7)
    blurred = [ndimage.gaussian_filter(i, (1.2, 1.2, 0)) for i in images]
    sharp, soft = ([d for i in batch for d in detect(i)] for batch in (images, blurred))
    assert np.mean([d.edge_width for d in soft]) > 1.5 * np.mean([d.edge_width for d in sharp])
    assert np.mean([d.iou for d in soft]) < np.mean([d.iou for d in sharp]) - 0.05


def test_an_empty_picture_holds_nothing():
    assert detect(np.full((64, 64, 3), 240, np.uint8)) == []
    assert not any(d.is_object for d in detect(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)))


def thing(shape: str, color: str = "red", x: float = 32.0, y: float = 32.0, iou: float = 0.9) -> Detection:
    return Detection(shape, color, x, y, 8.0, iou, 1.0)


CIRCLE = [{"class": "circle", "count": 1}]
CASES = [
    # (tag, include, detections, strict, soft)
    ("single_object", CIRCLE, [thing("circle")], 1, 1.0),
    ("single_object", CIRCLE, [], 0, 0.0),
    ("single_object", CIRCLE, [thing("square")], 0, 0.0),
    ("single_object", CIRCLE, [thing("circle", iou=0.59)], 0, 0.0),
    ("single_object", CIRCLE, [thing("circle", iou=0.6)], 1, 1.0),
    ("single_object", CIRCLE, [thing("circle"), thing("square")], 0, 1 / 1.5),
    ("single_object", CIRCLE, [thing("circle"), thing("square", iou=0.5)], 1, 1.0),
    ("two_object", [*CIRCLE, {"class": "cross", "count": 1}], [thing("circle"), thing("cross")], 1, 1.0),
    ("two_object", [*CIRCLE, {"class": "cross", "count": 1}], [thing("circle")], 0, 0.5),
    ("two_object", [*CIRCLE, {"class": "cross", "count": 1}], [thing("circle")] * 2, 0, 0.0),
    ("counting", [{"class": "circle", "count": 3}], [thing("circle")] * 3, 1, 1.0),
    ("counting", [{"class": "circle", "count": 3}], [thing("circle")] * 2, 0, 2 / 3),
    ("counting", [{"class": "circle", "count": 3}], [thing("circle")] * 4, 0, 2 / 3 / 1.5),
    ("colors", [CIRCLE[0] | {"color": "red"}], [thing("circle", "red")], 1, 1.0),
    ("colors", [CIRCLE[0] | {"color": "red"}], [thing("circle", "blue")], 0, 0.5),
    (
        "color_attr",
        [CIRCLE[0] | {"color": "red"}, {"class": "cross", "count": 1, "color": "blue"}],
        [thing("circle", "blue"), thing("cross", "red")],
        0,
        0.5,
    ),
]


@pytest.mark.parametrize(("tag", "include", "detections", "strict", "soft"), CASES)
def test_score_table(tag, include, detections, strict, soft):
    got = score(detections, {"tag": tag, "include": include})
    assert got.strict == strict
    assert got.soft == pytest.approx(soft)


@pytest.mark.parametrize(
    ("relation", "x", "y", "holds"),
    [
        ("left of", 10, 32, True),
        ("right of", 10, 32, False),
        ("above", 32, 10, True),
        ("below", 32, 10, False),
        ("left of", 31, 32, False),  # within a tenth of both sizes: no relation holds
        ("left of", 12, 12, True),  # on the diagonal both hold, as in GenEval
        ("above", 12, 12, True),
        ("left of", 26, 60, False),
    ],
)
def test_position_follows_genevals_rule(relation: str, x: float, y: float, holds: bool):
    include = [*CIRCLE, {"class": "cross", "count": 1, "position": [relation, 0]}]
    got = score([thing("circle"), thing("cross", x=x, y=y)], {"tag": "position", "include": include})
    assert got.strict == float(holds)


def test_prompts():
    assert world.prompt_of({"tag": "counting", "include": [{"class": "cross", "count": 2}]}) == "two crosses"
    include = [*CIRCLE, {"class": "square", "count": 1, "position": ["above", 0]}]
    assert world.prompt_of({"tag": "position", "include": include}) == "a square above a circle"
    prompts = [world.prompt_of(s) for s in world.all_specs()]
    assert len(set(prompts)) == len(prompts) == 460
    assert {world.prompt_of(s) for s in specs(500)} <= set(prompts)


def test_captions_are_wrong_at_the_stated_rates():
    rng = np.random.default_rng(2)
    wrong: Counter[str] = Counter()
    n = 3000
    for tag in world.TASKS:
        for _ in range(n):
            spec = world.make_spec(tag, rng)
            noisy = world.noisy_spec(spec, rng)
            assert noisy["tag"] == tag
            wrong[tag] += noisy != spec
    for tag, rate in world.CAPTION_NOISE.items():
        expected = rate * 0.75 if tag == "position" else rate  # a redrawn relation is the old one a quarter of the time
        assert wrong[tag] / n == pytest.approx(expected, abs=0.03), tag


def test_renders_depend_on_seed_and_place_alone():
    a = worlds.render_specs(specs(8), seed=1)
    b = worlds.render_specs(specs(8), seed=1)
    assert np.array_equal(a, b)
    assert not np.array_equal(a, worlds.render_specs(specs(8), seed=2))


def test_reward_is_half_strict_half_soft():
    asked = specs(12)
    images = worlds.render_specs(asked, seed=3)
    assert reward(images, [""] * 12, asked) == pytest.approx([1.0] * 12)


def test_task_weights():
    task = MiniTask({"counting": 1.0})
    assert {p.metadata["tag"] for p in task.train_prompts(20, np.random.default_rng(0))} == {"counting"}
    assert Counter(p.metadata["tag"] for p in task.eval_prompts(60)) == dict.fromkeys(world.TASKS, 10)
    assert task.eval_prompts(12) == task.eval_prompts(12)
    with pytest.raises(ValueError, match="names 'dogs'"):
        MiniTask({"dogs": 1.0})
    with pytest.raises(ValueError, match="positive sum"):
        MiniTask({"counting": 0.0})


def test_preferences_that_no_recipe_was_tuned_on():
    """Radii and counts of renders, whose objects are known; a picture without shapes has neither."""
    rng = np.random.default_rng(5)
    asked = specs(24)
    scenes = [world.make_scene(spec, rng) for spec in asked]
    images, prompts = np.stack([world.render(scene) for scene in scenes]), [""] * len(scenes)
    radii = [float(np.mean([o.radius for o in scene.objects])) for scene in scenes]
    assert np.allclose(preferences.size(images, prompts, asked), radii, atol=0.6)
    assert preferences.count(images, prompts, asked) == [1.0] * len(asked)
    for more, expected in ((1, 0.5), (-1, 0.5), (3, 0.0)):
        wrong = [{"include": [{"class": "circle", "count": len(scene.objects) + more}]} for scene in scenes]
        assert preferences.count(images, prompts, wrong) == [expected] * len(scenes)
    empty = np.full_like(images[:1], 230)
    assert preferences.size(empty, [""], asked[:1]) == [0.0]
