"""open_clip checkpoints as transformers' CLIPModel: the same network under other names, so that open_clip (and the
torchvision that it needs) is not needed."""

from __future__ import annotations

import re

import torch
from torch import Tensor

_BLOCK = {  # inside a residual block; attention's in_proj is cut in three beside it
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
_REST = {
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
    "logit_scale": "logit_scale",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",  # transformers' own spelling
    "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "visual.ln_post.weight": "vision_model.post_layernorm.weight",
    "visual.ln_post.bias": "vision_model.post_layernorm.bias",
}
_PROJECTIONS = {"text_projection": "text_projection.weight", "visual.proj": "visual_projection.weight"}
_BUFFERS = ("attn_mask",)  # saved by open_clip, made anew by transformers


def to_transformers(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state dict of open_clip's CLIP with ViT, under the names of transformers' `CLIPModel`.

    Raises ValueError on unknown names.
    """
    out: dict[str, Tensor] = {}
    for name, w in weights.items():
        if name in _REST:
            out[_REST[name]] = w
        elif name in _PROJECTIONS:  # a matrix that open_clip multiplies from the right
            out[_PROJECTIONS[name]] = w.T.contiguous()
        elif block := re.fullmatch(r"(visual\.)?transformer\.resblocks\.(\d+)\.(.+)", name):
            tower = "vision_model" if block[1] else "text_model"
            out |= _block_weights(f"{tower}.encoder.layers.{block[2]}", block[3], w)
        elif name not in _BUFFERS:
            raise ValueError(f"{name!r} is no weight of open_clip's CLIP")
    return out


def _block_weights(layer: str, name: str, w: Tensor) -> dict[str, Tensor]:
    module, _, kind = name.replace("in_proj_", "in_proj.").rpartition(".")
    if module == "attn.in_proj":
        parts = zip("qkv", torch.chunk(w, 3), strict=True)
        return {f"{layer}.self_attn.{letter}_proj.{kind}": part.contiguous() for letter, part in parts}
    if module not in _BLOCK:
        raise ValueError(f"{name!r} is no weight of a block of open_clip's CLIP")
    return {f"{layer}.{_BLOCK[module]}.{kind}": w}
