"""Pictures for people: grids of samples with captions, and curves of a run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ..files import whole_file


def save_png(image: Image.Image, path: Path) -> None:
    """Writes a PNG so that it appears whole or not at all."""
    with whole_file(path) as partial:
        image.save(partial, format="PNG")


def grid(rows: Sequence[tuple[str, np.ndarray]], captions: Sequence[str], *, tile: int | None = None) -> Image.Image:
    """One labelled row of pictures (uint8 [N, H, W, 3]) per entry, a caption above each column.

    Args:
        tile: the side that pictures are shown at, in px; their own between 96 and 256 if None.
    """
    own = rows[0][1].shape[1] if rows else 96
    tile = tile or min(max(own, 96), 256)
    method = Image.Resampling.LANCZOS if own > tile else Image.Resampling.NEAREST
    font = ImageFont.load_default(size=11)
    label_width, caption_height, gap = 96, 46, 4
    n = len(captions)
    width = label_width + n * (tile + gap)
    canvas = Image.new("RGB", (width, caption_height + len(rows) * (tile + gap)), "white")
    draw = ImageDraw.Draw(canvas)
    for j, caption in enumerate(captions):
        draw.multiline_text(
            (label_width + j * (tile + gap), 2), _wrap(caption, tile // 6), fill="black", font=font, spacing=1
        )
    for i, (label, images) in enumerate(rows):
        y = caption_height + i * (tile + gap)
        draw.multiline_text((4, y + tile // 3), _wrap(label, 14), fill="black", font=font)
        for j in range(n):
            picture = Image.fromarray(images[j]).resize((tile, tile), method)
            canvas.paste(picture, (label_width + j * (tile + gap), y))
    return canvas


def strip(images: np.ndarray) -> Image.Image:
    """Pictures, uint8 [N, H, W, 3] with H = W, side by side without captions."""
    return Image.fromarray(np.concatenate(list(images), axis=1))


def of_strip(image: Image.Image) -> np.ndarray:
    """The pictures of a `strip`."""
    return np.stack(np.split(np.asarray(image.convert("RGB")), image.width // image.height, axis=1))


def _wrap(text: str, width: int) -> str:
    lines: list[str] = [""]
    for word in text.split():
        if lines[-1] and len(lines[-1]) + 1 + len(word) > width:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return "\n".join(lines)


def curves(history: Sequence[dict[str, float]], path: Path) -> None:
    """Every metric of ``metrics.jsonl`` over iterations, one small plot each, held-out ones first."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names = sorted({k for row in history for k in row if k not in ("iteration", "seconds")}, key=_order)
    if not names:
        return
    columns = 4
    lines = -(-len(names) // columns)
    width, height = 4 * columns, 2.4 * lines
    figure = Figure(figsize=(width, height))  # a layout engine would take seconds
    figure.subplots_adjust(0.5 / width, 0.3 / height, 1 - 0.1 / width, 1 - 0.3 / height, wspace=0.22, hspace=0.4)
    FigureCanvasAgg(figure)
    for k, name in enumerate(names):
        axis = figure.add_subplot(lines, columns, k + 1)
        points = [(row["iteration"], row[name]) for row in history if name in row]
        axis.plot(*zip(*points, strict=True), marker="." if len(points) < 30 else "", linewidth=1)
        axis.set_title(name, fontsize=9)
        axis.tick_params(labelsize=7)
    with whole_file(path) as partial:
        figure.savefig(partial, format="png", dpi=80)


def _order(name: str) -> tuple[int, str]:
    return (0 if name.startswith("eval/") else 1, name)
