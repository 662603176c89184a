"""Z-Image (base and Turbo) through `ZImagePipeline`."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..core import flow
from .pipeline import PipelineBackbone, base_dtype
from .protocol import Conditioning, Velocity


class ZImageBackbone(PipelineBackbone):
    """Its conditioning has ``embeds`` [P, L, D] and ``lengths`` [P]: prompts differ in length.

    The transformer takes lists, counts time from noise to image and gives the velocity with the other sign. Its
    pipeline's ``guidance_scale`` g is our scale 1 + g.
    """

    pipeline_class = "ZImagePipeline"

    def own_resolution(self) -> int:
        return 1024

    def encode_one(self, prompt: str) -> Conditioning:
        (found,), _ = self.pipeline.encode_prompt(
            [prompt],
            device=self.device,
            do_classifier_free_guidance=False,
            max_sequence_length=self.max_sequence_length,
        )
        return Conditioning.of(embeds=found[None], lengths=torch.tensor([len(found)]))

    def velocity_of(self, transformer: nn.Module) -> Velocity:
        dtype = base_dtype(transformer)

        def velocity(x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
            embeds = conditioning["embeds"].to(dtype)
            captions = [e[:n] for e, n in zip(embeds, conditioning["lengths"].tolist(), strict=True)]
            latents = x_t.to(dtype).unsqueeze(2)  # one frame
            t_from_noise = (1000 - flow.timestep(t).to(torch.float32)) / 1000  # as the pipeline rounds it
            out = transformer(list(latents.unbind(0)), t_from_noise, captions, return_dict=False)[0]
            return -flow.widen(torch.stack(list(out))).squeeze(2)

        return velocity
