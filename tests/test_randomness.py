"""Generators that depend on their arguments alone."""

import zlib

import numpy as np
import torch

from tdm_r1.core.randomness import Normal, numpy_rng, torch_rng


def test_generators_depend_on_seed_step_and_purpose_alone():
    first = [torch.rand(3, generator=torch_rng(*args)) for args in ((0, 0, "a"), (1, 0, "a"), (0, 1, "a"), (0, 0, "b"))]
    again = torch.rand(3, generator=torch_rng(0, 0, "a"))
    assert torch.equal(first[0], again)
    assert len({tuple(x.tolist()) for x in first}) == 4
    expected = np.random.default_rng([3, 4, zlib.crc32(b"prompts")])
    assert numpy_rng(3, 4, "prompts").integers(2**62) == expected.integers(2**62)
    assert torch_rng(3, 4, "prompts").initial_seed() == int(numpy_rng(3, 4, "prompts").integers(2**62))
    assert torch_rng(3, 4, "prompts").device == torch.device("cpu")


def test_a_samples_noise_depends_on_key_and_number_alone():
    normal = Normal.drawn(torch.Generator().manual_seed(0), (2, 3))
    every = normal.first(6)
    assert every.shape == (6, 2, 3)
    assert every.dtype == torch.float32
    rows = torch.tensor([4, 1])
    assert torch.equal(normal[rows], every[rows])
    assert len(normal[rows[:0]]) == 0
    assert len({tuple(sample.flatten().tolist()) for sample in every}) == 6
    again = torch.Generator().manual_seed(0)
    assert torch.equal(Normal.drawn(again, (2, 3)).first(6), every)
    assert not torch.equal(Normal.drawn(again, (2, 3)).first(6), every)  # its next key


def test_shared_noise_is_that_of_the_group():
    alone, shared = Normal(7, (2,)), Normal(7, (2,), shared=3)
    assert torch.equal(shared.first(6), alone.first(2).repeat_interleave(3, 0))


def test_the_noise_is_normal_and_samples_are_independent():
    noise = Normal(123, (64,)).first(4000).double()
    assert abs(float(noise.mean())) < 4 / 256_000**0.5
    assert abs(float(noise.var()) - 1) < 4 * (2 / 256_000) ** 0.5
    assert abs(float((noise**4).mean()) - 3) < 4 * (96 / 256_000) ** 0.5
    neighbours = (noise[1:] * noise[:-1]).mean()
    assert abs(float(neighbours)) < 4 / 256_000**0.5
