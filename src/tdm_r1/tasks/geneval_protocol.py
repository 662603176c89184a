"""GenEval's rules (Ghosh et al. 2023, arXiv 2310.11513) on detections: no detector and no colour model in here.

`strict` is the benchmark's verdict; `soft` is the training reward of Flow-GRPO (arXiv 2505.05470). Departures: a part
of the soft reward is never negative, and a failed position scores 0 alone (theirs appends a 1 after it).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

CONFIDENCE = 0.3  # a detection counts above it
COUNTING_CONFIDENCE = 0.9  # and above this one for prompts of the family `counting`
MAX_OBJECTS = 16  # of a class, the most confident
POSITION_TOLERANCE = 0.1  # of the two objects' sizes, taken off their offset
POSITION_SHARE = 0.5  # of the offset's length that has to point in the relation's direction
RELATIONS = {"left of": (0, -1), "right of": (0, 1), "above": (1, -1), "below": (1, 1)}  # axis and sign; y points down

# The 80 classes in COCO's order; three are not called as in COCO (computer mouse, tv remote, computer keyboard).
_COCO = (
    "person,bicycle,car,motorcycle,airplane,bus,train,truck,boat,traffic light,fire hydrant,stop sign,parking meter,"
    "bench,bird,cat,dog,horse,sheep,cow,elephant,bear,zebra,giraffe,backpack,umbrella,handbag,tie,suitcase,frisbee,"
    "skis,snowboard,sports ball,kite,baseball bat,baseball glove,skateboard,surfboard,tennis racket,bottle,wine glass,"
    "cup,fork,knife,spoon,bowl,banana,apple,sandwich,orange,broccoli,carrot,hot dog,pizza,donut,cake,chair,couch,"
    "potted plant,bed,dining table,toilet,tv,laptop,computer mouse,tv remote,computer keyboard,cell phone,microwave,"
    "oven,toaster,sink,refrigerator,book,clock,vase,scissors,teddy bear,hair drier,toothbrush"
)
CLASSES = tuple(_COCO.split(","))
TAGS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")  # the families of prompts
COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")


@dataclass(frozen=True)
class Detection:
    """One object that a detector found. ``box``: x0, y0, x1, y1 in pixels, y pointing down; ``mask``: bool [H, W]."""

    name: str
    confidence: float
    box: tuple[float, float, float, float]
    mask: np.ndarray | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True)
class Verdict:
    """Whether a picture shows what its prompt asked for, and if not, why."""

    correct: bool
    reasons: tuple[str, ...] = ()


ColorOf = Callable[[Sequence[Detection]], Sequence[str]]
"""Names the colour of each detection. Called only with those whose colour matters: a colour model is not cheap."""


def why_not(metadata: Mapping[str, Any]) -> str:
    """What keeps a row from being GenEval's metadata; empty if nothing does."""
    if metadata.get("tag") not in TAGS:
        return f"tag = {metadata.get('tag')!r}: expected one of {', '.join(TAGS)}"
    include, exclude = metadata.get("include"), metadata.get("exclude") or []
    if not include or not isinstance(include, list) or not isinstance(exclude, list):
        return "include and exclude: expected lists of what the picture has to show and must not, include not empty"
    for i, part in enumerate([*include, *exclude]):
        if not isinstance(part, dict):
            return f"include: {part!r} is no object: expected {{'class': ..., 'count': ...}}"
        if part.get("class") not in CLASSES:
            return f"class = {part.get('class')!r} is none of GenEval's {len(CLASSES)}"
        if not isinstance(part.get("count"), int) or part["count"] < 1:
            return f"count = {part.get('count')!r} of {part['class']}: expected a whole number, at least 1"
        if "color" in part and part["color"] not in COLORS:
            return f"color = {part['color']!r}: expected one of {', '.join(COLORS)}"
        if "position" in part:
            position = part["position"]
            pair = position if isinstance(position, list) and len(position) == 2 else (None, None)
            if pair[0] not in RELATIONS or type(pair[1]) is not int or not 0 <= pair[1] < min(i, len(include)):
                return (
                    f"position = {position!r}: expected [RELATION, NUMBER], one of {', '.join(RELATIONS)} and the "
                    "number of an earlier object of include, from 0"
                )
    return ""


def require_metadata(prompt: str, metadata: Mapping[str, Any]) -> None:
    """Raises ValueError if a prompt's metadata is not GenEval's."""
    if why := why_not(metadata):
        raise ValueError(f"{prompt!r}: {why}")


