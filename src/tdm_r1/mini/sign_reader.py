"""Reads signs by comparing glyphs with templates: a second opinion, apart from the OCR engine that training rewards."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw
from scipy import ndimage

from .signs import DIGITS, FONT_SIZE, FONTS, load_font

_GLYPH = (16, 24)  # px, width and height that every glyph is brought to
_LEAST_PLATE, _LEAST_GLYPH = 200, 6  # px^2
_RIM = 2  # px of a plate's edge in which no glyph is looked for
_WHITE = np.full(3, 255.0)


@dataclass(frozen=True)
class Reading:
    """What a sign shows.

    text: the digits that the glyphs resemble most, from left to right.
    ious: of each glyph, the soft intersection over union with its best template.
    blur: share of the plate's pixels that are neither plate nor glyph.
    box: the plate, (top, bottom, left, right) in pixels.
    """

    text: str
    ious: tuple[float, ...]
    blur: float
    box: tuple[int, int, int, int]


def read(image: np.ndarray) -> Reading | None:
    """The reading of one picture, uint8 [H, W, 3]; None if there is no plate."""
    pixels = image.astype(np.float64)
    border = np.concatenate([pixels[:2].reshape(-1, 3), pixels[-2:].reshape(-1, 3)])
    coloured = np.abs(pixels - np.median(border, axis=0)).max(-1) > 40
    labels, n = ndimage.label(coloured)
    if n == 0:
        return None
    areas = np.bincount(labels.ravel())[1:]
    if areas.max() < _LEAST_PLATE:
        return None
    largest = int(areas.argmax())
    rows, columns = ndimage.find_objects(labels)[largest]
    plate = np.median(pixels[labels == largest + 1], axis=0)
    towards_white = _WHITE - plate
    alpha = ((pixels[rows, columns] - plate) @ towards_white / max(towards_white @ towards_white, 1.0)).clip(0, 1)
    inside = alpha[1:-1, 1:-1]
    # a soft edge fades to the ground, which is as good as white
    glyphs = sorted(_glyphs(alpha[_RIM:-_RIM, _RIM:-_RIM]), key=lambda found: found[0])
    matches = [_best_match(glyph) for _, glyph in glyphs]
    return Reading(
        text="".join(digit for digit, _ in matches),
        ious=tuple(iou for _, iou in matches),
        blur=float(((inside > 0.2) & (inside < 0.8)).mean()) if inside.size else 0.0,
        box=(rows.start, rows.stop, columns.start, columns.stop),
    )


def _glyphs(alpha: np.ndarray) -> list[tuple[int, np.ndarray]]:
    """Left edge and normalised picture of every glyph that does not touch the border of ``alpha``. Strokes above one
    another are one glyph: thin joints, as in a small serif 5, can be missing."""
    if alpha.size == 0:
        return []
    labels, _ = ndimage.label(ndimage.binary_fill_holes(alpha > 0.5))  # a dotted zero is one glyph
    height, width = alpha.shape
    found: list[tuple[slice, slice, np.ndarray]] = []
    boxes = [(i, box) for i, box in enumerate(ndimage.find_objects(labels), start=1)]
    for i, (rows, columns) in sorted(boxes, key=lambda entry: entry[1][1].start):
        own = labels == i
        if rows.start == 0 or columns.start == 0 or rows.stop == height or columns.stop == width:
            continue
        if found and _above_one_another(found[-1][1], columns):
            r, c, other = found.pop()
            rows = slice(min(r.start, rows.start), max(r.stop, rows.stop))
            columns, own = slice(c.start, max(c.stop, columns.stop)), own | other
        found.append((rows, columns, own))
    glyphs = []
    for rows, columns, own in found:
        if own.sum() >= _LEAST_GLYPH:
            glyph = np.where(ndimage.binary_dilation(own), alpha, 0)[rows, columns]
            resized = Image.fromarray(glyph.astype(np.float32)).resize(_GLYPH, Image.Resampling.BILINEAR)
            glyphs.append((columns.start, np.asarray(resized).ravel()))
    return glyphs


def _above_one_another(a: slice, b: slice) -> bool:
    """Whether two spans of columns share more than half of the narrower one."""
    shared = min(a.stop, b.stop) - max(a.start, b.start)
    return shared > 0.5 * min(a.stop - a.start, b.stop - b.start)


def _best_match(glyph: np.ndarray) -> tuple[str, float]:
    digits, templates = _templates()
    ious = np.minimum(templates, glyph).sum(1) / np.maximum(templates, glyph).sum(1)
    best = int(ious.argmax())
    return digits[best], float(ious[best])


@lru_cache(maxsize=1)
def _templates() -> tuple[str, np.ndarray]:
    """Every digit in every font and size, at four places between pixels: their names, and pictures [N, 16 * 24]."""
    digits, pictures = "", []
    for font in FONTS:
        for size in range(FONT_SIZE[0], FONT_SIZE[1] + 1):
            for digit in DIGITS:
                for x, y in ((20.0, 20.0), (20.5, 20.0), (20.0, 20.5), (20.5, 20.5)):
                    canvas = Image.new("L", (40, 40))
                    ImageDraw.Draw(canvas).text((x, y), digit, fill=255, font=load_font(font, size), anchor="mm")
                    ((_, glyph),) = _glyphs(np.asarray(canvas) / 255.0)
                    digits += digit
                    pictures.append(glyph)
    return digits, np.stack(pictures)
