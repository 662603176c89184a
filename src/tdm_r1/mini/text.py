"""The mini world's words: a CLIP tokenizer over its vocabulary and two tiny CLIP text encoders."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor, nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

from .world import WORDS

MAX_TOKENS = 10  # start, eight tokens, end: the longest prompt is 'a sign that says "47"'
T5_TOKENS = 1  # zero tokens in the absent T5's place: pass `max_sequence_length=1` to the pipeline
WIDTH = 64  # of each text encoder; the two together make the joint attention's 128


def build_tokenizer(words: Iterable[str] = WORDS) -> CLIPTokenizer:
    """A CLIP BPE tokenizer in which every one of ``words`` is one token; other words fall to letters."""
    letters = sorted(ByteLevel.alphabet())
    tokens = letters + [f"{c}</w>" for c in letters]
    merges: list[tuple[str, str]] = []
    for word in sorted(set(words)):
        pieces = [*word[:-1], f"{word[-1]}</w>"]
        # merged from the back, so that no two words compete for the same pair of letters
        while len(pieces) > 1:
            pair = (pieces[-2], pieces[-1])
            pieces[-2:] = ["".join(pair)]
            if pair not in merges:
                merges.append(pair)
                tokens.append("".join(pair))
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    vocab = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=MAX_TOKENS)


def build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModelWithProjection:
    """A fresh CLIP text encoder of three layers; SD3 reads its last but one hidden state and its projection."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        projection_dim=WIDTH,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=MAX_TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModelWithProjection(config)


def build_null_t5() -> tuple[T5EncoderModel, T5TokenizerFast]:
    """A T5 of 7,000 parameters whose output is exactly zero: the same as no T5 at all.

    Diffusers loads an SD3 folder without a T5 only if told ``text_encoder_3=None, tokenizer_3=None``; with this one
    it loads without arguments and gives the same pictures.
    """
    tokenizer = T5TokenizerFast(
        vocab=[("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)], extra_ids=0, model_max_length=512
    )
    config = T5Config(
        vocab_size=3, d_model=2 * WIDTH, d_kv=8, d_ff=8, num_layers=1, num_heads=1, pad_token_id=0, eos_token_id=1
    )
    encoder = T5EncoderModel(config)
    nn.init.zeros_(encoder.encoder.final_layer_norm.weight)
    return encoder, tokenizer


def token_ids(tokenizer: CLIPTokenizer, prompts: Sequence[str]) -> Tensor:
    """Token ids [B, MAX_TOKENS], padded as the pipeline pads."""
    batch = tokenizer(list(prompts), padding="max_length", max_length=MAX_TOKENS, truncation=True, return_tensors="pt")
    return batch.input_ids


def encode(encoders: Sequence[CLIPTextModelWithProjection], ids: Tensor) -> tuple[Tensor, Tensor]:
    """What `StableDiffusion3Pipeline.encode_prompt` computes, with gradients: embeddings [B, MAX_TOKENS + 1, 128]
    and pooled embeddings [B, 128]. Used in pretraining alone; a test compares it with the pipeline."""
    outputs = [encoder(ids, output_hidden_states=True) for encoder in encoders]
    embeds = torch.cat([out.hidden_states[-2] for out in outputs], dim=-1)
    zeros = embeds.new_zeros(len(ids), T5_TOKENS, embeds.shape[-1])
    return torch.cat([embeds, zeros], dim=1), torch.cat([out.text_embeds for out in outputs], dim=-1)
