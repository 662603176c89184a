"""A small frozen network whose features the held-out Frechet distance and diversity are measured in.

It is trained on renders alone, to tell what each picture holds, and never sees a generated picture. Training of
generators never sees it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from scipy import linalg
from torch import Tensor, nn

from . import signs
from .signs import DIGITS, Sign
from .world import COLORS, SHAPES, Scene
from .worlds import world_of

FEATURES = 48
KINDS = (*SHAPES, *DIGITS)
_GRID = 4  # the picture is asked about in 4 x 4 cells


class FeatureNet(nn.Module):
    """uint8 pictures [B, 64, 64, 3] to features [B, 48]; `logits` tells kind and colour of each cell.

    Args:
        kinds: how many of `KINDS` it tells apart: the shapes, or the digits too.
    """

    def __init__(self, kinds: int = len(SHAPES)) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 24, 5, stride=2, padding=2),
            nn.ReLU(),
            nn.Conv2d(24, 32, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(32, 48, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(48, FEATURES, 3, stride=2, padding=1),
            nn.ReLU(),
        )
        self.head = nn.Conv2d(FEATURES, kinds + len(COLORS) + 1, 1)

    def maps(self, images: np.ndarray) -> Tensor:
        x = torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).float() / 127.5 - 1
        return self.body(x)

    def logits(self, images: np.ndarray) -> Tensor:
        return self.head(self.maps(images))

    @torch.no_grad()  # a frozen yardstick
    def forward(self, images: np.ndarray) -> Tensor:
        """Features pooled over the picture, [B, 48]: what is there and how it is drawn, wherever it stands."""
        return torch.cat([self.maps(chunk).mean((2, 3)) for chunk in np.array_split(images, -(-len(images) // 256))])

    @torch.no_grad()  # a frozen yardstick
    def layout(self, images: np.ndarray) -> Tensor:
        """Features with their place, [B, 48 * 16]: for diversity."""
        return torch.cat([self.maps(c).flatten(1) for c in np.array_split(images, -(-len(images) // 256))])


def _targets(scene: Scene | Sign, kinds: int) -> np.ndarray:
    cells = np.zeros((kinds + len(COLORS) + 1, _GRID, _GRID), dtype=np.float32)
    for mark in scene.marks:
        i, j = int(mark.y / 16), int(mark.x / 16)
        cells[KINDS.index(mark.kind), i, j] = 1
        cells[kinds + list(COLORS).index(mark.color), i, j] = 1
    cells[-1] = scene.ground / 255
    return cells


def train_features(
    tags: Sequence[str],
    *,
    seed: int,
    steps: int = 800,
    batch_size: int = 64,
    on_step: Callable[[int, float], None],
) -> FeatureNet:
    """A network trained on fresh renders of the families ``tags``."""
    torch.manual_seed(seed)
    kinds = len(KINDS) if signs.TASK in tags else len(SHAPES)
    net = FeatureNet(kinds)
    optimizer = torch.optim.AdamW(net.parameters(), lr=2e-3)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * (1 - step / steps)
        rng = np.random.default_rng([seed, 21, step])
        drawn = [tags[i] for i in rng.integers(len(tags), size=batch_size)]
        worlds = [world_of(tag) for tag in drawn]
        scenes = [w.make_scene(w.make_spec(tag, rng), rng) for w, tag in zip(worlds, drawn, strict=True)]
        logits = net.logits(np.stack([w.render(s) for w, s in zip(worlds, scenes, strict=True)]))
        targets = torch.from_numpy(np.stack([_targets(s, kinds) for s in scenes]))
        loss = F.binary_cross_entropy_with_logits(logits[:, :-1], targets[:, :-1])
        loss = loss + (logits[:, -1].sigmoid() - targets[:, -1]).square().mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        on_step(step, float(loss.detach()))
    return net.eval()


def save_features(net: FeatureNet, path: Path) -> None:
    save_file({k: v.half() for k, v in net.state_dict().items()}, path)


def load_features(path: Path) -> FeatureNet:
    state = load_file(path)
    net = FeatureNet(len(state["head.bias"]) - len(COLORS) - 1)
    net.load_state_dict({k: v.float() for k, v in state.items()})
    return net.eval().requires_grad_(False)


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """Frechet distance between Gaussians fitted to two feature sets [N, D] (arXiv 1706.08500)."""
    x, y = a.double().numpy(), b.double().numpy()
    cov_x, cov_y = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    # tr sqrt(AB) from the symmetric form: the eigenvalues of A^(1/2) B A^(1/2) are real and non-negative
    root = linalg.sqrtm(cov_x + 1e-9 * np.eye(len(cov_x)))
    cross = np.sqrt(np.clip(linalg.eigvalsh(np.real(root) @ cov_y @ np.real(root)), 0, None)).sum()
    return float(((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(cov_x) + np.trace(cov_y) - 2 * cross)
