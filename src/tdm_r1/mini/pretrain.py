"""Pretrains a mini base model: velocity matching on latents of scenes with noisy captions."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderTiny, SD3Transformer2DModel
from pydantic import Field
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..core import flow
from ..settings import Settings
from ..train.checkpoint import load_state, save_state
from . import autoencoder, text
from .worlds import modules_of, noisy_spec, picture, prompt_of, world_of

EMPTY = ""  # the caption of classifier-free guidance's unconditional half


class PretrainConfig(Settings):
    """How the base is pretrained. Ours, started from a prototype's values (docs/notes)."""

    steps: int = 3600
    batch_size: int = 256
    pool_size: int = 100_000  # scenes whose latents are computed once; captions get fresh noise at every visit
    muon_learning_rate: float = 4e-3  # on the blocks' matrices, update scaled by .2 sqrt(max dim)
    adam_learning_rate: float = 2e-3  # on everything else
    warmup_steps: int = 50
    decay_share: float = 0.35  # the last share of the steps, in which the rate falls to zero: worth ten points
    ema_decay: float = 0.998
    caption_dropout: float = 0.1
    time_shift: float = 2.0  # logit-normal t, shifted towards noise
    save_every: int = 250
    # relations and binding are learnt last, so they are seen most
    task_weights: dict[str, float] = Field(
        {
            "single_object": 0.06,
            "two_object": 0.18,
            "counting": 0.20,
            "colors": 0.10,
            "position": 0.24,
            "color_attr": 0.22,
        }
    )

    @property
    def tags(self) -> tuple[str, ...]:
        """The families that are seen."""
        return tuple(tag for tag, weight in self.task_weights.items() if weight > 0)

    def draw_specs(self, n: int, rng: np.random.Generator) -> list[dict]:
        """Specs of the families in their proportions."""
        weights = np.array([self.task_weights[tag] for tag in self.tags])
        drawn = [self.tags[i] for i in rng.choice(len(self.tags), p=weights / weights.sum(), size=n)]
        return [world_of(tag).make_spec(tag, rng) for tag in drawn]


def build_transformer(layers: int = 6) -> SD3Transformer2DModel:
    """A fresh `SD3Transformer2DModel` of 3.5 M parameters over 16 image tokens, gates and output starting at zero."""
    model = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=autoencoder.LATENT_CHANNELS,
        out_channels=autoencoder.LATENT_CHANNELS,
        num_layers=layers,
        num_attention_heads=4,
        attention_head_dim=32,
        joint_attention_dim=2 * text.WIDTH,
        caption_projection_dim=128,
        pooled_projection_dim=2 * text.WIDTH,
        pos_embed_max_size=8,
        qk_norm="rms_norm",
    )
    for block in model.transformer_blocks:
        for norm in (block.norm1, block.norm1_context):
            nn.init.zeros_(norm.linear.weight)
            nn.init.zeros_(norm.linear.bias)
    for linear in (model.norm_out.linear, model.proj_out):
        nn.init.zeros_(linear.weight)
        nn.init.zeros_(linear.bias)
    return model


class MiniBase(nn.Module):
    """The parts of the base that pretraining trains, as one module."""

    def __init__(self, vocabulary: text.CLIPTokenizer, *, layers: int = 6) -> None:
        super().__init__()
        self.transformer = build_transformer(layers)
        self.encoders = nn.ModuleList(text.build_text_encoder(vocabulary) for _ in range(2))


def scene_pool(config: PretrainConfig, vae: AutoencoderTiny, path: Path, seed: int, on_chunk: Callable[[int], None]):
    """The training scenes: their specs, and their latents [N, 8, 8, 8] (float16, cached at ``path``)."""
    specs = config.draw_specs(config.pool_size, np.random.default_rng([seed, 11]))
    if path.exists():
        return specs, load_file(path)["latents"]
    chunks = []
    for start in range(0, len(specs), 1000):
        images = [
            picture(specs[i], np.random.default_rng([seed, 12, i])) for i in range(start, min(start + 1000, len(specs)))
        ]
        chunks.append(autoencoder.encode(vae, np.stack(images)).half())
        on_chunk(min(start + 1000, len(specs)))
    latents = torch.cat(chunks)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({"latents": latents}, path)
    return specs, latents


