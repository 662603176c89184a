"""HPSv3 (Ma et al. 2025, arXiv 2508.03789) as a scoring server's reward: the mean mu of its predicted score.

Environment and use: scorers/README.md. Not run yet: see there.
"""

import torch
from hpsv3 import HPSv3RewardInferencer
from PIL import Image

MODEL = HPSv3RewardInferencer(device="cuda")  # loaded with this file, before the server says that it serves


def hpsv3(images, prompts, metadata):
    """Scores of pictures, uint8 [B, H, W, 3]."""
    with torch.no_grad():
        rewards = MODEL.reward(prompts=prompts, image_paths=[Image.fromarray(image) for image in images])
    return [float(reward[0]) for reward in rewards]  # (mu, sigma) of each
