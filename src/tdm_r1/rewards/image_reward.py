"""ImageReward (Xu et al. 2023, arXiv 2304.05977) on transformers' BLIP: the original package does not import on
transformers 5, its checkpoint loads here under its own names."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import hf_hub_download
from torch import Tensor, nn
from transformers import AutoTokenizer, BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel
from transformers import CLIPImageProcessorPil as ImageProcessor

from ..errors import UserError
from .preference import LinearHead, plain_tensors

CHECKPOINT = ("THUDM/ImageReward", "ImageReward.pt")
TOKENIZER = "google-bert/bert-base-uncased"
MEAN, DEVIATION = 0.16717362830052426, 1.0333394966054072  # of the original's raw scores
TEXT_LENGTH = 35  # tokens

VISION = BlipVisionConfig(  # ViT-L/16 at 224 px
    hidden_size=1024,
    intermediate_size=4096,
    num_hidden_layers=24,
    num_attention_heads=16,
    patch_size=16,
    image_size=224,
    layer_norm_eps=1e-6,
)
TEXT = BlipTextConfig(  # BERT base with cross-attention; two words more than BERT's
    vocab_size=30524,
    hidden_size=768,
    encoder_hidden_size=1024,
    intermediate_size=3072,
    num_hidden_layers=12,
    num_attention_heads=12,
    max_position_embeddings=512,
    layer_norm_eps=1e-12,
    is_decoder=True,
    hidden_act="gelu",
)

_VISION_NAMES = {
    "cls_token": "embeddings.class_embedding",
    "pos_embed": "embeddings.position_embedding",
    "patch_embed.proj": "embeddings.patch_embedding",
    "norm": "post_layernorm",
}
_VISION_BLOCK = {
    "norm1": "layer_norm1",
    "norm2": "layer_norm2",
    "attn.qkv": "self_attn.qkv",
    "attn.proj": "self_attn.projection",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}


class ImageRewardNetwork(nn.Module):
    """BLIP's image encoder, its text encoder that attends to the picture, and a head on the first token."""

    def __init__(self, vision: BlipVisionConfig = VISION, text: BlipTextConfig = TEXT) -> None:
        super().__init__()
        self.vision: Any = BlipVisionModel(vision)
        self.text: Any = BlipTextModel(text, add_pooling_layer=False)
        self.head = LinearHead(text.hidden_size)

    def forward(self, pixels: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        """Scores [B], standardised as in the original, of pixels [B, 3, H, W] and tokens [B, L]."""
        seen = self.vision(pixel_values=pixels).last_hidden_state
        read = self.text(input_ids=ids, attention_mask=mask, encoder_hidden_states=seen).last_hidden_state
        return (self.head(read[:, 0]) - MEAN) / DEVIATION

    def load_original(self, weights: dict[str, Tensor]) -> None:
        """Takes the original checkpoint's weights. Raises UserError if it lacks any that the network has; what it
        has beyond them (projections of BLIP's pretraining) plays no part in the score."""
        renamed = {new: w for name, w in weights.items() if (new := to_transformers(name))}
        if absent := sorted(self.state_dict().keys() - renamed.keys()):
            raise UserError(f"this is not ImageReward's checkpoint: it lacks {len(absent)} weights, first {absent[0]}")
        self.load_state_dict({name: renamed[name] for name in self.state_dict()})


def to_transformers(name: str) -> str | None:
    """The name here of a weight of the original checkpoint; None for what is not needed."""
    if name.startswith("mlp."):
        return f"head.{name.removeprefix('mlp.')}"
    if name.startswith("blip.text_encoder."):
        return f"text.{name.removeprefix('blip.text_encoder.')}"
    if not name.startswith("blip.visual_encoder."):
        return None
    rest = name.removeprefix("blip.visual_encoder.")
    if block := re.fullmatch(r"blocks\.(\d+)\.(.+)\.(weight|bias)", rest):
        module = _VISION_BLOCK.get(block[2])
        return f"vision.encoder.layers.{block[1]}.{module}.{block[3]}" if module else None
    module, _, kind = rest.rpartition(".") if rest.endswith((".weight", ".bias")) else (rest, "", "")
    return f"vision.{_VISION_NAMES[module]}{'.' + kind if kind else ''}" if module in _VISION_NAMES else None


class ImageReward:
    """ImageReward v1.0, about -2 to 2.

    Args:
        checkpoint: ``ImageReward.pt``; downloaded if None.
        tokenizer: BERT's, hub id or folder.
        network: to load the checkpoint into; the original's sizes if None.
    """

    def __init__(
        self, checkpoint: Path | None = None, tokenizer: str = TOKENIZER, network: ImageRewardNetwork | None = None
    ) -> None:
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.tokenizer: Any = AutoTokenizer.from_pretrained(tokenizer)
        self.network = network or ImageRewardNetwork()
        self.network.load_original(plain_tensors(checkpoint or Path(hf_hub_download(*CHECKPOINT))))
        self.network.eval().requires_grad_(False).to(self.device)
        size = self.network.vision.config.image_size
        self.processor: Any = ImageProcessor(size={"shortest_edge": size}, crop_size={"height": size, "width": size})

    @torch.no_grad()  # a frozen black box
    def __call__(self, images: np.ndarray, prompts: list[str], metadata: list[dict[str, Any]]) -> np.ndarray:
        pixels = self.processor(images=list(images), return_tensors="pt")["pixel_values"]
        tokens = self.tokenizer(
            prompts, padding="max_length", truncation=True, max_length=TEXT_LENGTH, return_tensors="pt"
        )
        parts = (pixels, tokens["input_ids"], tokens["attention_mask"])
        return self.network(*(p.to(self.device) for p in parts)).double().cpu().numpy()
