"""LoRA files as people have them: whatever peft and diffusers wrote loads at the strength that they load it at."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from tdm_r1 import cli
from tdm_r1.models.create import create_roles
from tdm_r1.models.lora_files import FILE, PEFT_FILE, adapter_for, load_lora, lora_digest, read_lora
from tdm_r1.models.pipeline import load_backbone
from tdm_r1.models.protocol import Conditioning
from tdm_r1.models.specification import Role, RoleSpec

TARGETS = ["to_q", "to_v", "to_out.0"]
SETTINGS = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "alpha_pattern": {"alpha_pattern": {"transformer_blocks.1.attn.to_q": 32, "to_v": 2}},
    "rank_pattern": {"rank_pattern": {r"transformer_blocks\.[01]\.attn\.to_q": 2}, "alpha_pattern": {"to_q": 3}},
    "rslora and patterns": {"use_rslora": True, "rank_pattern": {"to_out.0": 8}, "alpha_pattern": {"to_v": 7}},
}


def written(random_model: Path, folder: Path, **settings) -> None:
    """A LoRA of random weights, as diffusers saves it and as peft does."""
    config = LoraConfig(r=4, lora_alpha=8, init_lora_weights="gaussian", target_modules=TARGETS, **settings)
    plain = SD3Transformer2DModel.from_pretrained(random_model / "transformer")
    torch.manual_seed(0)
    with_peft = get_peft_model(plain, config)
    with torch.no_grad():
        for name, p in with_peft.named_parameters():
            if "lora_" in name:
                p.copy_(0.1 * torch.randn_like(p))
    with_peft.save_pretrained(folder / "peft")
    weights = load_file(folder / "peft" / PEFT_FILE)
    StableDiffusion3Pipeline.save_lora_weights(
        folder / "diffusers",
        transformer_lora_layers={n.removeprefix("base_model.model."): w for n, w in weights.items()},
        transformer_lora_adapter_metadata=config.to_dict(),
    )


def output(random_model: Path, lora: Path | None, *, ours: bool) -> torch.Tensor:
    """The velocity on fixed inputs, of our adapter or of plain diffusers with the LoRA loaded."""
    backbone = load_backbone(str(random_model), max_sequence_length=1, dtype=torch.float32, device="cpu")
    g = torch.Generator().manual_seed(0)
    x = torch.randn(2, *backbone.latent_shape, generator=g)
    c = Conditioning.join(backbone.encode(["a red circle", "two crosses"]))
    with torch.no_grad():
        if not ours:
            if lora is not None:
                backbone.pipeline.load_lora_weights(lora)
            return backbone.velocity_of(backbone.transformer)(x, torch.full((2,), 0.6), c)
        settings = adapter_for([read_lora(lora)])
        roles = create_roles([RoleSpec(Role.GENERATOR)], backbone, settings)
        load_lora(roles, (Role.GENERATOR,), lora, settings)
        with roles.use(Role.GENERATOR) as velocity:
            return velocity(x, torch.full((2,), 0.6), c)


@pytest.mark.parametrize("name", SETTINGS)
def test_strengths_are_those_of_diffusers(name: str, random_model: Path, tmp_path: Path):
    written(random_model, tmp_path, **SETTINGS[name])
    expected = output(random_model, tmp_path / "diffusers", ours=False)
    assert (expected - output(random_model, None, ours=False)).abs().max() > 0.003
    for form in ("diffusers", "peft"):
        torch.testing.assert_close(output(random_model, tmp_path / form, ours=True), expected, atol=1e-5, rtol=1e-4)


def test_patterns_are_read_by_module(random_model: Path, tmp_path: Path):
    written(random_model, tmp_path, **SETTINGS["rslora and patterns"])
    lora = read_lora(tmp_path / "diffusers")
    assert lora.rank == 8
    assert lora.scale("transformer_blocks.0.attn.to_q") == 8 / 2
    assert lora.scale("transformer_blocks.0.attn.to_v") == 7 / 2
    assert lora.scale("transformer_blocks.0.attn.to_out.0") == pytest.approx(8 / math.sqrt(8))


@pytest.mark.parametrize(
    ("setting", "value"),
    [("use_dora", True), ("bias", "all"), ("lora_bias", True), ("modules_to_save", ["proj_out"]), ("from_2030", 1)],
)
def test_settings_that_change_what_is_computed_are_refused_by_name(setting, value, random_model: Path, tmp_path: Path):
    written(random_model, tmp_path)
    file = tmp_path / "peft" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {setting: value}))
    with pytest.raises(ValueError, match=f"was made with {setting} = .*not supported"):
        read_lora(tmp_path / "peft")
    file.write_text(json.dumps(json.loads(file.read_text()) | {setting: None, "init_lora_weights": "pissa_niter_4"}))
    with pytest.raises(ValueError, match=r"pissa_niter_4.*changes the base's weights"):
        read_lora(tmp_path / "peft")


@pytest.mark.parametrize(("text", "message"), [('{"r": ', "are no JSON"), ("[]", "are a list")])
def test_settings_that_are_damaged_name_their_file(text: str, message: str, random_model: Path, tmp_path: Path):
    written(random_model, tmp_path)
    (tmp_path / "peft" / "adapter_config.json").write_text(text)
    with pytest.raises(ValueError, match=rf"adapter_config\.json: the LoRA's settings {message}"):
        read_lora(tmp_path / "peft")


@pytest.mark.parametrize("factor", [0.5, 2])
def test_a_lora_of_another_width_is_refused(factor: float, random_model: Path, tmp_path: Path):
    """A narrower one, too: it would fit into a corner of the matrices."""
    written(random_model, tmp_path)
    file = tmp_path / "peft" / PEFT_FILE
    weights = load_file(file)
    name = next(n for n in weights if "lora_A" in n)
    wide = weights[name].repeat(1, 2)[:, : int(factor * weights[name].shape[1])]
    save_file(weights | {name: wide.contiguous()}, file)
    with pytest.raises(ValueError, match=rf"of another model: .* has width {wide.shape[1]}, here it is"):
        output(random_model, tmp_path / "peft", ours=True)


def test_a_lora_that_lacks_a_matrix_is_refused(random_model: Path, tmp_path: Path):
    written(random_model, tmp_path)
    file = tmp_path / "peft" / PEFT_FILE
    weights = load_file(file)
    del weights[next(n for n in weights if "lora_B" in n)]
    save_file(weights, file)
    with pytest.raises(ValueError, match=r"lacks one of the two matrices of transformer_blocks\.\d.*download it again"):
        read_lora(tmp_path / "peft")


def test_other_names_are_named(random_model: Path, tmp_path: Path):
    written(random_model, tmp_path)
    weights = load_file(tmp_path / "diffusers" / FILE)
    save_file({"lora_unet_x.lora_down.weight": torch.zeros(4, 4)}, tmp_path / "kohya.safetensors")
    save_file(weights | {"text_encoder.q.alpha": torch.ones(1)}, tmp_path / "text.safetensors")
    for name, key in (("kohya", "lora_down"), ("text", "text_encoder.q.alpha")):
        with pytest.raises(ValueError, match=f"{key}.*with diffusers' names"):
            read_lora(tmp_path / f"{name}.safetensors", strength=1.0)


def test_files_that_are_no_weights_say_what_they_are(random_model: Path, tmp_path: Path, capsys):
    """In one line, wherever a LoRA is named."""
    written(random_model, tmp_path)
    whole = (tmp_path / "diffusers" / FILE).read_bytes()
    contents = {
        "truncated": (whole[:2000], "no whole safetensors file"),
        "half": (whole[: len(whole) // 2], "no whole safetensors file"),
        "lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "Git LFS pointer"),
        "html": (b"<html>404</html>", "no whole safetensors file"),
    }
    for name, (content, message) in contents.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / FILE).write_bytes(content)
        with pytest.raises(ValueError, match=message):
            lora_digest(tmp_path / name)
        model = ["--model", str(random_model), "--max-sequence-length", "1"]
        assert cli.main(["sample", "--prompt", "a cross", *model, "--lora", str(tmp_path / name)]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
    (tmp_path / "adapter_model.bin").write_bytes(b"")
    with pytest.raises(ValueError, match="may be a pickle"):
        read_lora(tmp_path / "adapter_model.bin")
