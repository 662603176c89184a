"""The bundled mini model learns: a short run whose evaluated reward rises by more than its noise."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tdm_r1.config.load import load_recipe
from tdm_r1.models.specification import Role
from tdm_r1.train.run import Run

pytestmark = pytest.mark.slow


def redness(images: np.ndarray, prompts: list[str], metadata: list[dict]) -> np.ndarray:
    """How much redder than green and blue the images are, [B], in [-1, 1]."""
    red, green, blue = (images[..., i].astype(np.float32) / 255 for i in range(3))
    return (red - (green + blue) / 2).mean((1, 2))


def test_the_evaluated_reward_rises_by_more_than_its_noise(tmp_path: Path):
    """With the demo's recipe and a reward that no prompt asks for; evaluated on the same noises before and after."""
    config = load_recipe("mini").override(
        {
            "iterations": 20,
            "output": str(tmp_path),
            "reward": f"{__file__}:redness",
            "model.device": "cpu",
            "batch.prompts": 4,
            "batch.group": 8,
            "evaluation.prompts": 48,
            "evaluation.images_per_prompt": 2,
        }
    )
    run = Run(config)
    generator = run.few_step(Role.GENERATOR)  # its average would lag behind
    before = run.evaluator()(generator).scores.values
    for _ in range(config.iterations):
        run.step()
    rise = run.evaluator()(generator).scores.values - before
    assert rise.mean() > 3 * rise.std(ddof=1) / np.sqrt(len(rise))
