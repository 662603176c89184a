"""Generators that depend on their arguments alone."""

import zlib

import numpy as np
import torch

from tdm_r1.core.randomness import numpy_rng, torch_rng


def test_generators_depend_on_seed_step_and_purpose_alone():
    first = [torch.rand(3, generator=torch_rng(*args)) for args in ((0, 0, "a"), (1, 0, "a"), (0, 1, "a"), (0, 0, "b"))]
    again = torch.rand(3, generator=torch_rng(0, 0, "a"))
    assert torch.equal(first[0], again)
    assert len({tuple(x.tolist()) for x in first}) == 4
    expected = np.random.default_rng([3, 4, zlib.crc32(b"prompts")])
    assert numpy_rng(3, 4, "prompts").integers(2**62) == expected.integers(2**62)
    assert torch_rng(3, 4, "prompts").initial_seed() == int(numpy_rng(3, 4, "prompts").integers(2**62))
    assert torch_rng(3, 4, "prompts").device == torch.device("cpu")
