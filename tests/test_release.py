"""The authors' positional checkpoint: names, values, and what is refused."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from diffusers import ZImagePipeline, ZImageTransformer2DModel
from peft import LoraConfig

import tiny_models
from tdm_r1 import cli, release
from tdm_r1.lora_files import lora_settings


@pytest.fixture(scope="module")
def z_image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.z_image(tmp_path_factory.mktemp("release") / "z_image")


def trained(z_image: Path) -> tuple[ZImageTransformer2DModel, list[torch.Tensor]]:
    """A transformer with an adapter of random weights, and those weights as the authors save theirs."""
    transformer = ZImageTransformer2DModel.from_pretrained(z_image / "transformer")
    transformer.requires_grad_(False)
    config = LoraConfig(r=32, lora_alpha=64, init_lora_weights="gaussian", target_modules=list(release.TARGETS))
    transformer.add_adapter(config)
    parameters = [p for p in transformer.parameters() if p.requires_grad]
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in parameters:
            p.copy_(0.1 * torch.randn(p.shape, generator=generator))
    return transformer, [p.detach().clone() for p in parameters]


def test_the_list_becomes_a_lora_that_diffusers_loads(z_image: Path, tmp_path: Path):
    transformer, tensors = trained(z_image)
    torch.save(tensors, tmp_path / "ema.ckpt")
    out = release.convert_release(tmp_path / "ema.ckpt", tmp_path / "lora", architecture=z_image / "transformer")
    settings = lora_settings(out)
    assert (settings.r, settings.lora_alpha) == (32, 32)  # the scale of 2 is in the weights
    pipeline = ZImagePipeline.from_pretrained(z_image)
    pipeline.load_lora_weights(out)
    latent, caption = torch.randn(16, 1, 8, 8), torch.randn(5, transformer.config.cap_feat_dim)
    with torch.no_grad():
        ours, theirs = (
            net([latent], torch.tensor([0.4]), [caption], return_dict=False)[0][0]
            for net in (transformer, pipeline.transformer)
        )
    torch.testing.assert_close(ours, theirs)


def test_the_released_model_has_this_many_tensors():
    """30 blocks and 2 + 2 refiners, four projections each, A and B, at width 3840."""
    config = LoraConfig(r=release.RANK, lora_alpha=release.ALPHA, target_modules=list(release.TARGETS))
    shapes = list(release._adapter_shapes(config, None).values())
    assert len(shapes) == (30 + 2 + 2) * 4 * 2
    assert shapes == [torch.Size(s) for s in ((32, 3840), (3840, 32))] * (34 * 4)


class Malicious:
    def __reduce__(self):
        return os.mkdir, ("broken_into",)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([Malicious()], "refused: it is no pickle of tensors alone"),
        ({"a": torch.zeros(1)}, "holds a dict, expected a list of tensors"),
        ([torch.zeros(1), "text"], "expected a list of tensors"),
        ([torch.zeros(1)], "holds 1 tensors, the adapter of this architecture has"),
    ],
)
def test_anything_else_is_refused(content, message: str, z_image: Path, tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save(content, tmp_path / "bad.ckpt")
    with pytest.raises(ValueError, match=message):
        release.convert_release(tmp_path / "bad.ckpt", tmp_path / "lora", architecture=z_image / "transformer")
    assert [p.name for p in tmp_path.iterdir()] == ["bad.ckpt"]  # nothing was run, nothing was written


def test_a_wrong_shape_is_named(z_image: Path, tmp_path: Path):
    _, tensors = trained(z_image)
    tensors[3] = tensors[3].T.contiguous()
    torch.save(tensors, tmp_path / "ema.ckpt")
    with pytest.raises(ValueError, match=r"tensor 3 is \(32, \d+\), .*lora_B\.weight is"):
        release.convert_release(tmp_path / "ema.ckpt", tmp_path / "lora", architecture=z_image / "transformer")


def test_the_command_says_what_is_wrong(tmp_path: Path, capsys):
    assert cli.main(["import-release", str(tmp_path / "gone.ckpt")]) == 2
    assert "no such file" in capsys.readouterr().err
