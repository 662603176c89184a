"""Backbones against diffusers' own pipelines: the same image from the same noise, prompts and sigmas."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, DPMSolverMultistepScheduler
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
from peft import LoraConfig

import tiny_models
from tdm_r1.evaluate.evaluation import Sampling, generate
from tdm_r1.evaluate.sampling import FewStepModel
from tdm_r1.mini.bundle import STUDENT_LORA, bundle_path
from tdm_r1.models import pipeline as pipeline_module
from tdm_r1.models.create import create_roles
from tdm_r1.models.embedder import Embedder
from tdm_r1.models.pipeline import PipelineBackbone, load_backbone
from tdm_r1.models.protocol import Conditioning
from tdm_r1.models.specification import Role

PROMPTS = ["a red circle left of a blue square", "two crosses"]
MODELS: dict[str, Callable[[Path], Path]] = {
    "sd3": tiny_models.sd3,
    "sd35": lambda folder: tiny_models.sd3(folder, dual=True),
    "z_image": tiny_models.z_image,
}


@pytest.fixture(scope="session", params=MODELS)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    return request.param, MODELS[request.param](tmp_path_factory.mktemp("tiny") / request.param)


def load(folder: Path, resolution: int = 64) -> PipelineBackbone:
    return load_backbone(str(folder), max_sequence_length=48, dtype=torch.float32, device="cpu", resolution=resolution)


@pytest.mark.parametrize("apart", [False, True])
def test_a_transformer_that_is_to_be_spread_stays_in_main_memory(apart: bool, model: tuple[str, Path]):
    backbone = load_backbone(str(model[1]), max_sequence_length=48, dtype=torch.float32, device="meta", apart=apart)
    assert backbone.device.type == ("cpu" if apart else "meta")
    others = [
        m for n, m in backbone.pipeline.components.items() if n != "transformer" and isinstance(m, torch.nn.Module)
    ]
    assert {p.device.type for module in others for p in module.parameters()} == {"meta"}


@pytest.mark.parametrize("guidance", [1.0, 2.5])
@pytest.mark.parametrize("resolution", [64, 96])
def test_the_same_image_as_the_pipeline(model: tuple[str, Path], guidance: float, resolution: int):
    folder = model[1]
    backbone = load(folder, resolution)
    x_1 = torch.randn(2, *backbone.latent_shape, generator=torch.Generator().manual_seed(0))
    expected = tiny_models.pipeline_pictures(folder, PROMPTS, x_1, guidance)
    embed = Embedder(backbone)
    sampling = Sampling(Role.TEACHER, steps=4, shift=3.0, guidance=guidance)
    roles = create_roles((), backbone, LoraConfig())
    ours = generate(backbone, roles, sampling, embed, PROMPTS, x_1, batch=2, seed=0)
    assert ours.shape == (2, resolution, resolution, 3)
    assert np.abs(ours / 255.0 - expected).max() <= 0.51 / 255  # half a level: the rounding to 8 bits
    other = generate(
        backbone, create_roles((), backbone, LoraConfig()), sampling, embed, PROMPTS[::-1], x_1, batch=2, seed=0
    )
    assert (other != ours).any()  # the prompt plays a part


def test_velocity_does_not_depend_on_the_company(model: tuple[str, Path]):
    """A prompt among longer ones, padded, gives what it gives alone."""
    backbone = load(model[1])
    embed = Embedder(backbone)
    both, alone = embed(PROMPTS), embed(PROMPTS[1:])
    g = torch.Generator().manual_seed(1)
    x, t = torch.randn(2, *backbone.latent_shape, generator=g), torch.tensor([0.3, 0.9])
    velocity = backbone.velocity_of(backbone.transformer)
    with torch.no_grad():
        torch.testing.assert_close(velocity(x, t, both)[1:], velocity(x[1:], t[1:], alone), atol=2e-5, rtol=1e-4)


def test_velocity_points_from_data_to_noise(model: tuple[str, Path]):
    """The sign: diffusers' scheduler steps by (sigma_next - sigma) v, so the pipeline's first step is ours."""
    name, folder = model
    backbone = load(folder)
    embed = Embedder(backbone)
    x_1 = torch.randn(2, *backbone.latent_shape, generator=torch.Generator().manual_seed(2))
    pipeline = DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    guidance = {"guidance_scale": 0.0 if name == "z_image" else 1.0}
    seen: list[torch.Tensor] = []

    def keep(pipe, step, t, kwargs):
        seen.append(kwargs["latents"].clone())
        return {}

    pipeline(
        list(PROMPTS),  # Z-Image's pipeline writes into the list that it is given
        height=64,
        width=64,
        num_inference_steps=4,
        sigmas=[1.0, 0.75, 0.5, 0.25],
        max_sequence_length=48,
        latents=x_1.clone(),
        output_type="latent",
        callback_on_step_end=keep,
        **guidance,
    )
    with torch.no_grad():
        v = backbone.velocity_of(backbone.transformer)(x_1, torch.ones(2), embed(PROMPTS))
    torch.testing.assert_close(x_1 + (0.9 - 1.0) * v, seen[0], atol=1e-5, rtol=1e-4)


def test_conditioning_is_joined_and_taken_apart():
    a = Conditioning.of(embeds=torch.ones(1, 3, 2), lengths=torch.tensor([3]))
    b = Conditioning.of(embeds=2 * torch.ones(2, 5, 2), lengths=torch.tensor([5, 4]))
    both = Conditioning.join([a, b])
    assert both["embeds"].shape == (3, 5, 2)
    assert both["lengths"].tolist() == [3, 5, 4]
    assert both["embeds"][0, 3:].abs().sum() == 0
    part = both.rows(torch.tensor([2, 0]))
    assert part["lengths"].tolist() == [4, 3]
    assert a.expand(4)["lengths"].tolist() == [3] * 4


def test_bad_models_are_refused(tmp_path: Path):
    folder = tiny_models.z_image(tmp_path / "z")
    with pytest.raises(ValueError, match=r"model\.resolution = 72: give a multiple of 16"):
        load(folder, 72)
    (folder / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    with pytest.raises(ValueError, match="FluxPipeline"):
        load(folder)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (GatedRepoError, r"is behind a licence: accept it at https://huggingface\.co/someone/model.*hf auth login"),
        (RepositoryNotFoundError, "is neither a local folder nor known to the hub"),
        (None, r"the hub cannot be reached: download it where it can \(`hf download someone/model`\)"),
    ],
)
def test_what_the_hub_refuses_is_told_in_one_line(error: type | None, message: str, monkeypatch: pytest.MonkeyPatch):
    def refuse(*args: object, **kwargs: object) -> None:
        raise error.__new__(error) if error else OSError("no network")  # the hub's errors want an HTTP response

    monkeypatch.setattr(pipeline_module, "hf_hub_download", refuse)
    with pytest.raises(ValueError, match=message):
        load_backbone("someone/model", max_sequence_length=48, dtype=torch.float32, device="cpu")


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers' own, on NumPy 2
def test_what_plain_diffusers_has_next_to_our_dpm():
    """As docs/real_models.md says: close to our pictures, and nearer to them than to Euler's."""
    prompts = ["a red circle left of a blue square", "three crosses", "a green triangle"]
    euler, dpm = (FewStepModel(solver=solver)(prompts, seed=3).astype(float) for solver in ("euler", "dpm"))
    pipeline = DiffusionPipeline.from_pretrained(bundle_path())
    pipeline.set_progress_bar_config(disable=True)
    pipeline.load_lora_weights(bundle_path() / STUDENT_LORA)
    pipeline.scheduler = DPMSolverMultistepScheduler(
        use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0
    )
    x_1 = torch.randn(3, 8, 8, 8, generator=torch.Generator().manual_seed(3))
    plain = pipeline(
        prompts, num_inference_steps=4, guidance_scale=1.0, max_sequence_length=1, latents=x_1, output_type="np"
    ).images
    to_dpm, to_euler = (np.abs(255 * plain - ours).mean() for ours in (dpm, euler))
    assert to_dpm < 2
    assert to_dpm < to_euler / 2
