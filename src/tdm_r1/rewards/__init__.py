"""Rewards: black boxes from a batch of pictures and prompts to one score a sample. Nothing needs a gradient."""

from .registry import BUILT_IN, Reward, load_reward, score

__all__ = ["BUILT_IN", "Reward", "load_reward", "score"]
