"""Rewards on CLIP with small random weights: definitions against independent computations, names, safe loading."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from transformers import CLIPModel

from tdm_r1.errors import UserError
from tdm_r1.rewards.open_clip import to_transformers
from tdm_r1.rewards.preference import Aesthetic, AestheticHead, CLIPScore, HPSv2, PickScore, plain_tensors

IMAGES = np.random.default_rng(0).integers(0, 256, (3, 48, 48, 3), dtype=np.uint8)


def test_clip_rewards_on_a_random_model(clip: str, tmp_path: Path):
    """The definitions, against transformers' own forward."""
    texts = ["a red circle", "two crosses", "a square"]
    cosine = CLIPScore(clip).clip.similarity(IMAGES, texts)
    model = CLIPModel.from_pretrained(clip).eval()
    inner = CLIPScore(clip).clip
    pixels = inner.images(images=list(IMAGES), return_tensors="pt")["pixel_values"]
    length = model.config.text_config.max_position_embeddings
    tokens = inner.texts(texts, padding="max_length", truncation=True, max_length=length, return_tensors="pt")
    with torch.no_grad():
        out = model(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"], pixel_values=pixels)
    logits = out.logits_per_image.diagonal().double().numpy()
    scale = float(model.logit_scale.detach().exp())
    np.testing.assert_allclose(cosine, logits / scale, atol=1e-5)
    np.testing.assert_allclose(PickScore(clip, clip)(IMAGES, texts, [{}] * 3), logits, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(CLIPScore(clip)(IMAGES, texts, [{}] * 3), 2.5 * np.maximum(cosine, 0), atol=1e-6)

    head = AestheticHead(12)
    torch.save(head.state_dict(), tmp_path / "head.pth")
    x = inner.embed_images(list(IMAGES)).numpy().astype(np.float64)
    for name in ("0", "2", "4", "6", "7"):  # the published checkpoint's numbering: linear, no activations
        weight, bias = (head.state_dict()[f"layers.{name}.{kind}"].double().numpy() for kind in ("weight", "bias"))
        x = x @ weight.T + bias
    np.testing.assert_allclose(Aesthetic(clip, tmp_path / "head.pth")(IMAGES, texts, [{}] * 3), x[:, 0], atol=1e-5)


class Evil:
    def __reduce__(self):
        return (print, ("executed",))


@pytest.mark.parametrize("content", [Evil(), [1, 2], {"a": 3}])
def test_nothing_but_tensors_is_loaded(content, tmp_path: Path, capsys):
    torch.save(content, tmp_path / "head.pth")
    with pytest.raises(UserError, match="no plain state dict"):
        plain_tensors(tmp_path / "head.pth")
    assert capsys.readouterr().out == ""


# ------------------------------------------------------------------------------------------ open_clip's names


class Block(nn.Module):
    """A residual block as open_clip has it: torch's own attention, names and all."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.mlp = nn.ModuleDict({"c_fc": nn.Linear(width, hidden), "c_proj": nn.Linear(hidden, width)})

    def forward(self, x, mask=None):
        h = self.ln_1(x)
        x = x + self.attn(h, h, h, attn_mask=mask, need_weights=False)[0]
        h = self.mlp["c_fc"](self.ln_2(x))
        return x + self.mlp["c_proj"](h * torch.sigmoid(1.702 * h))  # quick_gelu, the random model's activation


class Tower(nn.Module):
    def __init__(self, width: int, heads: int, hidden: int, layers: int) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList([Block(width, heads, hidden) for _ in range(layers)])

    def forward(self, x, mask=None):
        for block in self.resblocks:
            x = block(x, mask)
        return x


class Visual(nn.Module):
    def __init__(self, width: int, patch: int, tokens: int, out: int) -> None:
        super().__init__()
        self.class_embedding = nn.Parameter(torch.randn(width))
        self.positional_embedding = nn.Parameter(torch.randn(tokens, width))
        self.proj = nn.Parameter(torch.randn(width, out))
        self.conv1 = nn.Conv2d(3, width, patch, stride=patch, bias=False)
        self.ln_pre, self.ln_post = nn.LayerNorm(width), nn.LayerNorm(width)
        self.transformer = Tower(width, 2, 32, 1)

    def forward(self, pixels):
        x = self.conv1(pixels).flatten(2).mT
        x = torch.cat([self.class_embedding.expand(len(x), 1, -1), x], 1) + self.positional_embedding
        return self.ln_post(self.transformer(self.ln_pre(x))[:, 0]) @ self.proj


class OpenClip(nn.Module):
    """open_clip's CLIP, written anew from its description: an independent reference for names and layouts."""

    def __init__(self, vocabulary: int, length: int) -> None:
        super().__init__()
        self.visual = Visual(16, 8, 17, 12)
        self.transformer = Tower(16, 2, 32, 1)
        self.token_embedding = nn.Embedding(vocabulary, 16)
        self.positional_embedding = nn.Parameter(torch.randn(length, 16))
        self.ln_final = nn.LayerNorm(16)
        self.text_projection = nn.Parameter(torch.randn(16, 12))
        self.logit_scale = nn.Parameter(torch.tensor(2.0))
        self.register_buffer("attn_mask", torch.full((length, length), -torch.inf).triu(1))

    def encode_text(self, ids, end):
        x = self.transformer(self.token_embedding(ids) + self.positional_embedding, self.attn_mask)
        return self.ln_final(x)[torch.arange(len(ids)), end] @ self.text_projection


def test_hps_is_the_open_clip_network_under_other_names(clip: str, tmp_path: Path):
    torch.manual_seed(1)
    inner = CLIPScore(clip).clip
    text = inner.model.config.text_config
    reference = OpenClip(text.vocab_size, text.max_position_embeddings).eval()
    for p in reference.parameters():  # biases of layer norms and attention start at zero: nothing may hide there
        nn.init.normal_(p, std=0.3)
    torch.save({"epoch": 3, "state_dict": reference.state_dict()}, tmp_path / "hps.pt")
    texts = ["a red circle", "two crosses", "a square"]
    pixels = inner.images(images=list(IMAGES), return_tensors="pt")["pixel_values"]
    length = text.max_position_embeddings
    ids = inner.texts(texts, padding="max_length", truncation=True, max_length=length, return_tensors="pt")["input_ids"]
    end = (ids == inner.texts.eos_token_id).int().argmax(-1)
    with torch.no_grad():
        a, b = reference.visual(pixels), reference.encode_text(ids, end)
    expected = nn.functional.cosine_similarity(a, b).double().numpy()
    scores = HPSv2("2.1", clip, tmp_path / "hps.pt")(IMAGES, texts, [{}] * 3)
    np.testing.assert_allclose(scores, expected, atol=1e-5)


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match=r"'visual\.trunk\.blocks' is no weight of open_clip's CLIP"):
        to_transformers({"visual.trunk.blocks": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"'attn\.scale' is no weight of a block"):
        to_transformers({"transformer.resblocks.0.attn.scale": torch.zeros(1)})
