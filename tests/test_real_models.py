"""Whole iterations of TDM-R1 on small random models of the real classes, and their LoRAs in plain diffusers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file

import tiny_models
from tdm_r1.algorithms.tdm import few_step_sample
from tdm_r1.config import LORA_TARGETS, RunConfig, load_recipe
from tdm_r1.roles import TRAINED, Role
from tdm_r1.trainer import Run

AVERAGES = (Role.GENERATOR_EMA, Role.SURROGATE_EMA)
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


def tiny_run(make: Make, folder: Path) -> Run:
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
    before = {role: run.roles.state(role) for role in (*TRAINED, *AVERAGES)}
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
def test_plain_diffusers_samples_the_trained_lora(make: Make, tmp_path: Path):
    run = tiny_run(make, tmp_path)
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
        latents = few_step_sample(run.roles, Role.GENERATOR_EMA, c, x_1, run.config.sampler, None).final
    assert np.abs(tuned - base).max() > 0.02  # the LoRA does something
    assert np.abs(run.backbone.decode(latents) / 255.0 - tuned).max() <= 0.51 / 255


@pytest.mark.parametrize("make", MODELS)
def test_the_trained_lora_needs_no_metadata(make: Make, tmp_path: Path):
    """What ComfyUI does with a file in diffusers' names: B A is added to the layer that the name names, at scale 1."""
    run = tiny_run(make, tmp_path)
    with torch.no_grad():
        for p in run.roles.parameters(Role.GENERATOR_EMA):
            p.add_(0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    run.export(tmp_path)
    file = load_file(tmp_path / "lora" / "pytorch_lora_weights.safetensors")
    assert not any(name.endswith("alpha") for name in file)
    pipeline = DiffusionPipeline.from_pretrained(run.config.model.path)
    layers = dict(pipeline.transformer.named_parameters())
    with torch.no_grad():
        for name in (n for n in file if n.endswith("lora_B.weight")):
            assert name.startswith("transformer.")
            layer = name.removeprefix("transformer.").replace("lora_B.weight", "weight")
            layers[layer] += file[name] @ file[name.replace("lora_B", "lora_A")]
        c, x = run.embed(PROMPTS), torch.randn(2, *run.backbone.latent_shape)
        plain = run.backbone.velocity_of(pipeline.transformer)(x, torch.full((2,), 0.6), c)
        with run.roles.use(Role.GENERATOR_EMA) as velocity:
            torch.testing.assert_close(velocity(x, torch.full((2,), 0.6), c), plain, atol=1e-4, rtol=1e-4)
