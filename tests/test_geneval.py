"""GenEval around its protocol: detections from logits, colours, prompts, and the whole path on random small models."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import (
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    Mask2FormerImageProcessorPil,
    SwinConfig,
)

from tdm_r1.errors import UserError
from tdm_r1.geneval_task import SHARES, GenEvalTask, make_prompt, plural, read_metadata
from tdm_r1.rewards.geneval import ClipColors, GenEvalReward, Mask2FormerDetector, cut_out, detections_of
from tdm_r1.rewards.geneval_protocol import CLASSES, COLORS, Detection, soft, strict

# ------------------------------------------------------------------------------------------ detections


def test_detections_from_logits():
    """Two queries, three classes; confidence by hand: class probability times mean mask probability inside."""
    classes = torch.tensor([[5.0, 0.0, 0.0, 0.0], [0.0, 0.0, 2.0, 0.0]])
    masks = torch.full((2, 4, 4), -10.0)
    masks[0, 1:3, 0:2] = 1.0
    masks[1, :, 3] = 2.0
    found = detections_of(classes, masks, (4, 4))
    p = [np.exp(5) / (np.exp(5) + 3), np.exp(2) / (np.exp(2) + 3)]
    sigmoid = [1 / (1 + np.exp(-1)), 1 / (1 + np.exp(-2))]
    assert len(found) == 6  # every query with every class
    best = found[0]
    assert (best.name, best.box) == (CLASSES[0], (0.0, 1.0, 2.0, 3.0))
    assert best.confidence == pytest.approx(p[0] * sigmoid[0])
    second = found[1]
    assert (second.name, second.box) == (CLASSES[2], (3.0, 0.0, 4.0, 4.0))
    assert second.confidence == pytest.approx(p[1] * sigmoid[1])
    assert [d.confidence for d in found] == sorted((d.confidence for d in found), reverse=True)
    np.testing.assert_array_equal(best.mask, masks[0].numpy() > 0)


def test_masks_are_brought_to_the_pictures_size_and_empty_ones_dropped():
    masks = torch.full((2, 2, 2), -1.0)
    masks[0, :, 1] = 1.0
    found = detections_of(torch.tensor([[3.0, 0.0], [3.0, 0.0]]), masks, (8, 6))
    assert len(found) == 1
    assert found[0].mask is not None
    assert found[0].mask.shape == (8, 6)
    assert found[0].box == (3.0, 0.0, 6.0, 8.0)  # bilinear: the change of sign lies in the middle


def test_objects_are_cut_out_on_grey():
    image = np.full((4, 6, 3), 200, np.uint8)
    mask = np.zeros((4, 6), bool)
    mask[1, 2] = mask[2, 3] = True
    crop = cut_out(image, Detection("cat", 1.0, (2.0, 1.0, 4.0, 3.0), mask))
    assert crop.shape == (2, 2, 3)
    assert crop[..., 0].tolist() == [[200, 0x99], [0x99, 200]]


# ------------------------------------------------------------------------------------------ random small models


@pytest.fixture(scope="module")
def detector(tmp_path_factory: pytest.TempPathFactory) -> str:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("mask2former")
    swin = SwinConfig(
        image_size=64,
        embed_dim=8,
        depths=[1, 1, 1, 1],
        num_heads=[1, 1, 1, 1],
        window_size=4,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    config = Mask2FormerConfig(
        backbone_config=swin,
        feature_size=32,
        mask_feature_size=32,
        hidden_dim=32,
        encoder_feedforward_dim=32,
        dim_feedforward=16,
        encoder_layers=1,
        decoder_layers=2,
        num_attention_heads=2,
        num_queries=5,
        num_labels=len(CLASSES),
    )
    Mask2FormerForUniversalSegmentation(config).save_pretrained(folder)
    Mask2FormerImageProcessorPil(size={"height": 64, "width": 64}).save_pretrained(folder)
    return str(folder)


IMAGES = np.random.default_rng(0).integers(0, 256, (3, 48, 48, 3), dtype=np.uint8)


def test_the_whole_path_of_geneval_on_random_models(detector: str, clip: str):
    """Reward and parts are what the protocol says of the detector's own detections."""
    rng = np.random.default_rng(1)
    prompts = [make_prompt(tag, rng) for tag in ("counting", "color_attr", "position")]
    reward = GenEvalReward("soft", detector, clip)
    scores = reward(IMAGES, [p.text for p in prompts], [p.metadata for p in prompts])
    found = Mask2FormerDetector(detector)(IMAGES)
    assert all(len(f) > 0 for f in found)
    colors = ClipColors(clip)
    for i, prompt in enumerate(prompts):
        expected = soft(found[i], prompt.metadata, lambda ds, i=i: colors(IMAGES[i], ds))
        assert scores.values[i] == pytest.approx(expected)
        verdict = strict(found[i], prompt.metadata, lambda ds, i=i: colors(IMAGES[i], ds))
        assert scores.parts["strict"][i] == float(verdict.correct)
    assert all(c in COLORS for c in colors(IMAGES[0], found[0][:3]))
    with pytest.raises(UserError, match="lacks GenEval's metadata"):
        reward(IMAGES[:1], ["a cat"], [{}])
    coco = {"tag": "single_object", "include": [{"class": "mouse", "count": 1}]}  # GenEval calls it a computer mouse
    with pytest.raises(UserError, match="class = 'mouse' is none of GenEval's 80"):
        reward(IMAGES[:1], ["a mouse"], [coco])