def pretrain(
    model: MiniBase,
    tokenizer: text.CLIPTokenizer,
    specs: list[dict],
    latents: Tensor,
    config: PretrainConfig,
    *,
    seed: int,
    compiled: bool,
    checkpoint: Path,
    on_step: Callable[[int, float], None],
) -> dict[str, Tensor]:
    """Trains ``model``, resuming from ``checkpoint`` if it exists; returns its state with averaged weights."""
    prompts = [EMPTY, *(w.prompt_of(s) for w in modules_of(config.tags) for s in w.all_specs())]
    index = {p: i for i, p in enumerate(prompts)}
    ids = text.token_ids(tokenizer, prompts)
    optimizers = _optimizers(model, config)
    ema = {name: p.detach().clone() for name, p in model.named_parameters()}
    start = 0
    if checkpoint.exists():
        saved = load_state(checkpoint)
        model.load_state_dict(saved["model"])
        ema = saved["ema"]
        for optimizer, state in zip(optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        start = saved["step"]
    velocity = torch.compile(model.transformer) if compiled else model.transformer

    for step in range(start, config.steps):
        rng = np.random.default_rng([seed, 13, step])
        noise = torch.Generator().manual_seed(int(rng.integers(2**62)))
        rows = rng.integers(len(specs), size=config.batch_size)
        captions = [
            0 if rng.random() < config.caption_dropout else index[prompt_of(noisy_spec(specs[i], rng))] for i in rows
        ]
        embeds, pooled = text.encode(list(model.encoders), ids[torch.tensor(captions)])

        x_0 = latents[torch.from_numpy(rows)].float()
        eps = torch.randn(x_0.shape, generator=noise)
        t = flow.logit_normal(config.batch_size, shift=config.time_shift, generator=noise)
        x_t = flow.add_noise(x_0, eps, t)
        v = velocity(
            hidden_states=x_t,
            encoder_hidden_states=embeds,
            pooled_projections=pooled,
            timestep=flow.timestep(t),
            return_dict=False,
        )[0]
        loss = (v - (eps - x_0)).square().mean()
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * _rate(step, config)
            optimizer.step()
        decay = min(config.ema_decay, (1 + step) / (10 + step))
        with torch.no_grad():  # the average is never trained
            torch._foreach_lerp_(list(ema.values()), [p.detach() for p in model.parameters()], 1 - decay)
        done = step + 1
        if done % config.save_every == 0 or done == config.steps:
            state = {"optimizers": [o.state_dict() for o in optimizers], "step": done}
            save_state(checkpoint, {"model": model.state_dict(), "ema": ema, **state})
        on_step(step, float(loss.detach()))
    return model.state_dict() | ema  # buffers are not averaged


def _optimizers(model: nn.Module, config: PretrainConfig) -> list[torch.optim.Optimizer]:
    """Muon on the blocks' matrices, AdamW on everything else; ``peak`` is each group's rate before `_rate`."""
    matrices = [p for n, p in model.named_parameters() if "transformer_blocks" in n and p.ndim == 2]
    known = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in known]
    muon = torch.optim.Muon(matrices, weight_decay=0.0, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    adam = torch.optim.AdamW(others, betas=(0.9, 0.99), weight_decay=0.0)
    muon.param_groups[0]["peak"] = config.muon_learning_rate
    adam.param_groups[0]["peak"] = config.adam_learning_rate
    return [muon, adam]


def _rate(step: int, config: PretrainConfig) -> float:
    """The share of the peak learning rate: warm-up, constant, final linear decay."""
    left = (config.steps - step) / (config.decay_share * config.steps)
    return min((step + 1) / config.warmup_steps, left, 1.0)
