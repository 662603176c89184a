"""CLIP embeddings through transformers, as several rewards use them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import AutoTokenizer, CLIPImageProcessorPil, CLIPModel

VIT_L = "openai/clip-vit-large-patch14"
VIT_H = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"


class Clip:
    """A CLIP model, frozen, in float32. Embeddings have length 1.

    Args:
        name: hub id or folder of the model.
        processor: of its image processor and tokenizer, if they lie elsewhere.
        letterbox: a picture that is not square is fitted in whole, with black beside it; else its middle is taken.
        device: ``cuda`` if there is one, else ``cpu``, if None.
    """

    def __init__(
        self, name: str, *, processor: str | None = None, letterbox: bool = False, device: str | None = None
    ) -> None:
        self.device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.model: Any = CLIPModel.from_pretrained(name).eval().requires_grad_(False).to(self.device)
        self.images: Any = CLIPImageProcessorPil.from_pretrained(processor or name)
        self.letterbox = letterbox
        self.texts: Any = AutoTokenizer.from_pretrained(processor or name)

    @property
    def logit_scale(self) -> float:
        return float(self.model.logit_scale.exp())

    @torch.no_grad()  # a frozen black box
    def embed_images(self, images: Sequence[np.ndarray]) -> Tensor:
        """Pictures, uint8 [H, W, 3] of any sizes, to [B, D]."""
        # as pictures: of an array of three rows the processor could not tell which axis is colour
        given = [Image.fromarray(image) for image in images]
        if self.letterbox:
            given = [fitted(image, self.images.crop_size["height"]) for image in given]
        pixels = self.images(images=given, return_tensors="pt")["pixel_values"].to(self.device)
        return _unit(self.model.get_image_features(pixel_values=pixels).pooler_output)

    @torch.no_grad()  # a frozen black box
    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """Texts, cut at the model's length, to [B, D]."""
        length = self.model.config.text_config.max_position_embeddings
        tokens = self.texts(list(texts), padding="max_length", truncation=True, max_length=length, return_tensors="pt")
        ids, mask = tokens["input_ids"].to(self.device), tokens["attention_mask"].to(self.device)
        return _unit(self.model.get_text_features(input_ids=ids, attention_mask=mask).pooler_output)

    def similarity(self, images: np.ndarray, texts: Sequence[str]) -> np.ndarray:
        """Cosine of each picture and its text, float64 [B]."""
        cosine = (self.embed_images(list(images)) * self.embed_texts(texts)).sum(-1)
        return cosine.double().cpu().numpy()


def fitted(image: Image.Image, side: int) -> Image.Image:
    """The whole picture in a square of ``side`` px, black beside it, as open_clip's ``ResizeMaxSize`` has it."""
    scale = side / max(image.size)
    small = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    square = Image.new("RGB", (side, side))
    square.paste(small, ((side - small.width) // 2, (side - small.height) // 2))
    return square


def _unit(x: Tensor) -> Tensor:
    return x / x.norm(dim=-1, keepdim=True)