def test_colours_of_objects_that_are_few_pixels_high(clip: str):
    """A crop of 3 rows has its colours last, as any other."""
    image = np.zeros((16, 16, 3), np.uint8)
    image[4:7] = (255, 0, 0)
    mask = np.zeros((16, 16), bool)
    mask[4:7] = True
    inner = ClipColors(clip).clip
    crop = cut_out(image, Detection("cat", 1.0, (0.0, 4.0, 16.0, 7.0), mask))
    assert crop.shape == (3, 16, 3)
    tall = np.repeat(crop, 5, axis=0)
    torch.testing.assert_close(inner.embed_images([crop]), inner.embed_images([tall]), atol=1e-4, rtol=1e-3)


# ------------------------------------------------------------------------------------------ prompts


@pytest.mark.parametrize("tag", list(SHARES))
def test_a_perfect_picture_of_a_drawn_prompt_passes(tag: str):
    """Detections made as the metadata asks for pass GenEval's verdict, so prompts and protocol speak alike."""
    rng = np.random.default_rng(3)
    places = {"left of": (-30, 0), "right of": (30, 0), "above": (0, -30), "below": (0, 30)}
    for _ in range(50):
        prompt = make_prompt(tag, rng)
        colors, found = {}, []
        for part in prompt.metadata["include"]:
            dx, dy = places[part["position"][0]] if "position" in part else (0, 0)
            for i in range(part["count"]):
                x, y = 100 + dx, 100 + dy
                found.append(Detection(part["class"], 0.95 - 0.01 * i, (x - 5.0, y - 5.0, x + 5.0, y + 5.0)))
            colors[part["class"]] = part.get("color")
        verdict = strict(found, prompt.metadata, lambda ds, colors=colors: [colors[d.name] for d in ds])
        assert verdict.correct, (prompt, verdict)
        for part in prompt.metadata["include"]:
            noun = part["class"] if part["count"] == 1 else plural(part["class"])
            assert noun in prompt.text
            assert part.get("color", "") in prompt.text
            assert part.get("position", [""])[0] in prompt.text


def test_training_prompts_follow_the_shares():
    task = GenEvalTask()
    prompts = task.train_prompts(3400, np.random.default_rng(0))
    tags = [p.metadata["tag"] for p in prompts]
    for tag, share in SHARES.items():
        assert tags.count(tag) == pytest.approx(3400 * share / 17, abs=75)
    assert [p.metadata["tag"] for p in task.eval_prompts(6)] == list(SHARES)
    assert task.eval_prompts(9) == task.eval_prompts(9)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"tag": "shape"}, "tag = 'shape'"),
        ({"tag": "colors"}, "no include"),
        ({"tag": "colors", "include": [{"class": "mouse", "count": 1}]}, "class = 'mouse' is none of GenEval's 80"),
        ({"tag": "counting", "include": [{"class": "cat", "count": 0}]}, "count = 0 of cat"),
        ({"tag": "colors", "include": [{"class": "cat", "count": 1, "color": "grey"}]}, "color = 'grey'"),
        (
            {"tag": "position", "include": [{"class": "cat", "count": 1, "position": ["left of", 0]}]},
            "an earlier object",
        ),
    ],
)
def test_metadata_that_is_not_genevals_is_refused(row: dict, message: str, tmp_path: Path):
    good = make_prompt("position", np.random.default_rng(0))
    path = tmp_path / "evaluation_metadata.jsonl"
    path.write_text(f"{json.dumps(good.metadata | {'prompt': good.text})}\n{json.dumps(row | {'prompt': 'x'})}\n")
    with pytest.raises(ValueError, match=f"jsonl:2: .*{message}"):
        read_metadata(path)
    path.write_text(path.read_text().splitlines()[0] + "\n")
    assert GenEvalTask(path=path).eval_prompts(5) == [good]
