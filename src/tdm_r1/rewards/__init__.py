"""Rewards: black boxes from a batch of pictures and prompts to one score a sample. Nothing needs a gradient."""

from .registry import BUILT_IN, load_reward
from .scorer import Scorer, ScoringConfig, Watch
from .scores import Reward, Scores

__all__ = ["BUILT_IN", "Reward", "Scorer", "Scores", "ScoringConfig", "Watch", "load_reward"]
