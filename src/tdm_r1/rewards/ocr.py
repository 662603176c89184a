"""Visual text rendering: how faithfully a picture shows the text that its prompt quotes.

Two published formulas over any engine that reads pictures; RapidOCR (PP-OCR models inside its wheel) by default.
"""

from __future__ import annotations

import logging
import re
import unicodedata
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
import torch
from rapidfuzz.distance import Levenshtein

from ..errors import UserError
from .scores import Scores

Engine = Callable[[np.ndarray], Sequence[str]]
"""Reads one picture, uint8 [H, W, 3] RGB: its pieces of text in reading order, none if there is no text."""

Fidelity = Callable[[str, str], float]
"""``(read, target) -> score`` in [0, 1]."""

MIN_SIDE = 128  # px: pictures below it are enlarged before they are read
LINE_SHAPE = [3, 48, 64]  # what a line is padded to at least; to RapidOCR's 320, a square picture takes 3 times as long


def paper_fidelity(read: str, target: str) -> float:
    """TDM-R1, appendix B: max(1 - N_e / N_ref, 0), N_e the edit distance to the target and N_ref its length."""
    _refuse_empty(target)
    return max(1.0 - Levenshtein.distance(read, target) / len(target), 0.0)


def flow_grpo_fidelity(read: str, target: str) -> float:
    """Flow-GRPO (arXiv 2505.05470): as the paper's, but blind to case and spaces, and perfect wherever the target is
    part of what was read."""
    read, target = (re.sub(r"\s", "", text).lower() for text in (read, target))
    return 1.0 if target and target in read else paper_fidelity(read, target)


def _refuse_empty(target: str) -> None:
    if not target:
        raise UserError("the target text is empty: no edit distance can be measured against it")


def target_of(prompt: str, metadata: dict[str, Any]) -> str:
    """The text that a picture should show: ``metadata['text']``, else what the prompt has in double quotes.

    Raises UserError if there is none.
    """
    text = metadata.get("text")
    if text is None:
        quoted = re.search(r'"([^"]*)"|“([^”]*)”', prompt)
        text = (quoted[1] or quoted[2]) if quoted else None
    if not text or not str(text).strip():
        raise UserError(
            f"prompt {prompt!r} has no text to show: put it in double quotes, or give it as metadata 'text' (.jsonl)"
        )
    return str(text)


def _normal(text: str) -> str:
    return " ".join(unicodedata.normalize("NFC", text).split())


class OCRReward:
    """Scores text fidelity; the part ``exact`` is 1 where the text was read without any error.

    Args:
        fidelity: `paper_fidelity` or `flow_grpo_fidelity`.
        engine: what reads; RapidOCR if None.
    """

    def __init__(self, fidelity: Fidelity, engine: Engine | None = None) -> None:
        self.fidelity = fidelity
        self.engine = engine or rapidocr()

    def __call__(self, images: np.ndarray, prompts: list[str], metadata: list[dict[str, Any]]) -> Scores:
        targets = [_normal(target_of(p, m)) for p, m in zip(prompts, metadata, strict=True)]
        read = [_normal(" ".join(self.engine(image))) for image in images]
        values = np.array([self.fidelity(r, t) for r, t in zip(read, targets, strict=True)])
        return Scores(values, {"exact": np.array([float(r == t) for r, t in zip(read, targets, strict=True)])})


def ocr(*, formula: Literal["paper", "flow_grpo"] = "paper", detect: bool = True, turn: bool = True) -> OCRReward:
    """The OCR reward by its settings: the formula, and those of `rapidocr`."""
    fidelity = {"paper": paper_fidelity, "flow_grpo": flow_grpo_fidelity}[formula]
    return OCRReward(fidelity, rapidocr(detect=detect, turn=turn))


def rapidocr(*, detect: bool = True, turn: bool = True) -> Engine:
    """RapidOCR 3.x with the detection and recognition models of its wheel, on the CPU.

    Args:
        detect: find lines of text first; False takes the whole picture as one line, many times faster.
        turn: turn lines that stand on their heads, where lines are found.
    """
    from rapidocr import RapidOCR

    params: dict[str, Any] = {
        "Global.log_level": "error",
        "EngineConfig.onnxruntime.intra_op_num_threads": torch.get_num_threads(),  # its own default is every core
    }
    if not detect:
        params["Rec.rec_img_shape"] = LINE_SHAPE
    reader = RapidOCR(params=params)
    logging.getLogger("RapidOCR").setLevel(logging.ERROR)

    def read(image: np.ndarray) -> Sequence[str]:
        bgr = np.ascontiguousarray(_enlarged(image)[..., ::-1])  # it takes arrays as BGR
        result: Any = reader(bgr, use_det=detect, use_cls=detect and turn, use_rec=True)
        return result.txts or ()

    return read


def _enlarged(image: np.ndarray) -> np.ndarray:
    factor = -(-MIN_SIDE // min(image.shape[:2]))
    if factor == 1:
        return image
    from PIL import Image

    size = (image.shape[1] * factor, image.shape[0] * factor)
    return np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BICUBIC))
