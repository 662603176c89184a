"""Grids of pictures: each shown so that people can see it."""

from __future__ import annotations

import numpy as np

from tdm_r1.evaluate.pictures import grid


def test_grids_show_small_pictures_exactly_and_large_ones_readably():
    rng = np.random.default_rng(0)
    small = rng.integers(0, 256, (2, 32, 32, 3), dtype=np.uint8)
    shown = np.asarray(grid([("a", small)], ["x", "y"]))
    assert (shown[46 : 46 + 96, 96 : 96 + 96] == small[0].repeat(3, 0).repeat(3, 1)).all()
    large = np.full((1, 512, 512, 3), 0, np.uint8)
    large[:, ::2] = 255  # lines of one pixel: half as bright from afar, not gone
    shown = np.asarray(grid([("a", large)], ["x"]))
    assert shown.shape[1] == 96 + 256 + 4
    assert 100 < shown[60:250, 110:340].mean() < 155
