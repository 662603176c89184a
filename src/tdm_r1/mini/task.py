"""The mini worlds as tasks, the shapes' reward, and the held-out metrics that training never sees."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from ..tasks.protocol import Prompt
from ..tasks.settings import TaskConfig
from . import detector, sign_reader, signs, worlds
from .bundle import bundle_path
from .features import FEATURES, FeatureNet, frechet_distance, load_features
from .world import IMAGE_SIZE, TASKS, all_specs, make_spec

REAL_SEED = 20_000  # of the renders that the Frechet distance compares with
DIRECTION = {  # which way is better
    "reward/exact": "up",
    "read": "up",
    "strict": "up",
    "soft": "up",
    "cleanliness": "up",
    "frechet": "down",
    "diversity": "up",
    "edge_width": "down",
    "blur": "down",
    "ground_noise": "down",
}


def reward(images: np.ndarray, prompts: list[str], metadata: list[dict[str, Any]]) -> list[float]:
    """Half strict, half soft: the soft part orders near misses, the strict part says what counts."""
    scores = [detector.score(detector.detect(image), spec) for image, spec in zip(images, metadata, strict=True)]
    return [0.5 * s.strict + 0.5 * s.soft for s in scores]


class MiniTask:
    """Prompts of the six families of shapes in given proportions; signs too, where a weight says so.

    Raises ValueError on an unknown family or on weights that do not add up to something positive.
    """

    known: Sequence[Prompt] = ()
    directions = DIRECTION

    def __init__(self, task_weights: dict[str, float] | None = None) -> None:
        weights = task_weights or dict.fromkeys(TASKS, 1.0)
        if unknown := weights.keys() - set(worlds.TASKS):
            raise ValueError(f"task.weights names {min(unknown)!r}: known families are {', '.join(worlds.TASKS)}")
        self.weights = np.array([weights.get(t, 0.0) for t in worlds.TASKS])
        if not self.weights.sum() > 0 or (self.weights < 0).any():
            raise ValueError(f"task.weights = {weights}: give non-negative weights with a positive sum")
        specs = [*all_specs(), *signs.all_specs()]
        self.by_tag = [[s for s in specs if s["tag"] == tag] for tag in worlds.TASKS]

    def train_prompts(self, n: int, rng: np.random.Generator) -> list[Prompt]:
        tags = rng.choice(len(self.by_tag), size=n, p=self.weights / self.weights.sum())
        return [_prompt(self.by_tag[t][rng.integers(len(self.by_tag[t]))]) for t in tags]

    def eval_prompts(self, n: int) -> list[Prompt]:
        """The same prompts every time, every family of shapes equally often."""
        rng = np.random.default_rng(77)
        return [_prompt(make_spec(TASKS[i % len(TASKS)], rng)) for i in range(n)]

    def metrics(self, images: np.ndarray, prompts: Sequence[Prompt], images_per_prompt: int) -> dict[str, float]:
        """Strict and soft scores, overall (mean of the families) and per family, and the held-out metrics.

        Consecutive runs of ``images_per_prompt`` pictures share their prompt.
        """
        detections = [detector.detect(image) for image in images]
        scores = [detector.score(d, p.metadata) for d, p in zip(detections, prompts, strict=True)]
        tags = np.array([p.metadata["tag"] for p in prompts])
        strict, soft = np.array([s.strict for s in scores]), np.array([s.soft for s in scores])
        present = [t for t in TASKS if (tags == t).any()]
        per_task = {f"strict/{t}": float(strict[tags == t].mean()) for t in present}
        return {
            "strict": float(np.mean(list(per_task.values()))),
            "soft": float(np.mean([soft[tags == t].mean() for t in present])),
            **per_task,
            **held_out(images, detections, prompts, images_per_prompt),
        }


def held_out(
    images: np.ndarray, detections: list[list[detector.Detection]], prompts: Sequence[Prompt], images_per_prompt: int
) -> dict[str, float]:
    """What reinforcement must not spoil.

    cleanliness: mean IoU of every component with its best template, whatever was asked for. frechet: distance
    between features of these pictures and of fresh renders of the same prompts. diversity: mean distance between
    pictures of one prompt, in layout features. edge_width: width of outlines in px, raised by blur. ground_noise:
    deviation of the ground's pixels in 8-bit levels, raised by texture and checker artefacts.
    """
    components = [d for found in detections for d in found]
    return {
        "cleanliness": float(np.mean([d.iou for d in components])) if components else 0.0,
        **_compared_with_renders(_features(bundle_path("mini")), images, prompts, images_per_prompt),
        "edge_width": float(np.mean([d.edge_width for d in components])) if components else float("nan"),
        "ground_noise": float(np.mean([_ground_noise(i, d) for i, d in zip(images, detections, strict=True)])),
    }


def _compared_with_renders(
    net: FeatureNet, images: np.ndarray, prompts: Sequence[Prompt], images_per_prompt: int
) -> dict[str, float]:
    n = images_per_prompt
    real = worlds.render_specs([p.metadata for p in prompts], REAL_SEED)
    layout = net.layout(images).reshape(-1, n, FEATURES * 16)
    pairs = (layout[:, :, None] - layout[:, None, :]).square().mean(-1).sqrt()
    return {
        "frechet": frechet_distance(net(images), net(real)),
        "diversity": float(pairs.sum((1, 2)).mean() / (n * (n - 1))) if n > 1 else float("nan"),
    }


class SignTask:
    """Signs that say a number, every number equally often. The reward is an OCR; these metrics do not use it."""

    known: Sequence[Prompt] = ()
    directions = DIRECTION

    def train_prompts(self, n: int, rng: np.random.Generator) -> list[Prompt]:
        return [_prompt(signs.make_spec(signs.TASK, rng)) for _ in range(n)]

    def eval_prompts(self, n: int) -> list[Prompt]:
        """The same prompts every time, no number again before all have been asked."""
        specs = signs.all_specs()
        order = np.random.default_rng(77).permutation(len(specs))
        return [_prompt(specs[order[i % len(specs)]]) for i in range(n)]

    def metrics(self, images: np.ndarray, prompts: Sequence[Prompt], images_per_prompt: int) -> dict[str, float]:
        """read: share of signs whose number the templates read rightly. cleanliness: mean IoU of every glyph with its
        best template, whatever was asked for. blur: share of the plate that is neither plate nor glyph. The others
        as in `held_out`."""
        readings = [sign_reader.read(image) for image in images]
        known = [(image, r) for image, r in zip(images, readings, strict=True) if r is not None]
        ious = [iou for _, r in known for iou in r.ious]
        noise = [n for n in (_clear_of_plate(image, r) for image, r in known) if not np.isnan(n)]
        right = [r is not None and r.text == p.metadata["text"] for r, p in zip(readings, prompts, strict=True)]
        return {
            "read": float(np.mean(right)),
            "cleanliness": float(np.mean(ious)) if ious else 0.0,
            **_compared_with_renders(_features(bundle_path("mini_signs")), images, prompts, images_per_prompt),
            "blur": float(np.mean([r.blur for _, r in known])) if known else float("nan"),
            "ground_noise": float(np.mean(noise)) if noise else float("nan"),
        }


def make_shapes(config: TaskConfig) -> MiniTask:
    """The task of ``task.name = mini``."""
    return MiniTask(config.weights)


def make_signs(config: TaskConfig) -> SignTask:
    """The task of ``task.name = mini_signs``."""
    return SignTask()


def _clear_of_plate(image: np.ndarray, reading: sign_reader.Reading) -> float:
    top, bottom, left, right = reading.box
    clear = np.ones(image.shape[:2], dtype=bool)
    clear[max(top - 2, 0) : bottom + 2, max(left - 2, 0) : right + 2] = False
    return _deviation(image[clear])


def _ground_noise(image: np.ndarray, detections: list[detector.Detection]) -> float:
    """Standard deviation of the pixels that lie clear of every component."""
    ys, xs = np.mgrid[0:IMAGE_SIZE, 0:IMAGE_SIZE] + 0.5
    clear = np.ones((IMAGE_SIZE, IMAGE_SIZE), dtype=bool)
    for d in detections:
        clear &= np.hypot(xs - d.x, ys - d.y) > 1.6 * d.radius + 2
    return _deviation(image[clear])


def _deviation(pixels: np.ndarray) -> float:
    return float(pixels.astype(np.float64).std(0).mean()) if len(pixels) > 50 else float("nan")


def _prompt(spec: dict) -> Prompt:
    return Prompt(worlds.prompt_of(spec), spec)


@lru_cache
def _features(model: Path) -> FeatureNet:
    return load_features(model / "features.safetensors")
