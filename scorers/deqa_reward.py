"""DeQA-Score (You et al. 2025, arXiv 2501.11561) as a scoring server's reward: image quality, 1 to 5, blind to the
prompt. The model's code comes with its weights and is executed: that is what ``trust_remote_code`` says.

Environment and use: scorers/README.md. Not run yet: see there.
"""

import torch
from PIL import Image
from transformers import AutoModelForCausalLM

MODEL = AutoModelForCausalLM.from_pretrained(  # loaded with this file, before the server says that it serves
    "zhiyuanyou/DeQA-Score-Mix3",
    trust_remote_code=True,
    attn_implementation="eager",
    torch_dtype=torch.float16,
    device_map="auto",
)


def deqa(images, prompts, metadata):
    """Scores of pictures, uint8 [B, H, W, 3]."""
    with torch.no_grad():
        return [float(score) for score in MODEL.score([Image.fromarray(image) for image in images])]
