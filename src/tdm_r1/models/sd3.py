"""Stable Diffusion 3 and 3.5, and the mini models, through `StableDiffusion3Pipeline`."""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor, nn

from ..core import flow
from .pipeline import PipelineBackbone, base_dtype, quiet
from .protocol import Conditioning, Velocity


class SD3Backbone(PipelineBackbone):
    """Its conditioning has ``embeds`` [P, L, D] and ``pooled`` [P, D']."""

    pipeline_class = "StableDiffusion3Pipeline"

    def own_resolution(self) -> int:
        return self.pipeline.transformer.config.sample_size * self.pipeline.vae_scale_factor

    @classmethod
    def without_t5(cls) -> dict[str, None]:
        return {"text_encoder_3": None, "tokenizer_3": None}

    def encode_one(self, prompt: str) -> Conditioning:
        # with one T5 token T5 is not read at all: that the prompt was cut to it is no news
        with quiet() if self.max_sequence_length == 1 else nullcontext():
            embeds, _, pooled, _ = self.pipeline.encode_prompt(
                prompt=[prompt],
                prompt_2=None,
                prompt_3=None,
                device=self.device,
                do_classifier_free_guidance=False,
                max_sequence_length=self.max_sequence_length,
            )
        return Conditioning.of(embeds=embeds, pooled=pooled)

    def velocity_of(self, transformer: nn.Module) -> Velocity:
        dtype = base_dtype(transformer)

        def velocity(x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
            v = transformer(
                hidden_states=x_t.to(dtype),
                timestep=flow.timestep(t).to(torch.float32),
                encoder_hidden_states=conditioning["embeds"].to(dtype),
                pooled_projections=conditioning["pooled"].to(dtype),
                return_dict=False,
            )[0]
            return flow.widen(v)

        return velocity
