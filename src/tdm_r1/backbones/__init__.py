"""Backbones: text-to-image flow models behind one protocol, ``velocity(x_t, t, conditioning)``."""

from .pipelines import BACKBONES, PipelineBackbone, SD3Backbone, ZImageBackbone, load_backbone
from .protocol import Backbone, Conditioning, Velocity, guided, in_parts

__all__ = [
    "BACKBONES",
    "Backbone",
    "Conditioning",
    "PipelineBackbone",
    "SD3Backbone",
    "Velocity",
    "ZImageBackbone",
    "guided",
    "in_parts",
    "load_backbone",
]
