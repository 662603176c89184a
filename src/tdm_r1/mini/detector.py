"""A black-box detector for the mini world: connected components, shape by template, colour by palette.

It works on uint8 pictures with NumPy and SciPy alone, so no gradient path exists from a score to the picture.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from scipy import ndimage

from .world import COLORS, IMAGE_SIZE, RADIUS, RELATIONS, SHAPES, coverage

FOREGROUND = 60.0  # RGB distance from the ground above which a pixel belongs to an object
MIN_PIXELS = 12  # smaller specks are noise, not objects
MIN_IOU = 0.6  # a component that matches no template this well is not an object
_PATCH = 27  # px, odd: holds the largest template with room for a shift
_SUBPIXEL = 4  # positions a pixel at which templates are rendered
_RADII = np.arange(RADIUS[0] - 1.0, RADIUS[1] + 1.01, 0.5)
_PALETTE = np.array(list(COLORS.values()), dtype=np.float32)


@dataclass(frozen=True)
class Detection:
    """One component. ``iou`` is the soft IoU with the best template; ``edge_width`` is in pixels."""

    shape: str
    color: str
    x: float
    y: float
    radius: float
    iou: float
    edge_width: float

    @property
    def is_object(self) -> bool:
        return self.iou >= MIN_IOU


@lru_cache(maxsize=1)
def _templates() -> tuple[np.ndarray, np.ndarray]:
    """Templates [sub, sub, S*R, P*P] with their centre of mass at the patch's centre plus a sub-pixel shift,
    and their areas [S*R]."""
    centre = (_PATCH - 1) / 2
    ys, xs = np.mgrid[0:_PATCH, 0:_PATCH].astype(np.float64)
    bank = np.zeros((_SUBPIXEL, _SUBPIXEL, len(SHAPES) * len(_RADII), _PATCH * _PATCH), dtype=np.float32)
    for s, shape in enumerate(SHAPES):
        for r, radius in enumerate(_RADII):
            for i in range(_SUBPIXEL):
                for j in range(_SUBPIXEL):
                    y = ys - centre - (i / _SUBPIXEL - 0.5)
                    x = xs - centre - (j / _SUBPIXEL - 0.5)
                    bank[i, j, s * len(_RADII) + r] = coverage(shape, x, y, radius).ravel()
    return bank, bank[0, 0].sum(-1)


def detect(image: np.ndarray) -> list[Detection]:
    """Finds the components of one picture, uint8 [64, 64, 3], largest first; check ``is_object`` of each."""
    pixels = image.astype(np.float32)
    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    ground = np.median(border, axis=0)
    labels, n = ndimage.label(np.linalg.norm(pixels - ground, axis=-1) > FOREGROUND)
    found = []
    for label, box in enumerate(ndimage.find_objects(labels, n), start=1):
        mask = labels[box] == label
        if mask.sum() >= MIN_PIXELS:
            found.append((int(mask.sum()), _describe(pixels, labels, label, box, ground)))
    return [detection for _, detection in sorted(found, key=lambda item: -item[0])]


def _describe(pixels: np.ndarray, labels: np.ndarray, label: int, box: tuple[slice, slice], ground: np.ndarray):
    mask = labels[box] == label
    core = ndimage.binary_erosion(mask)
    inside = pixels[box][core if core.sum() >= 4 else mask]
    votes = np.bincount(((inside[:, None] - _PALETTE) ** 2).sum(-1).argmin(-1), minlength=len(_PALETTE))
    color = np.median(inside, axis=0)

    # Coverage of each pixel: how far its colour lies on the way from the ground to the object's own colour.
    y0, y1 = max(box[0].start - 2, 0), min(box[0].stop + 2, IMAGE_SIZE)
    x0, x1 = max(box[1].start - 2, 0), min(box[1].stop + 2, IMAGE_SIZE)
    axis = (color - ground) / max(float(((color - ground) ** 2).sum()), 1.0)
    alpha = np.clip((pixels[y0:y1, x0:x1] - ground) @ axis, 0.0, 1.0)
    others = labels[y0:y1, x0:x1]
    alpha[(others != label) & (others != 0)] = 0.0
    alpha[alpha < 0.08] = 0.0

    area = float(alpha.sum())
    ys, xs = np.mgrid[y0:y1, x0:x1]
    cy, cx = float((alpha * ys).sum() / area), float((alpha * xs).sum() / area)
    index, iou = _best_template(alpha, cy, cx, y0, x0)
    shape, radius = SHAPES[index // len(_RADII)], float(_RADII[index % len(_RADII)])
    return Detection(
        shape=shape,
        color=tuple(COLORS)[int(votes.argmax())],
        x=cx + 0.5,
        y=cy + 0.5,
        radius=radius,
        iou=iou,
        edge_width=_edge_width(alpha),
    )


def _best_template(alpha: np.ndarray, cy: float, cx: float, y0: int, x0: int) -> tuple[int, float]:
    bank, mass_offset = _centred()
    half = _PATCH // 2
    best, best_iou = 0, 0.0
    area = float(alpha.sum())
    areas = _templates()[1]
    for s in range(len(SHAPES)):
        rows = slice(s * len(_RADII), (s + 1) * len(_RADII))
        near = np.flatnonzero(np.abs(areas[rows] / area - 1.0) < 0.35) + rows.start
        if len(near) == 0:
            continue
        # the shape's own centre, from the component's centre of mass
        oy = cy - mass_offset[s] * np.sqrt(area)
        iy, ix = int(np.floor(oy + 0.5)), int(np.floor(cx + 0.5))
        i = min(int((oy - iy + 0.5) * _SUBPIXEL + 0.5), _SUBPIXEL - 1)
        j = min(int((cx - ix + 0.5) * _SUBPIXEL + 0.5), _SUBPIXEL - 1)
        patch = _cut(alpha, iy - half - y0, ix - half - x0)
        templates = bank[i, j, near]
        smaller = np.minimum(templates, patch).sum(-1)
        lost = area - float(patch.sum())  # what lies outside the patch counts against the match
        iou = smaller / (areas[near] + area - smaller + max(lost, 0.0))
        k = int(iou.argmax())
        if iou[k] > best_iou:
            best, best_iou = int(near[k]), float(iou[k])
    return best, best_iou


@lru_cache(maxsize=1)
def _centred() -> tuple[np.ndarray, np.ndarray]:
    """The template bank, and each shape's vertical offset of the centre of mass over the square root of its area."""
    bank, areas = _templates()
    ys = np.mgrid[0:_PATCH, 0:_PATCH][0].ravel() - (_PATCH - 1) / 2 + 0.5
    row = [s * len(_RADII) + len(_RADII) // 2 for s in range(len(SHAPES))]
    offset = np.array([(bank[0, 0, r] * ys).sum() / areas[r] / np.sqrt(areas[r]) for r in row])
    return bank, offset


def _cut(alpha: np.ndarray, top: int, left: int) -> np.ndarray:
    """The patch of ``alpha`` that starts at (top, left), zero where it lies outside, flattened."""
    patch = np.zeros((_PATCH, _PATCH), dtype=np.float32)
    h, w = alpha.shape
    a, b, c, d = max(top, 0), min(top + _PATCH, h), max(left, 0), min(left + _PATCH, w)
    if b > a and d > c:
        patch[a - top : b - top, c - left : d - left] = alpha[a:b, c:d]
    return patch.ravel()


def _edge_width(alpha: np.ndarray) -> float:
    """Mean width in pixels of the transition from ground to object: the area that is neither (coverage in
    [.1, .9]) over the length of the outline at coverage .5. A crisp render has about 1, blur raises it."""
    soft = float(((alpha > 0.1) & (alpha < 0.9)).sum())
    padded = np.pad(alpha > 0.5, 1)
    outline = float((padded[1:] != padded[:-1]).sum() + (padded[:, 1:] != padded[:, :-1]).sum())
    return soft / max(outline * np.pi / 4, 1.0)  # pi/4: city-block length to Euclidean length, on average


# ---------------------------------------------------------------------------------------------- scoring


@dataclass(frozen=True)
class Score:
    """What the detector says of one picture and one spec: ``strict`` is 0 or 1, ``soft`` lies in [0, 1]."""

    strict: float
    soft: float


def score(detections: list[Detection], spec: dict) -> Score:
    """Scores detections against a spec. Strict wants everything that was asked for and nothing more."""
    objects = [d for d in detections if d.is_object]
    wanted = sum(part["count"] for part in spec["include"])
    extra = max(len(objects) - wanted, 0)
    parts: list[float] = []
    for part in spec["include"]:
        same = [d for d in objects if d.shape == part["class"]]
        parts.append(max(1.0 - abs(part["count"] - len(same)) / part["count"], 0.0))
        if "color" in part:
            right = sum(d.color == part["color"] for d in same)
            parts.append(max(1.0 - abs(part["count"] - right) / part["count"], 0.0))
        if "position" in part:
            relation, anchor = part["position"]
            anchors = [d for d in objects if d.shape == spec["include"][anchor]["class"]]
            parts.append(float(bool(same and anchors) and _stands(same[0], anchors[0], relation)))
    strict = float(extra == 0 and all(p == 1.0 for p in parts))
    soft = float(np.mean(parts)) * (1.0 if extra == 0 else 1.0 / (1.0 + 0.5 * extra))
    return Score(strict, soft)


def _stands(a: Detection, b: Detection, relation: str) -> bool:
    """Nearly GenEval's rule: the offset, less a tenth of both sizes, points more than .5 in the named direction.

    GenEval divides by the whole offset (`rewards.geneval_protocol`), this by what is left of it.
    """
    offset = np.array([a.x - b.x, a.y - b.y])
    size = 2.0 * (a.radius + b.radius)
    offset = np.sign(offset) * np.maximum(np.abs(offset) - 0.1 * size, 0.0)
    length = float(np.linalg.norm(offset))
    return length > 0 and float(offset @ np.array(RELATIONS[relation])) / length > 0.5
