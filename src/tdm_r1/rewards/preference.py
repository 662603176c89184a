"""Preference and quality models on CLIP: Aesthetic, PickScore, HPSv2, CLIPScore; raw values, as the originals give."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from huggingface_hub import hf_hub_download
from safetensors.torch import load_file
from torch import Tensor, nn

from ..errors import UserError
from .clip import VIT_H, VIT_L, Clip
from .open_clip import to_transformers

PICKSCORE = "yuvalkirstain/PickScore_v1"
AESTHETIC = ("trl-lib/ddpo-aesthetic-predictor", "aesthetic-model.pth")
HPS = "xswu/HPSv2"
CLIP_SCORE_SCALE = 2.5  # Hessel et al. 2021


class PickScore:
    """PickScore v1 (Kirstain et al. 2023, arXiv 2305.01569): exp(logit scale) times the cosine, about 20 to 23."""

    def __init__(self, model: str = PICKSCORE, processor: str = VIT_H) -> None:
        self.clip = Clip(model, processor=processor)

    def __call__(self, images: np.ndarray, prompts: list[str], metadata: list[dict[str, Any]]) -> np.ndarray:
        return self.clip.logit_scale * self.clip.similarity(images, prompts)


class CLIPScore:
    """CLIPScore (Hessel et al. 2021, arXiv 2104.08718): 2.5 max(cosine, 0); of ViT-L/14 where they have ViT-B/32, and
    of the prompt alone, without their "A photo depicts" before it."""

    def __init__(self, model: str = VIT_L) -> None:
        self.clip = Clip(model)

    def __call__(self, images: np.ndarray, prompts: list[str], metadata: list[dict[str, Any]]) -> np.ndarray:
        return CLIP_SCORE_SCALE * np.maximum(self.clip.similarity(images, prompts), 0.0)


class HPSv2:
    """HPS v2 and v2.1 (Wu et al. 2023, arXiv 2306.09341): the cosine without the logit scale, about .2 to .35.

    The two versions are different weights, and their scores cannot be compared.

    Args:
        version: ``2`` or ``2.1``.
        model: ViT-H/14 in transformers' format, for its configuration, tokenizer and image processor.
        checkpoint: the weights in open_clip's names; downloaded if None.
    """

    def __init__(self, version: Literal["2", "2.1"], model: str = VIT_H, checkpoint: Path | None = None) -> None:
        self.clip = Clip(model, letterbox=True)  # as the original has it, but for scaling tensors
        path = checkpoint or Path(hf_hub_download(HPS, f"HPS_v{version}_compressed.pt"))
        self.clip.model.load_state_dict(to_transformers(plain_tensors(path)), strict=True)

    def __call__(self, images: np.ndarray, prompts: list[str], metadata: list[dict[str, Any]]) -> np.ndarray:
        return self.clip.similarity(images, prompts)


class LinearHead(nn.Module):
    """Five linear layers without activations between them, as LAION's aesthetic predictor and ImageReward have."""

    def __init__(self, width: int = 768) -> None:
        super().__init__()
        self.layers = nn.Sequential(  # the dropouts keep the checkpoint's numbering
            nn.Linear(width, 1024),
            nn.Dropout(0.2),
            nn.Linear(1024, 128),
            nn.Dropout(0.2),
            nn.Linear(128, 64),
            nn.Dropout(0.1),
            nn.Linear(64, 16),
            nn.Linear(16, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)[:, 0]


class Aesthetic:
    """LAION's improved aesthetic predictor (sac+logos+ava1) on CLIP ViT-L/14, about 1 to 10; blind to the prompt.

    Args:
        model: CLIP, hub id or folder.
        head: a ``.safetensors`` or ``.pth`` file with the head's weights; downloaded if None.
    """

    def __init__(self, model: str = VIT_L, head: Path | None = None) -> None:
        self.clip = Clip(model)
        self.head = LinearHead(self.clip.model.config.projection_dim)
        self.head.load_state_dict(plain_tensors(head or Path(hf_hub_download(*AESTHETIC))))
        self.head.eval().requires_grad_(False).to(self.clip.device)

    @torch.no_grad()  # a frozen black box
    def __call__(self, images: np.ndarray, prompts: list[str], metadata: list[dict[str, Any]]) -> np.ndarray:
        return self.head(self.clip.embed_images(list(images))).double().cpu().numpy()


def plain_tensors(path: Path) -> dict[str, Tensor]:
    """Tensors of a checkpoint, without running anything that it may hold; a ``state_dict`` in it is taken out.

    Raises UserError on other content.
    """
    if path.suffix == ".safetensors":
        return load_file(path)
    try:
        weights = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises several kinds; none of them may pass as a score
        raise UserError(f"{str(path)!r} is no plain state dict: {error}") from error
    weights = weights.get("state_dict", weights) if isinstance(weights, dict) else weights
    if not isinstance(weights, dict) or not all(isinstance(w, Tensor) for w in weights.values()):
        raise UserError(f"{str(path)!r} is no plain state dict: it holds other things than tensors")
    return weights
