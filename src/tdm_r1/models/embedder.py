"""Text embeddings, computed once for each distinct prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from .protocol import Backbone, Conditioning


@dataclass
class Embedder:
    """Keeps the embeddings of the last ``kept`` prompts in main memory."""

    backbone: Backbone
    kept: int = 2048  # SD3's take 2.7 MB each; more than the prompts of an evaluation
    cache: dict[str, Conditioning] = field(default_factory=dict)

    def __call__(self, prompts: Sequence[str]) -> Conditioning:
        """The conditioning of B prompts where the transformer is; repeated prompts are kept once."""
        found = self.learn(prompts)
        place = {prompt: i for i, prompt in enumerate(found)}
        each = Conditioning.join(list(found.values()))
        device = next(self.backbone.transformer.parameters()).device
        return each.rows(torch.tensor([place[p] for p in prompts])).to(device)

    def learn(self, prompts: Sequence[str]) -> dict[str, Conditioning]:
        """Each distinct prompt's embedding, on the CPU; those that are not known are computed in one call."""
        wanted = dict.fromkeys(prompts)
        absent = [p for p in wanted if p not in self.cache]
        new = self.backbone.encode(absent) if absent else []
        found = {p: self.cache.pop(p) for p in wanted if p in self.cache} | dict(zip(absent, new, strict=True))
        self.cache |= found
        self.kept = max(self.kept, len(found))  # those of an evaluation are wanted again, batch after batch
        for old in list(self.cache)[: -self.kept]:
            del self.cache[old]
        return found
