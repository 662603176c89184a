"""Signs of the mini world: a coloured plate with a number of two digits, and prompts that say which.

A *sign* is what is drawn; a *spec* is what a prompt asks for: ``{"tag": "sign", "text": "47"}``.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from .world import COLORS, IMAGE_SIZE, Mark

TASK = "sign"
TASKS = (TASK,)
WORDS = ("a", "sign", "that", "says")
DIGITS = "0123456789"
LENGTH = 2  # digits on a sign
PLATES = ("red", "green", "blue", "purple")  # on which white is easy to read
FONTS = ("DejaVuSans-Bold", "DejaVuSans", "DejaVuSansMono-Bold", "DejaVuSerif-Bold")  # they come with matplotlib
FONT_SIZE = (22, 27)  # px, drawn uniformly
PLATE_WIDTH, PLATE_HEIGHT = (46, 58), (28, 36)  # px, drawn uniformly
MARGIN = 2  # px, least distance of a plate to the border

# How often a training caption is wrong, and how (see `noisy_spec`). Ours. Wrong captions are few in kind, since
# guidance sharpens: errors spread over many numbers would vanish in the guided base.
NEXT, SWAPPED = 0.25, 0.2


@dataclass(frozen=True)
class Sign:
    """One drawn sign. Lengths in pixels; ``left``, ``top`` are the plate's corner, ``ground`` a grey in 0..255."""

    text: str
    font: str
    size: int
    plate: str
    left: int
    top: int
    width: int
    height: int
    ground: float

    @property
    def centre(self) -> tuple[float, float]:
        return self.left + self.width / 2, self.top + self.height / 2

    @property
    def marks(self) -> list[Mark]:
        x, y = self.centre
        font = load_font(self.font, self.size)
        ends = [x - font.getlength(self.text) / 2 + font.getlength(self.text[:i]) for i in range(len(self.text) + 1)]
        return [
            Mark(digit, self.plate, (a + b) / 2, y) for digit, a, b in zip(self.text, ends[:-1], ends[1:], strict=True)
        ]


# ---------------------------------------------------------------------------------------------- prompts


def make_spec(tag: str, rng: np.random.Generator) -> dict:
    """Draws the number of one sign, leading zeros and all."""
    return {"tag": tag, "text": "".join(DIGITS[i] for i in rng.integers(10, size=LENGTH))}


def prompt_of(spec: dict) -> str:
    """``a sign that says "47"``."""
    return f'a sign that says "{spec["text"]}"'


def all_specs() -> list[dict]:
    """Every prompt of a sign, in order."""
    return [{"tag": TASK, "text": f"{n:0{LENGTH}d}"} for n in range(10**LENGTH)]


def noisy_spec(spec: dict, rng: np.random.Generator) -> dict:
    """A caption's spec: the number after the one that is drawn, or its digits swapped, at the stated rates."""
    text, u = spec["text"], rng.random()
    if u < NEXT:
        text = f"{(int(text) + 1) % 10**LENGTH:0{LENGTH}d}"
    elif u < NEXT + SWAPPED:
        text = text[::-1]
    return spec | {"text": text}


# ---------------------------------------------------------------------------------------------- rendering


@lru_cache(maxsize=64)
def load_font(name: str, size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{name}.ttf", size)


def make_scene(spec: dict, rng: np.random.Generator) -> Sign:
    """Draws a sign that obeys ``spec``; font, colour and place are random."""
    width, height = (int(rng.integers(low, high + 1)) for low, high in (PLATE_WIDTH, PLATE_HEIGHT))
    return Sign(
        text=spec["text"],
        font=FONTS[rng.integers(len(FONTS))],
        size=int(rng.integers(FONT_SIZE[0], FONT_SIZE[1] + 1)),
        plate=PLATES[rng.integers(len(PLATES))],
        left=int(rng.integers(MARGIN, IMAGE_SIZE - MARGIN - width + 1)),
        top=int(rng.integers(MARGIN, IMAGE_SIZE - MARGIN - height + 1)),
        width=width,
        height=height,
        ground=float(rng.uniform(214, 250)),
    )


def render(sign: Sign) -> np.ndarray:
    """The picture of a sign, uint8 [64, 64, 3]."""
    image = Image.new("RGB", (IMAGE_SIZE, IMAGE_SIZE), (round(sign.ground),) * 3)
    draw = ImageDraw.Draw(image)
    corner = sign.left + sign.width - 1, sign.top + sign.height - 1
    draw.rectangle((sign.left, sign.top, *corner), fill=COLORS[sign.plate])
    draw.text(sign.centre, sign.text, fill="white", font=load_font(sign.font, sign.size), anchor="mm")
    return np.asarray(image)