def judged(detections: Sequence[Detection], tag: str) -> dict[str, list[Detection]]:
    """Detections that count, by class, most confident first: above the threshold of the family ``tag``, at most 16."""
    threshold = COUNTING_CONFIDENCE if tag == "counting" else CONFIDENCE
    found: dict[str, list[Detection]] = {}
    for d in sorted(detections, key=lambda d: -d.confidence):
        if d.confidence > threshold and len(found.get(d.name, [])) < MAX_OBJECTS:
            found.setdefault(d.name, []).append(d)
    return found


def strict(detections: Sequence[Detection], metadata: Mapping[str, Any], color_of: ColorOf) -> Verdict:
    """The benchmark's verdict on one picture.

    Args:
        detections: everything that the detector found, in any order.
        metadata: GenEval's own, ``{"tag", "include": [{"class", "count", "color"?, "position"?}], "exclude"?}``.
        color_of: see `ColorOf`.

    Of a class, the ``count`` most confident objects are judged: surplus ones fail only where ``exclude`` says so.
    """
    objects = judged(detections, metadata["tag"])
    reasons: list[str] = []
    matched: list[list[Detection] | None] = []
    for part in metadata["include"]:
        found = objects.get(part["class"], [])[: part["count"]]
        why = _why_not(part, found, matched, color_of)
        matched.append(None if why else found)
        reasons += [why] if why else []
    for part in metadata.get("exclude") or []:
        n = len(objects.get(part["class"], []))
        if n >= part["count"]:
            reasons.append(f"expected fewer than {part['count']} {part['class']}, found {n}")
    return Verdict(not reasons, tuple(reasons))


def _why_not(
    part: Mapping[str, Any], found: list[Detection], matched: list[list[Detection] | None], color_of: ColorOf
) -> str:
    """Why the ``found`` objects are not what one part asks for; empty if they are."""
    name, count = part["class"], part["count"]
    if len(found) < count:
        return f"expected {count} {name}, found {len(found)}"
    if "color" in part:
        colors = list(color_of(found))
        if colors.count(part["color"]) < count:
            return f"expected {count} {part['color']} {name}, found {', '.join(colors)}"
    if "position" in part:
        relation, anchor = part["position"]
        anchors = matched[anchor]
        if anchors is None:
            return f"nothing right for {name} to be {relation}"
        if not all(relation in relations_of(a, b) for a in found for b in anchors):
            return f"{name} is not {relation} {anchors[0].name}"
    return ""


def soft(detections: Sequence[Detection], metadata: Mapping[str, Any], color_of: ColorOf) -> float:
    """Flow-GRPO's graded reward of one picture, in [0, 1]: the mean over what the prompt asks for.

    Each part gives its count, 1 - |c - n| / c; its colour, 1 - |c - k| / c with k objects of that colour; and its
    position, 0 or 1. Colour and position are 0 where the count is wrong. All objects above the threshold are judged,
    surplus ones too. ``exclude`` plays no part.
    """
    objects = judged(detections, metadata["tag"])
    scores: list[float] = []
    matched: list[list[Detection] | None] = []
    for part in metadata["include"]:
        found, count = objects.get(part["class"], []), part["count"]
        right = len(found) == count
        scores.append(_closeness(len(found), count))
        if "color" in part:
            k = list(color_of(found)).count(part["color"]) if right else 0
            scores.append(_closeness(k, count))
            right = right and k == count
        if "position" in part:
            relation, anchor = part["position"]
            anchors = matched[anchor]
            right = right and anchors is not None
            right = right and all(relation in relations_of(a, b) for a in found for b in anchors or [])
            scores.append(float(right))
        matched.append(found if right else None)
    return float(np.mean(scores))


def _closeness(n: int, count: int) -> float:
    return max(1.0 - abs(count - n) / count, 0.0)


def relations_of(a: Detection, b: Detection) -> set[str]:
    """How ``a`` stands to ``b``: none, one or two of left of, right of, above, below.

    The offset of the centres, less a tenth of both sizes in each direction, has to make up more than half of the
    whole offset's length.
    """
    box_a, box_b = (np.array(d.box, dtype=np.float64).reshape(2, 2) for d in (a, b))
    offset = box_a.mean(0) - box_b.mean(0)
    size = np.abs(box_a[1] - box_a[0]) + np.abs(box_b[1] - box_b[0])
    clear = np.sign(offset) * np.maximum(np.abs(offset) - POSITION_TOLERANCE * size, 0.0)
    if (np.abs(clear) < 1e-3).all():
        return set()
    share = clear / np.linalg.norm(offset)
    return {name for name, (axis, sign) in RELATIONS.items() if share[axis] * sign > POSITION_SHARE}
