"""OCR text fidelity: both formulas against hand-made tables, targets, and RapidOCR on rendered signs."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

from tdm_r1.errors import UserError
from tdm_r1.rewards.ocr import OCRReward, flow_grpo_fidelity, paper_fidelity, target_of
from tdm_r1.rewards.registry import load_reward

# read, target, the paper's score, Flow-GRPO's; edits counted by hand
TABLE = [
    ("STOP", "STOP", 1.0, 1.0),
    ("", "STOP", 0.0, 0.0),  # no text found
    ("STOB", "STOP", 0.75, 0.75),
    ("STP", "STOP", 0.75, 0.75),
    ("STOPP", "STOP", 0.75, 1.0),  # surplus text: one edit, or a substring
    ("xx STOP xx", "STOP", 0.0, 1.0),  # six edits of four: never below 0
    ("stop", "STOP", 0.0, 1.0),  # case
    ("Stop", "STOP", 0.25, 1.0),
    ("OPEN NOW", "OPENNOW", 1 - 1 / 7, 1.0),  # spaces
    ("OPENNOW", "OPEN NOW", 1 - 1 / 8, 1.0),
    ("POST", "STOP", 0.0, 0.0),  # by hand: POST -> STOP takes 4 edits
    ("kitten", "sitting", 1 - 3 / 7, 1 - 3 / 7),  # Levenshtein's classic
    ("abcdefgh", "xy", 0.0, 0.0),
    ("4", "47", 0.5, 0.5),
    ("7", "47", 0.5, 0.5),
    ("74", "47", 0.0, 0.0),  # two substitutions; a transposition is no edit of its own
    ("café", "café", 1.0, 1.0),
    ("cafe", "café", 0.75, 0.75),
    ("日本", "日本語", 2 / 3, 2 / 3),
    ("ŠKODA 🚗", "ŠKODA", 1 - 2 / 5, 1.0),
]


@pytest.mark.parametrize(("read", "target", "paper", "flow_grpo"), TABLE)
def test_formulas(read: str, target: str, paper: float, flow_grpo: float):
    assert paper_fidelity(read, target) == pytest.approx(paper)
    assert flow_grpo_fidelity(read, target) == pytest.approx(flow_grpo)


@pytest.mark.parametrize("formula", [paper_fidelity, flow_grpo_fidelity])
@pytest.mark.parametrize("read", ["", "STOP"])
def test_an_empty_target_is_refused(formula, read: str):
    with pytest.raises(UserError, match="target text is empty"):
        formula(read, "")


def test_flow_grpo_refuses_a_target_of_spaces():
    with pytest.raises(UserError, match="target text is empty"):
        flow_grpo_fidelity("STOP", "  ")


@pytest.mark.parametrize(
    ("prompt", "metadata", "target"),
    [
        ('A sign that says "47"', {}, "47"),
        ('A sign that says "47" above "12"', {}, "47"),
        ("A sign that says “Grüße”", {}, "Grüße"),
        ('A sign that says "47"', {"text": "12"}, "12"),
        ("A sign", {"text": "12"}, "12"),
        ("A sign", {"text": 12}, "12"),
    ],
)
def test_targets(prompt: str, metadata: dict, target: str):
    assert target_of(prompt, metadata) == target


@pytest.mark.parametrize(("prompt", "metadata"), [("A sign", {}), ('A sign ""', {}), ("A sign", {"text": " "})])
def test_a_prompt_without_target_is_refused(prompt: str, metadata: dict):
    with pytest.raises(UserError, match=r"has no text to show: put it in double quotes"):
        target_of(prompt, metadata)


def test_any_engine_can_read():
    """Pieces are joined by a space; composed and decomposed letters are the same."""
    reward = OCRReward(paper_fidelity, engine=lambda image: ["cafe\u0301", " open "] if image.any() else [])
    images = np.stack([np.ones((4, 4, 3), np.uint8), np.zeros((4, 4, 3), np.uint8)])
    scores = reward(images, ["", ""], [{"text": "café  open"}] * 2)
    assert scores.values.tolist() == [1.0, 0.0]
    assert scores.parts["exact"].tolist() == [1.0, 0.0]


def sign(text: str, size: int, font_size: int) -> np.ndarray:
    image = Image.new("RGB", (size, size), (250, 246, 230))
    draw = ImageDraw.Draw(image)
    draw.rounded_rectangle((4, size // 4, size - 5, 3 * size // 4), 6, fill=(30, 60, 140))
    draw.text((size / 2, size / 2), text, fill="white", font=ImageFont.load_default(size=font_size), anchor="mm")
    return np.asarray(image)


def test_rapidocr_reads_rendered_signs():
    texts = ["47", "OPEN", "Exit 9"]
    images = np.stack([sign(t, 256, 64) for t in texts] + [sign("", 256, 64)])
    prompts = [f'A sign that says "{t}"' for t in texts] + ['A sign that says "47"']
    scores = load_reward("ocr")(images, prompts, [{}] * 4)
    assert scores.values.tolist() == [1.0, 1.0, 1.0, 0.0]
    wrong = load_reward("ocr")(images[:1], ['A sign that says "48"'], [{}])
    assert wrong.values.tolist() == [0.5]


@pytest.mark.parametrize("text", ["47", "803"])
def test_one_line_is_read_without_searching_for_it(text: str):
    image = np.full((64, 64, 3), 240, np.uint8)
    image[14:50] = sign(text, 64, 26)[14:50]
    assert load_reward("ocr_line")(image[None], [f'"{text}"'], [{}]).values.tolist() == [1.0]


def test_small_pictures_are_enlarged_before_they_are_read():
    assert load_reward("ocr_flow_grpo")(sign("47", 64, 26)[None], ['"47"'], [{}]).values.tolist() == [1.0]


def test_red_and_blue_are_not_swapped():
    """RapidOCR takes BGR: what our engine hands on is what a picture of swapped channels would give it."""
    from rapidocr import RapidOCR

    seen = []
    original = RapidOCR.__call__

    def spy(self, image, *args, **kwargs):
        seen.append(image[0, 0].tolist())
        return original(self, image, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RapidOCR, "__call__", spy)
        load_reward("ocr")(sign("47", 256, 64)[None], ['"47"'], [{}])
    assert seen == [[230, 246, 250]]
