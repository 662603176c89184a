"""Whole iterations of TDM-R1 on small random models of the real classes, and their LoRAs in plain diffusers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from safetensors.torch import load_file, save_file

import tiny_models
from tdm_r1 import cli
from tdm_r1.algorithms.rollout import roll_out
from tdm_r1.config.load import load_recipe
from tdm_r1.config.run import RunConfig, dump
from tdm_r1.models.load import load_backbones
from tdm_r1.models.lora_files import FILE
from tdm_r1.models.pipeline import load_backbone
from tdm_r1.models.settings import LORA_TARGETS, ModelConfig
from tdm_r1.models.specification import Role
from tdm_r1.train.run import Run

pytestmark = pytest.mark.slow

MOVING = (Role.GENERATOR, Role.FAKE, Role.SURROGATE, Role.GENERATOR_EMA, Role.SURROGATE_EMA)
PROMPTS = ["a red circle", "two crosses"]


def sd3(folder: Path) -> dict:
    return {"path": str(tiny_models.sd3(folder / "sd3"))}


def sd35_with_another_teacher(folder: Path) -> dict:
    """A Turbo checkpoint under the student, its base as teacher."""
    student = tiny_models.sd3(folder / "turbo", seed=1, dual=True)
    return {"path": str(student), "teacher": str(tiny_models.sd3(folder / "base", seed=2, dual=True))}


def z_image(folder: Path) -> dict:
    return {"path": str(tiny_models.z_image(folder / "z_image"))}


Make = Callable[[Path], dict]
MODELS: list[Make] = [sd3, sd35_with_another_teacher, z_image]


def left_brightness(images, prompts, metadata):
    return images[:, :, :16].mean((1, 2, 3)) / 255.0


def tiny_run(make: Make, folder: Path, **model: object) -> Run:
    folder.mkdir(exist_ok=True)
    (folder / "prompts.txt").write_text("\n".join(PROMPTS))
    values = load_recipe("mini").model_dump()
    values |= {"iterations": 2, "output": folder, "name": "run"}
    values["model"] |= {
        "student_lora": None,
        "merge": False,
        "max_sequence_length": 48,
        "resolution": 32,
        "lora": {"rank": 4, "alpha": 8, "targets": LORA_TARGETS},
        **make(folder),
        **model,
    }
    values["task"] = {"name": "prompts", "prompts": folder / "prompts.txt"}
    values["batch"] = {"prompts": 2, "group": 3, "micro_batch": 6}
    values["surrogate"] |= {"weights": "lora"}
    values["evaluation"] |= {"every": 0, "prompts": 2, "images_per_prompt": 1, "grid_prompts": 0}
    return Run(RunConfig.model_validate(values), reward=left_brightness)


def never_asked(name: str) -> bool:
    """SD3's last block drops what its text tokens would answer."""
    return name.startswith("transformer_blocks.1.attn.add_q_proj")


@pytest.mark.parametrize("make", MODELS)
def test_every_role_learns_and_nothing_else_moves(make: Make, tmp_path: Path):
    run = tiny_run(make, tmp_path)
    before = {role: run.roles.state(role) for role in MOVING}
    hosts = {id(run.roles.transformer(r)): run.roles.transformer(r) for r in (Role.TEACHER, Role.GENERATOR)}
    assert len(hosts) == (2 if make is sd35_with_another_teacher else 1)
    frozen = [(p, p.detach().clone()) for h in hosts.values() for n, p in h.named_parameters() if "lora" not in n]
    metrics = run.step()
    assert all(np.isfinite(v) for k, v in metrics.items() if k != "surrogate/direction_cosine")
    run.step()  # in the first, B is zero and A has no gradient
    for role, start in before.items():
        still = {name for name, p in run.roles.state(role).items() if torch.equal(p, start[name])}
        assert still == {name for name in start if never_asked(name)}, role
    assert all(torch.equal(p, old) for p, old in frozen)


