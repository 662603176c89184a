"""A small frozen network whose features the held-out Frechet distance and diversity are measured in.

It is trained on renders alone, to tell what each picture holds, and never sees a generated picture. Training of
generators never sees it.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from scipy import linalg
from torch import Tensor, nn

from .world import COLORS, SHAPES, TASKS, Scene, make_scene, make_spec, render

FEATURES = 48
_GRID = 4  # the picture is asked about in 4 x 4 cells


class FeatureNet(nn.Module):
    """uint8 pictures [B, 64, 64, 3] to features [B, 48]; `logits` tells shape and colour of each cell."""

    def __init__(self) -> None:
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
        self.head = nn.Conv2d(FEATURES, len(SHAPES) + len(COLORS) + 1, 1)

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


def _targets(scene: Scene) -> np.ndarray:
    cells = np.zeros((len(SHAPES) + len(COLORS) + 1, _GRID, _GRID), dtype=np.float32)
    for o in scene.objects:
        i, j = int(o.y / 16), int(o.x / 16)
        cells[SHAPES.index(o.shape), i, j] = 1
        cells[len(SHAPES) + list(COLORS).index(o.color), i, j] = 1
    cells[-1] = scene.ground / 255
    return cells


def train_features(*, seed: int, steps: int = 800, batch_size: int = 64, on_step: Callable[[int, float], None]):
    """Trains the network on fresh renders; returns it."""
    torch.manual_seed(seed)
    net = FeatureNet()
    optimizer = torch.optim.AdamW(net.parameters(), lr=2e-3)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * (1 - step / steps)
        rng = np.random.default_rng([seed, 21, step])
        scenes = [make_scene(make_spec(TASKS[i], rng), rng) for i in rng.integers(len(TASKS), size=batch_size)]
        logits = net.logits(np.stack([render(s) for s in scenes]))
        targets = torch.from_numpy(np.stack([_targets(s) for s in scenes]))
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
    net = FeatureNet()
    net.load_state_dict({k: v.float() for k, v in load_file(path).items()})
    return net.eval().requires_grad_(False)


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """Frechet distance between Gaussians fitted to two feature sets [N, D] (arXiv 1706.08500)."""
    x, y = a.double().numpy(), b.double().numpy()
    cov_x, cov_y = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    # tr sqrt(AB) from the symmetric form: the eigenvalues of A^(1/2) B A^(1/2) are real and non-negative
    root = linalg.sqrtm(cov_x + 1e-9 * np.eye(len(cov_x)))
    cross = np.sqrt(np.clip(linalg.eigvalsh(np.real(root) @ cov_y @ np.real(root)), 0, None)).sum()
    return float(((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(cov_x) + np.trace(cov_y) - 2 * cross)
