"""Small random pipelines of the real models' own classes: SD3, SD3.5 (dual attention, QK-norm), Z-Image."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3Model,
    T5Config,
    T5EncoderModel,
)

from tdm_r1.mini import text

TEMPLATE = "{% for m in messages %}<{{ m.role }}> {{ m.content }} {% endfor %}<think>"
WIDTH = 16  # of every text encoder but T5
T5_WIDTH = 40  # SD3 pads the CLIP embeddings to it


def sd3(folder: Path, *, seed: int = 0, dual: bool = False) -> Path:
    """``dual`` makes it one of SD3.5-Medium's kind: a first layer with a second attention, and QK-norm."""
    torch.manual_seed(seed)
    clip_tokenizer = text.build_tokenizer()
    clip = {
        "vocab_size": len(clip_tokenizer),
        "hidden_size": WIDTH,
        "intermediate_size": 32,
        "projection_dim": WIDTH,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": text.MAX_TOKENS,
        "eos_token_id": clip_tokenizer.eos_token_id,
        "pad_token_id": clip_tokenizer.pad_token_id,
    }
    t5 = T5Config(vocab_size=64, d_model=T5_WIDTH, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    transformer = SD3Transformer2DModel(
        sample_size=8,
        in_channels=16,
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=16,
        joint_attention_dim=T5_WIDTH,
        caption_projection_dim=32,
        pooled_projection_dim=2 * WIDTH,
        out_channels=16,
        pos_embed_max_size=16,
        qk_norm="rms_norm" if dual else None,
        dual_attention_layers=(0,) if dual else (),
    )
    pipeline = StableDiffusion3Pipeline(
        transformer=_stirred(transformer),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=_autoencoder(),
        text_encoder=CLIPTextModelWithProjection(CLIPTextConfig(**clip)),
        tokenizer=clip_tokenizer,
        text_encoder_2=CLIPTextModelWithProjection(CLIPTextConfig(**clip)),
        tokenizer_2=clip_tokenizer,
        text_encoder_3=T5EncoderModel(t5),
        tokenizer_3=letters_tokenizer(),
    )
    return _saved(pipeline, folder)


def z_image(folder: Path, *, seed: int = 0) -> Path:
    torch.manual_seed(seed)
    transformer = ZImageTransformer2DModel(
        in_channels=16,
        dim=64,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=24,
        axes_dims=[8, 12, 12],
        axes_lens=[128, 32, 32],
    )
    qwen = Qwen3Config(
        vocab_size=64,
        hidden_size=24,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=12,
    )
    tokenizer = letters_tokenizer()
    tokenizer.chat_template = TEMPLATE
    pipeline = ZImagePipeline(
        transformer=_stirred(transformer),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=_autoencoder(),
        text_encoder=Qwen3Model(qwen),
        tokenizer=tokenizer,
    )
    return _saved(pipeline, folder)


def pipeline_pictures(folder: Path, prompts: Sequence[str], x_1: torch.Tensor, guidance: float) -> np.ndarray:
    """diffusers' own pictures in four steps at shift 3 from noise ``x_1`` [B, C, h, w], in [0, 1]; ``guidance`` 1 is
    none."""
    pipeline = DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    side = 8 * x_1.shape[-1]
    return pipeline(
        list(prompts),  # Z-Image's pipeline writes into the list that it is given
        height=side,
        width=side,
        num_inference_steps=4,
        sigmas=[1.0, 0.75, 0.5, 0.25],  # the scheduler shifts them
        guidance_scale=guidance - 1 if isinstance(pipeline, ZImagePipeline) else guidance,  # Z-Image counts from 0
        max_sequence_length=48,
        latents=x_1.clone(),
        output_type="np",
    ).images


def _saved(pipeline: Any, folder: Path) -> Path:
    pipeline.save_pretrained(folder)
    return folder


def _autoencoder() -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(4, 4, 4, 4),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=16,
        norm_num_groups=2,
        layers_per_block=1,
        scaling_factor=1.5,
        shift_factor=0.06,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def letters_tokenizer(length: int = 64) -> PreTrainedTokenizerFast:
    """Words to numbers by what they are made of: every letter a token. Cuts at ``length``."""
    letters = ["<pad>", "</s>", "<unk>", *"abcdefghijklmnopqrstuvwxyz <>"]
    tokenizer = Tokenizer(models.WordLevel({letter: i for i, letter in enumerate(letters)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=length
    )


def _stirred(module: torch.nn.Module) -> torch.nn.Module:
    """No weight zero, so that every path carries signal and gradient."""
    with torch.no_grad():
        for p in module.parameters():
            if float(p.abs().max()) == 0 or p.ndim == 1:
                p.add_(0.05 * torch.randn_like(p))
    return module
