"""HPSv3 (Ma et al. 2025, arXiv 2508.03789) as a scoring server's reward: the mean mu of its predicted score.

Environment and use: scorers/README.md. Not run yet: see there.
"""

from functools import lru_cache

from PIL import Image


@lru_cache(maxsize=1)
def _model():
    from hpsv3 import HPSv3RewardInferencer

    return HPSv3RewardInferencer(device="cuda")


def hpsv3(images, prompts, metadata):
    """Scores of pictures, uint8 [B, H, W, 3]."""
    import torch

    with torch.no_grad():
        rewards = _model().reward(prompts=prompts, image_paths=[Image.fromarray(image) for image in images])
    return [float(reward[0]) for reward in rewards]  # (mu, sigma) of each