@pytest.mark.parametrize("make", MODELS)
def test_gradient_checkpointing_changes_no_gradient(make: Make, tmp_path: Path):
    """Under every switch of roles: recomputation has to run through the adapter that was active in the forward."""
    plain, again = (tiny_run(make, tmp_path / str(on), gradient_checkpointing=on) for on in (False, True))
    for run in (plain, again):
        run.step()
        run.step()
    for role in MOVING:
        for name, p in plain.roles.state(role).items():
            torch.testing.assert_close(again.roles.state(role)[name], p, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("make", MODELS)
def test_bfloat16_backbones_carry_float32_roles(make: Make, tmp_path: Path):
    """Small updates vanish in bfloat16: what is trained and averaged is float32."""
    run = tiny_run(make, tmp_path, dtype="bfloat16", gradient_checkpointing=True)
    assert {p.dtype for p in run.roles.parameters(Role.GENERATOR)} == {torch.float32}
    before = {role: run.roles.state(role) for role in MOVING}
    run.step()
    run.step()
    for role, start in before.items():
        moved = [name for name, p in run.roles.state(role).items() if not torch.equal(p, start[name])]
        assert {name for name in start if not never_asked(name)} == set(moved), role
    hosts = [run.roles.transformer(r) for r in (Role.TEACHER, Role.GENERATOR)]
    assert all(p.dtype == torch.bfloat16 for h in hosts for n, p in h.named_parameters() if "lora_" not in n)


def test_offloaded_parts_come_for_their_work_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    run = tiny_run(sd3, tmp_path, offload=True, device="cpu")
    moves: list[tuple[str, str]] = []
    inner = torch.nn.Module.to

    def to(module: torch.nn.Module, *args: object, **kwargs: object) -> torch.nn.Module:
        if args and isinstance(args[0], str):
            moves.append((type(module).__name__, args[0]))
        return inner(module, *args, **kwargs)

    monkeypatch.setattr(torch.nn.Module, "to", to)
    run.backbone.offload_from = "cpu:0"  # the only device here, by another name
    weights = [p.data_ptr() for e in run.backbone._text_encoders() for p in e.parameters()]
    run.embed(["a red circle", "two crosses", "a square", "two crosses"])  # the second was known: once for the others
    encoders = ["CLIPTextModelWithProjection", "CLIPTextModelWithProjection", "T5EncoderModel"]
    assert moves == [(e, "cpu:0") for e in encoders] + [(e, "cpu") for e in encoders]
    assert [p.data_ptr() for e in run.backbone._text_encoders() for p in e.parameters()] == weights
    moves.clear()
    run.embed(["two crosses", "a square"])
    assert moves == []
    run.backbone.decode(torch.zeros(1, *run.backbone.latent_shape))
    assert moves == [("AutoencoderKL", "cpu:0"), ("AutoencoderKL", "cpu")]


def test_a_teacher_is_its_transformer_alone(tmp_path: Path):
    """Its folder need not even hold the rest."""
    model = sd35_with_another_teacher(tmp_path)
    for part in ("text_encoder", "text_encoder_2", "text_encoder_3", "vae"):
        shutil.rmtree(tmp_path / "base" / part)
    student, teacher = load_backbones(ModelConfig(**model))
    assert teacher is not None
    assert teacher.pipeline.text_encoder_3 is student.pipeline.text_encoder_3
    assert teacher.pipeline.vae is student.pipeline.vae
    a, b = (dict(x.transformer.named_parameters()) for x in (student, teacher))
    assert any(not torch.equal(a[name], b[name]) for name in a)


def test_sd3_without_t5_is_the_pipeline_without_it(tmp_path: Path):
    folder = tiny_models.sd3(tmp_path / "sd3")
    backbone = load_backbone(str(folder), max_sequence_length=48, dtype=torch.float32, device="cpu", t5=False)
    assert len(backbone._text_encoders()) == 2
    pipeline = DiffusionPipeline.from_pretrained(folder, text_encoder_3=None, tokenizer_3=None)
    embeds, _, pooled, _ = pipeline.encode_prompt(
        PROMPTS[0], None, None, do_classifier_free_guidance=False, max_sequence_length=48
    )
    (found,) = backbone.encode(PROMPTS[:1])
    torch.testing.assert_close(found["embeds"], embeds, atol=0, rtol=0)
    torch.testing.assert_close(found["pooled"], pooled, atol=0, rtol=0)
    with pytest.raises(ValueError, match="ZImagePipeline has no T5"):
        load_backbone(
            str(tiny_models.z_image(tmp_path / "z")),
            max_sequence_length=48,
            dtype=torch.float32,
            device="cpu",
            t5=False,
        )


def test_published_loras_are_sampled_and_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """By `tdm-r1 sample` and `eval`, at the strength behind the @, with the solver and size that they were made for."""
    monkeypatch.chdir(tmp_path)
    run = tiny_run(sd3, tmp_path, dtype="bfloat16", device="cpu")
    with torch.no_grad():
        for p in run.roles.parameters(Role.GENERATOR_EMA):
            p.add_(0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    run.export(tmp_path)
    (tmp_path / "foreign").mkdir()
    save_file(load_file(tmp_path / "lora" / FILE), tmp_path / "foreign" / "tdm.safetensors")
    shared = ["--model", run.config.model.path, "--resolution", "48", "--solver", "dpm", "--dtype", "bfloat16"]
    arguments = ["sample", *shared, "--offload", "--prompt", "a red circle", "--images", "1"]
    assert cli.main([*arguments, "--lora", "foreign"]) == 2
    pictures = []
    for strength in ("0.125", "1"):
        assert cli.main([*arguments, "--lora", f"foreign@{strength}", "--out", f"{strength}.png"]) == 0
        pictures.append(np.asarray(Image.open(f"{strength}.png")))
    assert pictures[0].shape == (48, 48, 3)
    assert (pictures[0] != pictures[1]).any()
    recipe = run.config.override({"reward": "jpeg_compressibility", "model.resolution": 32})
    (tmp_path / "recipe.yaml").write_text(dump(recipe))
    compared = ["eval", "recipe.yaml", "--base-steps", "0", "--out", "eval", "--lora", "foreign@0.125", "foreign@1"]
    assert cli.main(compared) == 0
    models = json.loads((tmp_path / "eval/results.json").read_text())["models"]
    assert [m["model"] for m in models] == ["foreign@0.125", "foreign@1"]
    compared = [np.asarray(Image.open(f"eval/pictures/foreign_{s}/000000.png")) for s in ("0_125", "1")]
    assert (compared[0] != compared[1]).any()


def test_a_published_strength_is_what_diffusers_does_with_it(tmp_path: Path):
    """TDM-SD3's LoRA is meant for 0.125, and a foreign file has no metadata: alpha is then its rank."""
    run = tiny_run(sd3, tmp_path, device="cpu")
    with torch.no_grad():
        for p in run.roles.parameters(Role.GENERATOR_EMA):
            p.add_(0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    run.export(tmp_path)
    foreign = tmp_path / "foreign" / "tdm.safetensors"
    foreign.parent.mkdir()
    save_file(load_file(tmp_path / "lora" / "pytorch_lora_weights.safetensors"), foreign)
    with pytest.raises(ValueError, match=r"has no adapter metadata.*model\.student_lora_scale"):
        tiny_run(sd3, tmp_path / "a", student_lora=str(foreign.parent))
    wide = {"rank": 8, "alpha": 8, "targets": LORA_TARGETS}  # the file holds what was carried too
    start = tiny_run(
        sd3, tmp_path / "b", student_lora=str(foreign.parent), student_lora_scale=0.125, lora=wide, device="cpu"
    )
    pipeline = DiffusionPipeline.from_pretrained(start.config.model.path)
    pipeline.load_lora_weights(foreign.parent, adapter_name="tdm", weight_name=foreign.name)
    pipeline.set_adapters(["tdm"], [0.125])
    c, x, t = start.embed(PROMPTS), torch.randn(2, *start.backbone.latent_shape), torch.full((2,), 0.6)
    with torch.no_grad(), start.roles.use(Role.GENERATOR) as velocity:
        expected = start.backbone.velocity_of(pipeline.transformer)(x, t, c)
        torch.testing.assert_close(velocity(x, t, c), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("make", MODELS)
def test_plain_diffusers_samples_the_trained_lora(make: Make, tmp_path: Path):
    run = tiny_run(make, tmp_path, device="cpu")
    with torch.no_grad():  # a LoRA whose effect shows
        for p in run.roles.parameters(Role.GENERATOR_EMA):
            p.add_(0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    run.export(tmp_path)
    pipeline = DiffusionPipeline.from_pretrained(run.config.model.path)
    pipeline.set_progress_bar_config(disable=True)
    x_1 = torch.randn(2, *run.backbone.latent_shape, generator=torch.Generator().manual_seed(0))

    def plain() -> np.ndarray:
        return pipeline(
            list(PROMPTS),  # Z-Image's pipeline writes into the list that it is given
            height=32,
            width=32,
            num_inference_steps=4,
            sigmas=[1.0, 0.75, 0.5, 0.25],
            guidance_scale=0.0 if make is z_image else 1.0,
            max_sequence_length=48,
            latents=x_1.clone(),
            output_type="np",
        ).images

    base = plain()
    pipeline.load_lora_weights(tmp_path / "lora")
    tuned = plain()
    with torch.no_grad():
        c = run.embed(PROMPTS)
        latents = roll_out(
            run.roles, Role.GENERATOR_EMA, c, x_1, run.config.sampler, None, micro_batch=2
        ).trajectory.final
    assert np.abs(tuned - base).max() > 0.02  # the LoRA does something
    assert np.abs(run.backbone.decode(latents) / 255.0 - tuned).max() <= 0.51 / 255


# Layers of a block that ComfyUI finds by diffusers' names, and the fused matrix that q, k and v are rows of there
# (mmdit_to_diffusers and z_image_to_diffusers in its comfy/utils.py, read in November 2026)
FUSED = {
    "attn.to_q": "x_block.attn.qkv",
    "attn.to_k": "x_block.attn.qkv",
    "attn.to_v": "x_block.attn.qkv",
    "attn.add_q_proj": "context_block.attn.qkv",
    "attn.add_k_proj": "context_block.attn.qkv",
    "attn.add_v_proj": "context_block.attn.qkv",
    "attn2.to_q": "x_block.attn2.qkv",
    "attn2.to_k": "x_block.attn2.qkv",
    "attn2.to_v": "x_block.attn2.qkv",
    "attention.to_q": "attention.qkv",
    "attention.to_k": "attention.qkv",
    "attention.to_v": "attention.qkv",
}
ALONE = {"attn.to_out.0", "attn.to_add_out", "attn2.to_out.0", "attention.to_out.0"}
PLACES = ("q", "k", "v")  # from the top of the fused matrix


@pytest.mark.parametrize("make", MODELS)
def test_the_trained_lora_works_in_comfyuis_layout(make: Make, tmp_path: Path):
    """What ComfyUI does with a file in diffusers' names: B A is added at scale 1 to the rows of its own, fused, matrix
    that the name stands for."""
    run = tiny_run(make, tmp_path, device="cpu")
    with torch.no_grad():
        for p in run.roles.parameters(Role.GENERATOR_EMA):
            p.add_(0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    run.export(tmp_path)
    file = load_file(tmp_path / "lora" / "pytorch_lora_weights.safetensors")
    assert not any(name.endswith("alpha") for name in file)
    pipeline = DiffusionPipeline.from_pretrained(run.config.model.path)
    layers = dict(pipeline.transformer.named_parameters())
    fused: dict[tuple[str, str], torch.Tensor] = {}
    with torch.no_grad():
        for name in (n for n in file if n.endswith("lora_B.weight")):
            block, layer = _block_and_layer(name.removeprefix("transformer.").removesuffix(".lora_B.weight"))
            change = file[name] @ file[name.replace("lora_B", "lora_A")]
            if layer in ALONE:
                layers[f"{block}.{layer}.weight"] += change
                continue
            parts = [other for other in FUSED if FUSED[other] == FUSED[layer]]  # q, k, v in this order
            key = (block, FUSED[layer])
            if key not in fused:
                fused[key] = torch.cat([layers[f"{block}.{part}.weight"] for part in parts])
            size = len(fused[key]) // 3
            row = size * next(i for i, place in enumerate(PLACES) if f"_{place}" in layer)
            fused[key][row : row + size] += change
        for (block, matrix), weight in fused.items():
            parts = [other for other in FUSED if FUSED[other] == matrix]
            for part, rows in zip(parts, weight.chunk(3), strict=True):
                layers[f"{block}.{part}.weight"].copy_(rows)
        c, x = run.embed(PROMPTS), torch.randn(2, *run.backbone.latent_shape)
        plain = run.backbone.velocity_of(pipeline.transformer)(x, torch.full((2,), 0.6), c)
        with run.roles.use(Role.GENERATOR_EMA) as velocity:
            torch.testing.assert_close(velocity(x, torch.full((2,), 0.6), c), plain, atol=1e-4, rtol=1e-4)


def _block_and_layer(name: str) -> tuple[str, str]:
    """``transformer_blocks.0.attn.to_q`` as the block and the layer in it; a layer that ComfyUI does not know fails."""
    layer = max((known for known in (*FUSED, *ALONE) if name.endswith(f".{known}")), key=len)
    return name.removesuffix(f".{layer}"), layer
