"""Rewards on CLIP with small random weights: definitions against independent computations, names, safe loading."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from transformers import BlipTextConfig, BlipVisionConfig, CLIPModel

from tdm_r1.errors import UserError
from tdm_r1.rewards.clip import fitted
from tdm_r1.rewards.image_reward import ImageReward, ImageRewardNetwork
from tdm_r1.rewards.open_clip import to_transformers
from tdm_r1.rewards.preference import Aesthetic, CLIPScore, HPSv2, LinearHead, PickScore, plain_tensors

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

    head = LinearHead(12)
    torch.save(head.state_dict(), tmp_path / "head.pth")
    x = inner.embed_images(list(IMAGES)).cpu().numpy().astype(np.float64)
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


def test_hps_sees_the_whole_picture():
    """As open_clip's ResizeMaxSize: the longest side fits, black fills the rest."""
    wide = Image.fromarray(np.full((20, 80, 3), 200, np.uint8))
    square = np.asarray(fitted(wide, 40))
    assert square.shape == (40, 40, 3)
    assert (square[15:25] == 200).all()
    assert (square[:15] == 0).all()
    assert (square[25:] == 0).all()


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match=r"'visual\.trunk\.blocks' is no weight of open_clip's CLIP"):
        to_transformers({"visual.trunk.blocks": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"'attn\.scale' is no weight of a block"):
        to_transformers({"transformer.resblocks.0.attn.scale": torch.zeros(1)})


# ------------------------------------------------------------------------------------------ ImageReward's names


class OriginalVision(nn.Module):
    """BLIP's ViT, written anew from its description, with the original's names."""

    class Block(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
            self.attn = nn.ModuleDict({"qkv": nn.Linear(width, 3 * width), "proj": nn.Linear(width, width)})
            self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, 32), "fc2": nn.Linear(32, width)})

        def forward(self, x):
            x = x + self.attn["proj"](attend(*self.attn["qkv"](self.norm1(x)).chunk(3, -1)))
            return x + self.mlp["fc2"](nn.functional.gelu(self.mlp["fc1"](self.norm2(x))))

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 17, width))
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, width, 8, stride=8)})
        self.blocks = nn.ModuleList([self.Block(width), self.Block(width)])
        self.norm = nn.LayerNorm(width, eps=1e-6)

    def forward(self, pixels):
        x = self.patch_embed["proj"](pixels).flatten(2).mT
        x = torch.cat([self.cls_token.expand(len(x), 1, -1), x], 1) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


def attend(q, k, v, mask=None, heads: int = 2):
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    return nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)


class OriginalAttention(nn.Module):
    """BERT's attention with its output, residual and norm; keys and values may come from elsewhere."""

    def __init__(self, width: int, source: int) -> None:
        super().__init__()
        sizes = {"query": width, "key": source, "value": source}
        self.add_module("self", nn.ModuleDict({n: nn.Linear(size, width) for n, size in sizes.items()}))
        self.output = nn.ModuleDict({"dense": nn.Linear(width, width), "LayerNorm": nn.LayerNorm(width, eps=1e-12)})

    def forward(self, x, source, mask=None):
        own = self.self
        h = attend(own["query"](x), own["key"](source), own["value"](source), mask)
        return self.output["LayerNorm"](x + self.output["dense"](h))


class OriginalText(nn.Module):
    """BLIP's BERT with cross-attention, with the original's names."""

    class Layer(nn.Module):
        def __init__(self, width: int, source: int) -> None:
            super().__init__()
            self.attention = OriginalAttention(width, width)
            self.crossattention = OriginalAttention(width, source)
            self.intermediate = nn.ModuleDict({"dense": nn.Linear(width, 32)})
            norm = nn.LayerNorm(width, eps=1e-12)
            self.output = nn.ModuleDict({"dense": nn.Linear(32, width), "LayerNorm": norm})

        def forward(self, x, seen, mask):
            x = self.crossattention(self.attention(x, x, mask), seen)
            h = self.output["dense"](nn.functional.gelu(self.intermediate["dense"](x)))
            return self.output["LayerNorm"](x + h)

    def __init__(self, vocabulary: int, width: int = 12, source: int = 16) -> None:
        super().__init__()
        words, places = nn.Embedding(vocabulary, width), nn.Embedding(40, width)
        norm = nn.LayerNorm(width, eps=1e-12)
        self.embeddings = nn.ModuleDict({"word_embeddings": words, "position_embeddings": places, "LayerNorm": norm})
        layers = nn.ModuleList([self.Layer(width, source), self.Layer(width, source)])
        self.encoder = nn.ModuleDict({"layer": layers})

    def forward(self, ids, mask, seen):
        e = self.embeddings
        x = e["LayerNorm"](e["word_embeddings"](ids) + e["position_embeddings"].weight[: ids.shape[1]])
        for layer in self.encoder["layer"]:
            x = layer(x, seen, mask[:, None, None, :].bool())
        return x


def test_image_reward_is_the_original_network_under_other_names(clip: str, tmp_path: Path):
    torch.manual_seed(2)
    vocabulary = CLIPModel.from_pretrained(clip).config.text_config.vocab_size
    blip = nn.ModuleDict({"visual_encoder": OriginalVision(), "text_encoder": OriginalText(vocabulary)})
    original = nn.ModuleDict({"blip": blip, "mlp": LinearHead(12)}).eval()
    for p in original.parameters():
        nn.init.normal_(p, std=0.3)
    surplus = {
        "blip.vision_proj.weight": torch.zeros(2, 2),
        "blip.text_encoder.embeddings.position_ids": torch.zeros(1),
    }
    torch.save(original.state_dict() | surplus, tmp_path / "ImageReward.pt")

    def network() -> ImageRewardNetwork:
        size = {"intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
        return ImageRewardNetwork(
            BlipVisionConfig(hidden_size=16, image_size=32, patch_size=8, layer_norm_eps=1e-6, **size),
            BlipTextConfig(
                hidden_size=12,
                encoder_hidden_size=16,
                vocab_size=vocabulary,
                max_position_embeddings=40,
                is_decoder=True,
                **size,
            ),
        )

    texts = ["a red circle", "two crosses", "a square"]
    reward = ImageReward(tmp_path / "ImageReward.pt", clip, network())
    pixels = reward.processor(images=list(IMAGES), return_tensors="pt")["pixel_values"]
    tokens = reward.tokenizer(texts, padding="max_length", truncation=True, max_length=35, return_tensors="pt")
    with torch.no_grad():
        read = blip["text_encoder"](tokens["input_ids"], tokens["attention_mask"], blip["visual_encoder"](pixels))
        expected = (original["mlp"](read[:, 0]) - 0.16717362830052426) / 1.0333394966054072  # the original's
    np.testing.assert_allclose(reward(IMAGES, texts, [{}] * 3), expected.double().numpy(), rtol=1e-4, atol=1e-4)

    torch.save({k: v for k, v in original.state_dict().items() if "blocks.1.mlp.fc2" not in k}, tmp_path / "part.pt")
    with pytest.raises(UserError, match=r"lacks 2 weights, first vision\.encoder\.layers\.1\.mlp\.fc2\.bias"):
        ImageReward(tmp_path / "part.pt", clip, network())
