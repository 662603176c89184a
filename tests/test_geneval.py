"""GenEval around its protocol: detections from logits, colours, prompts, and the whole path on random small models."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    AutoTokenizer,
    CLIPImageProcessorPil,
    CLIPModel,
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    Mask2FormerImageProcessorPil,
    SwinConfig,
)

from tdm_r1.errors import UserError
from tdm_r1.rewards.geneval import ClipColors, GenEvalReward, Mask2FormerDetector, cut_out, detections_of
from tdm_r1.tasks.geneval import SHARES, GenEvalTask, make_prompt, plural, read_metadata
from tdm_r1.tasks.geneval_protocol import CLASSES, COLORS, Detection, soft, strict

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
    small = {"height": 64, "width": 64}
    reward = GenEvalReward("soft", detector, clip, small)
    scores = reward(IMAGES, [p.text for p in prompts], [p.metadata for p in prompts])
    found = Mask2FormerDetector(detector, size=small)(IMAGES)
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


@pytest.mark.parametrize(
    ("picture", "seen"), [((512, 512), (800, 800)), ((480, 640), (800, 1088)), ((300, 900), (448, 1344))]
)
def test_the_detector_sees_pictures_at_the_benchmarks_size(
    detector: str, monkeypatch: pytest.MonkeyPatch, picture: tuple[int, int], seen: tuple[int, int]
):
    """The shorter side 800 px, the longer 1333 at most, both then up to a multiple of 32."""
    network, sizes = Mask2FormerDetector(detector), []

    class Seen(Exception):
        pass

    def note(module, args, kwargs):
        sizes.append(tuple(kwargs["pixel_values"].shape[-2:]))
        raise Seen

    network.network.register_forward_pre_hook(note, with_kwargs=True)
    with pytest.raises(Seen):
        network(np.zeros((1, *picture, 3), np.uint8))
    assert sizes == [seen]


def test_colours_are_those_of_clip_with_genevals_words(clip: str):
    """The nearest, by cosine, to the mean of three templates' embeddings; words and order are written out here."""
    order = ["red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white"]
    rng = np.random.default_rng(3)
    image = rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)
    masks = [np.zeros((64, 64), bool) for _ in range(12)]
    boxes = []
    for mask in masks:
        y, x = (int(v) for v in rng.integers(0, 40, 2))
        mask[y : y + 20, x : x + 20] = rng.random((20, 20)) < 0.7
        mask[y, x] = mask[y + 19, x + 19] = True
        boxes.append((x, y, x + 20, y + 20))
    found = [Detection("wine glass", 1.0, tuple(map(float, b)), m) for b, m in zip(boxes, masks, strict=True)]
    model = CLIPModel.from_pretrained(clip).eval()
    tokenizer, processor = AutoTokenizer.from_pretrained(clip), CLIPImageProcessorPil.from_pretrained(clip)
    texts = [
        t
        for c in order
        for t in (f"a photo of a {c} wine glass", f"a photo of a {c}-colored wine glass", f"a photo of a {c} object")
    ]
    length = model.config.text_config.max_position_embeddings
    tokens = tokenizer(texts, padding="max_length", truncation=True, max_length=length, return_tensors="pt")
    crops = []
    for (x0, y0, x1, y1), mask in zip(boxes, masks, strict=True):
        crop = np.full((20, 20, 3), 0x99, np.uint8)
        crop[mask[y0:y1, x0:x1]] = image[y0:y1, x0:x1][mask[y0:y1, x0:x1]]
        crops.append(Image.fromarray(crop))
    with torch.no_grad():
        words = model.get_text_features(**tokens).pooler_output.numpy().astype(float)
        looks = model.get_image_features(**processor(images=crops, return_tensors="pt")).pooler_output.numpy()
    words /= np.linalg.norm(words, axis=1, keepdims=True)
    classes = np.stack([words[3 * i : 3 * i + 3].mean(0) for i in range(10)])
    classes /= np.linalg.norm(classes, axis=1, keepdims=True)
    best = (looks.astype(float) @ classes.T).argmax(1)
    assert ClipColors(clip)(image, found) == [order[i] for i in best]
    assert len(set(best)) > 1


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


def test_what_is_evaluated_is_not_trained_on(tmp_path: Path):
    """However it is worded, with two objects in either order, a left of b as b right of a; single objects, all of which
    are asked, excepted."""
    other_side = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}

    def turned(metadata: dict) -> dict:
        first, *rest = metadata["include"]
        if metadata["tag"] == "two_object":
            return metadata | {"include": [*rest, first]}
        if metadata["tag"] == "position":
            moved = rest[0]
            plain = {"class": moved["class"], "count": 1}
            return metadata | {"include": [plain, first | {"position": [other_side[moved["position"][0]], 0]}]}
        return metadata

    rng = np.random.default_rng(0)
    asked = [make_prompt(tag, rng) for tag in ("counting", "two_object", "position") * 200]
    rows = [turned(p.metadata) | {"prompt": f"as the benchmark words it {i}"} for i, p in enumerate(asked)]
    everything = [{"tag": "single_object", "include": [{"class": c, "count": 1}], "prompt": c} for c in CLASSES]
    path = tmp_path / "evaluation_metadata.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows + everything))
    shares = {"counting": 1.0, "two_object": 1.0, "position": 1.0}
    held_out = {p.text for p in asked}
    drawn = {p.text for p in GenEvalTask(shares, path).train_prompts(2000, np.random.default_rng(1))}
    assert len({p.text for p in GenEvalTask(shares).train_prompts(2000, np.random.default_rng(1))} & held_out) > 50
    assert not drawn & held_out
    assert len(GenEvalTask({"single_object": 1.0}, path).train_prompts(50, np.random.default_rng(1))) == 50


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"tag": "shape"}, "tag = 'shape'"),
        ({"tag": "colors"}, "include and exclude: expected lists"),
        ({"tag": "colors", "include": {"class": "cat"}}, "include and exclude: expected lists"),
        ({"tag": "single_object", "include": ["bench"]}, "include: 'bench' is no object"),
        (
            {"tag": "position", "include": [{"class": "cat", "count": 1, "position": "left of"}]},
            r"position = 'left of': expected \[RELATION, NUMBER\]",
        ),
        ({"tag": "colors", "include": [{"class": "mouse", "count": 1}]}, "class = 'mouse' is none of GenEval's 80"),
        ({"tag": "counting", "include": [{"class": "cat", "count": 0}]}, "count = 0 of cat"),
        ({"tag": "colors", "include": [{"class": "cat", "count": 1, "color": "grey"}]}, "color = 'grey'"),
        (
            {"tag": "position", "include": [{"class": "cat", "count": 1, "position": ["left of", 0]}]},
            "an earlier object of include",  # not itself
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
