"""The authors' checkpoints, whose tensors have no names: names, values, and what is refused."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import SD3Transformer2DModel, ZImageTransformer2DModel
from peft import LoraConfig
from safetensors.torch import load_file

import tiny_models
from tdm_r1 import cli
from tdm_r1.models import release
from tdm_r1.models.lora_files import FILE, read_lora


@pytest.fixture(scope="module")
def sizes(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Mapping[str, Any]]:
    folder = tmp_path_factory.mktemp("release")
    z_image = ZImageTransformer2DModel.load_config(tiny_models.z_image(folder / "z_image") / "transformer")
    sd35 = SD3Transformer2DModel.load_config(tiny_models.sd3(folder / "sd35", dual=True) / "transformer")
    plain = {"z_image": z_image, "sd35_medium": sd35}
    return {name: {k: v for k, v in found.items() if not k.startswith("_")} for name, found in plain.items()}


def trained(of: release.Release, sizes: Mapping[str, Mapping[str, Any]]) -> tuple[torch.nn.Module, list[torch.Tensor]]:
    """A transformer with an adapter of random weights, and those weights as the authors save theirs."""
    torch.manual_seed(1)
    transformer = of.transformer(**sizes[of.architecture])
    transformer.requires_grad_(False)
    config = LoraConfig(r=32, lora_alpha=64, init_lora_weights="gaussian", target_modules=list(of.targets))
    transformer.add_adapter(config)
    parameters = [p for p in transformer.parameters() if p.requires_grad]
    with torch.no_grad():
        for p in parameters:
            p.copy_(0.1 * torch.randn(p.shape))
    return transformer, [p.detach().clone() for p in parameters]


@pytest.mark.parametrize("of", release.RELEASES, ids=["z_image", "sd35_medium"])
@pytest.mark.parametrize("wrap", [lambda ts: {"ema_parameters": ts, "decay": 0.9}, list], ids=["dict", "list"])
def test_the_list_becomes_a_lora_that_diffusers_loads(of: release.Release, wrap, sizes, tmp_path: Path):
    transformer, tensors = trained(of, sizes)
    torch.save(wrap(tensors), tmp_path / "ema.ckpt")
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "notes.txt").write_text("mine")
    out = release.convert_release(tmp_path / "ema.ckpt", tmp_path / "lora", sizes=sizes)
    assert (out / "notes.txt").read_text() == "mine"
    settings = read_lora(out).config
    assert (settings.r, settings.lora_alpha) == (32, 32)  # the scale of 2 is in the weights
    plain = of.transformer(**sizes[of.architecture])
    base = {n.replace(".base_layer", ""): w for n, w in transformer.state_dict().items() if "lora_" not in n}
    plain.load_state_dict(base)
    state, metadata = of.pipeline.lora_state_dict(out, return_lora_metadata=True)
    of.pipeline.load_lora_into_transformer(state, transformer=plain, metadata=metadata)
    with torch.no_grad():
        ours, theirs = (_run(net, sizes[of.architecture]) for net in (transformer, plain))
    torch.testing.assert_close(ours, theirs)
    assert any("attn2" in name for name in dict(transformer.named_modules())) == (of is release.SD35_MEDIUM)
    assert not any("attn2" in name for name in load_file(out / FILE))


def _run(net: torch.nn.Module, own: Mapping[str, Any]) -> torch.Tensor:
    g = torch.Generator().manual_seed(2)
    if isinstance(net, ZImageTransformer2DModel):
        latent, caption = torch.randn(16, 1, 8, 8, generator=g), torch.randn(5, own["cap_feat_dim"], generator=g)
        return net([latent], torch.tensor([0.4]), [caption], return_dict=False)[0][0]
    return net(
        hidden_states=torch.randn(1, 16, 8, 8, generator=g),
        timestep=torch.tensor([400.0]),
        encoder_hidden_states=torch.randn(1, 5, own["joint_attention_dim"], generator=g),
        pooled_projections=torch.randn(1, own["pooled_projection_dim"], generator=g),
        return_dict=False,
    )[0]


def test_the_released_models_have_these_many_tensors():
    """Z-Image: 30 blocks and 2 + 2 refiners, four projections each. SD3.5-Medium: 24 blocks of eight, the last of
    which has no output for the text. A and B each."""
    shapes = list(release.Z_IMAGE.adapter_shapes().values())
    assert shapes == [torch.Size(s) for s in ((32, 3840), (3840, 32))] * ((30 + 2 + 2) * 4)
    shapes = list(release.SD35_MEDIUM.adapter_shapes().values())
    assert shapes == [torch.Size(s) for s in ((32, 1536), (1536, 32))] * (24 * 8 - 1)


class Malicious:
    def __reduce__(self):
        return os.mkdir, ("broken_into",)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([Malicious()], "refused: it is no pickle of tensors alone"),
        ({"ema_parameters": [Malicious()]}, "refused: it is no pickle of tensors alone"),
        ({"a": torch.zeros(1)}, "it is a dict of a; expected 'ema_parameters'"),
        ({"ema_parameters": {}}, "holds a dict, expected a list of tensors"),
        ([torch.zeros(1), "text"], "expected a list of tensors"),
        ([torch.zeros(1)], r"holds 1 tensors; TDM-R1 for Z-Image has \d+, TDM for SD3\.5-Medium has \d+"),
    ],
)
def test_anything_else_is_refused(content, message: str, sizes, tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save(content, tmp_path / "bad.ckpt")
    with pytest.raises(ValueError, match=message):
        release.convert_release(tmp_path / "bad.ckpt", tmp_path / "lora", sizes=sizes)
    assert [p.name for p in tmp_path.iterdir()] == ["bad.ckpt"]  # nothing was run, nothing was written


def test_a_wrong_shape_is_named(sizes, tmp_path: Path):
    _, tensors = trained(release.Z_IMAGE, sizes)
    tensors[3] = tensors[3].T.contiguous()
    torch.save(tensors, tmp_path / "ema.ckpt")
    with pytest.raises(ValueError, match=r"tensor 3 is \(32, \d+\), .*lora_B\.weight is"):
        release.convert_release(tmp_path / "ema.ckpt", tmp_path / "lora", sizes=sizes)


def test_the_command_says_what_is_wrong(tmp_path: Path, capsys):
    assert cli.main(["import-release", str(tmp_path / "gone.ckpt")]) == 2
    assert "no such file" in capsys.readouterr().err
