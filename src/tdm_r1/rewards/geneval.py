"""GenEval as a reward: Mask2Former finds objects, CLIP names their colours, `geneval_protocol` judges.

Both models come from transformers. The original's detector is the same architecture in mmdetection, with other
weights: how close scores come to the benchmark's has not been measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Mask2FormerForUniversalSegmentation, Mask2FormerImageProcessorPil

from ..errors import UserError
from ..tasks.geneval_protocol import CLASSES, COLORS, Detection, soft, strict, why_not
from .clip import VIT_L, Clip
from .scores import Scores

DETECTOR = "facebook/mask2former-swin-small-coco-instance"
# What the benchmark's detector is tested at. The hub's own setting is 384 x 384, which loses small objects.
SIZE = {"shortest_edge": 800, "longest_edge": 1333}
AT_ONCE = 8  # pictures in the detector
TOP = 100  # detections of a picture, over all queries and classes
GROUND = (0x99, 0x99, 0x99)  # what lies around an object whose colour is asked for
COLOR_TEMPLATES = ("a photo of a {color} {name}", "a photo of a {color}-colored {name}", "a photo of a {color} object")


class Mask2FormerDetector:
    """Instance segmentation of COCO's 80 classes, in GenEval's names.

    Args:
        model: hub id or folder; classes are mapped by their index, in COCO's order.
        size: that pictures are scaled to, in px (the processor's ``size``).
    """

    def __init__(self, model: str = DETECTOR, device: str | None = None, size: dict[str, int] = SIZE) -> None:
        self.device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.processor: Any = Mask2FormerImageProcessorPil.from_pretrained(model, size=size)
        network: Any = Mask2FormerForUniversalSegmentation.from_pretrained(model)
        self.network = network.eval().requires_grad_(False).to(self.device)
        if (n := network.config.num_labels) != len(CLASSES):
            raise UserError(f"the detector {model!r} has {n} classes: GenEval needs COCO's {len(CLASSES)}, in order")

    def __call__(self, images: np.ndarray) -> list[list[Detection]]:
        """Detections of pictures, uint8 [B, H, W, 3], with their masks."""
        parts = [images[start : start + AT_ONCE] for start in range(0, len(images), AT_ONCE)]
        return [found for part in parts for found in self._detect(part)]

    @torch.no_grad()  # a frozen black box
    def _detect(self, images: np.ndarray) -> list[list[Detection]]:
        pixels = self.processor(images=list(images), return_tensors="pt")["pixel_values"].to(self.device)
        out = self.network(pixel_values=pixels)
        size = images.shape[1:3]
        logits = zip(out.class_queries_logits.float(), out.masks_queries_logits.float(), strict=True)
        return [detections_of(classes, masks, size) for classes, masks in logits]


def detections_of(class_logits: Tensor, mask_logits: Tensor, size: tuple[int, int]) -> list[Detection]:
    """The `TOP` detections of one picture of ``size`` (H, W), most confident first.

    Args:
        class_logits: [Q, C + 1], the last class being no object.
        mask_logits: [Q, h, w].

    Confidence is the class's probability times the mean of the mask's probability inside the mask, as in
    mmdetection. Masks that are empty at the picture's size are dropped.
    """
    scores = class_logits.softmax(-1)[:, :-1]
    best, flat = scores.flatten().topk(min(TOP, scores.numel()))
    queries, classes = flat // scores.shape[1], flat % scores.shape[1]
    masks = F.interpolate(mask_logits[queries][None], size=size, mode="bilinear", align_corners=False)[0]
    inside = masks > 0
    certainty = (masks.sigmoid() * inside).sum((1, 2)) / inside.sum((1, 2)).clamp_min(1)
    found = []
    for mask, kind, confidence in zip(
        inside.cpu().numpy(), classes.tolist(), (best * certainty).tolist(), strict=True
    ):  # copied in one go, where a GPU would wait for each
        if mask.any():
            found.append(Detection(CLASSES[kind], confidence, _box(mask), mask))
    return sorted(found, key=lambda d: -d.confidence)


def _box(mask: np.ndarray) -> tuple[float, float, float, float]:
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1)


class ClipColors:
    """Names the colour of objects: zero-shot over GenEval's ten, on the object cut out and put on grey."""

    def __init__(self, model: str = VIT_L) -> None:
        self.clip = Clip(model)
        self._weights: dict[str, Tensor] = {}

    def __call__(self, image: np.ndarray, detections: Sequence[Detection]) -> list[str]:
        """Colours of objects of one class in one picture, uint8 [H, W, 3]."""
        if not detections:
            return []
        crops = self.clip.embed_images([cut_out(image, d) for d in detections])
        return [COLORS[i] for i in (crops @ self._classifier(detections[0].name).T).argmax(-1).tolist()]

    def _classifier(self, name: str) -> Tensor:
        """[10, D]: for each colour the mean over templates, of length 1."""
        if name not in self._weights:
            texts = [t.format(color=color, name=name) for color in COLORS for t in COLOR_TEMPLATES]
            mean = self.clip.embed_texts(texts).reshape(len(COLORS), len(COLOR_TEMPLATES), -1).mean(1)
            self._weights[name] = mean / mean.norm(dim=-1, keepdim=True)
        return self._weights[name]


def cut_out(image: np.ndarray, detection: Detection) -> np.ndarray:
    """The object on a grey ground, cropped to its box."""
    assert detection.mask is not None  # detectors give masks
    on_grey = np.where(detection.mask[..., None], image, np.array(GROUND, dtype=np.uint8))
    x0, y0, x1, y1 = (int(v) for v in detection.box)
    return on_grey[y0:y1, x0:x1]


class GenEvalReward:
    """GenEval's verdict (``strict``, 0 or 1) or Flow-GRPO's graded reward (``soft``, in [0, 1]), with the other one
    as a part.

    Needs GenEval's metadata with each prompt: ``tag``, ``include``, ``exclude``.
    """

    def __init__(
        self,
        kind: Literal["strict", "soft"],
        detector: str = DETECTOR,
        clip: str = VIT_L,
        size: dict[str, int] = SIZE,
    ) -> None:
        self.kind = kind
        self.detector, self.colors = Mask2FormerDetector(detector, size=size), ClipColors(clip)

    def __call__(self, images: np.ndarray, prompts: list[str], metadata: list[dict[str, Any]]) -> Scores:
        for prompt, m in zip(prompts, metadata, strict=True):
            if why := why_not(m):
                raise UserError(f"prompt {prompt!r} lacks GenEval's metadata: {why}; give .jsonl rows in its format")
        judged: dict[str, list[float]] = {"strict": [], "soft": []}
        for image, found, m in zip(images, self.detector(images), metadata, strict=True):
            color_of = partial(self.colors, image)
            judged["strict"].append(float(strict(found, m, color_of).correct))
            judged["soft"].append(soft(found, m, color_of))
        scores = {kind: np.array(values) for kind, values in judged.items()}
        return Scores(scores.pop(self.kind), scores)
