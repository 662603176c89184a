"""What a run is said to need, against what it is seen to use."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from io import StringIO
from pathlib import Path

import pytest
import torch
from rich.console import Console

from gpu_iteration import TINY
from phases import Phases
from tdm_r1 import cli
from tdm_r1.algorithms.tdm_r1 import TDMR1
from tdm_r1.config.load import load_recipe
from tdm_r1.config.recipes import recipe_text
from tdm_r1.config.run import RunConfig
from tdm_r1.models.architectures import architecture_of, architectures, random_pipeline, text_encoder_parameters
from tdm_r1.models.specification import Role
from tdm_r1.train.build import algorithm_of, build_roles
from tdm_r1.train.estimate import (
    Meter,
    describe,
    estimate,
    random_backbone,
    random_conditioning,
    with_checkpointing_decided,
)
from tdm_r1.train.memory import fitted
from tdm_r1.train.run import Run

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize(
    ("name", "transformer", "text_encoders"),
    [  # billions, as the models' cards have them; SD3.5-M's "2.5 B" counts its fixed positions, 0.226 B
        ("sd35_medium", 2.47 - 0.226, 0.124 + 0.695 + 4.762),
        ("sd35_large", 8.06, 0.124 + 0.695 + 4.762),
        ("z_image", 6.15, 4.02),
    ],
)
def test_architectures_have_the_published_sizes(name: str, transformer: float, text_encoders: float):
    pipeline = random_pipeline(name, device="meta", dtype=torch.bfloat16)
    found = sum(p.numel() for p in pipeline.transformer.parameters()) / 1e9
    assert found == pytest.approx(transformer, rel=0.005)
    assert text_encoder_parameters(name) / 1e9 == pytest.approx(text_encoders, rel=0.005)
    assert sum(p.numel() for p in pipeline.vae.parameters()) / 1e6 == pytest.approx(83.8, rel=0.001)


def test_recipes_of_real_models_name_known_architectures():
    for name in ("sd35m_geneval", "sd35m_ocr", "sd35m_imagereward", "sd35m_hps", "sd35m_judge", "sd35m_tdm"):
        assert architecture_of(load_recipe(name).model.path) == "sd35_medium"
    for name in ("zimage_geneval", "zimage_hpsv3"):
        model = load_recipe(name).model
        assert architecture_of(model.path) == architecture_of(model.teacher or "") == "z_image"
    assert architecture_of("mini") is None


def test_utilisation_is_what_was_measured():
    """On an H100 the release's iteration, of one adapter at a time, and this project's; Z-Image on an H200."""
    files = (ROOT / "docs/results" / name for name in ("gpu_iteration.json", "gpu_iteration_h100.json"))
    rows = [row for file in files for row in json.loads(file.read_text())["models"]]
    measured = {row["recipe"]: round(row["hardware_utilisation"], 2) for row in rows}
    sd, z_image = architectures()["sd35_medium"], architectures()["z_image"]
    assert sd["utilisation"] == measured["sd35m_geneval_release"]
    assert sd["utilisation_added"] == measured["sd35m_geneval"]
    assert z_image["utilisation"] == measured["zimage_geneval"]
    assert z_image["utilisation_added"] == round(
        z_image["utilisation"] * sd["utilisation_added"] / sd["utilisation"], 2
    )


def test_a_models_folder_is_known_by_its_sizes(tmp_path: Path):
    (tmp_path / "transformer").mkdir()
    file = tmp_path / "transformer" / "config.json"
    for name, known in architectures().items():
        file.write_text(json.dumps(known["transformer"] | {"_class_name": "x", "out_channels": 16}))
        assert architecture_of(str(tmp_path)) == name
    file.write_text(json.dumps({"num_layers": 3}))
    assert architecture_of(str(tmp_path)) is None


@pytest.mark.parametrize(
    "row", json.loads((ROOT / "docs/results/recipe_needs.json").read_text()), ids=lambda r: r["recipe"]
)
def test_recipes_state_what_they_need(row: dict):
    """As docs/results/recipe_needs.json has it; one recipe holds that file to the code: all take minutes."""
    text = recipe_text(row["recipe"])
    assert f"Expected of 1 x 80 GB: {row['peak_gib']} GiB and {row['seconds_1_gpu']} s an iteration" in text
    assert f"of 8 that share the samples {row['seconds_8_gpus']} s" in text
    least = "" if row["recomputed"] else f"\n# With gradient checkpointing {row['least_gib']} GiB are enough."
    assert least in text
    if row["recipe"] == "sd35m_tdm":
        found = estimate(load_recipe("sd35m_tdm"))
        assert found is not None
        assert round(found.peak / 2**30, 1) == row["peak_gib"]
        assert round(found.seconds(), 1) == row["seconds_1_gpu"]


@pytest.mark.parametrize(
    "surrogate",
    [
        {"loss": "anchored", "baseline": "fake", "reference": "static", "measured_groups": 2},
        {"loss": "preference", "reference": "dynamic", "measured_groups": 1, "added_delta": 0.0, "ema_decay": 0.9},
    ],
)
def test_network_evaluations_are_those_of_a_real_iteration(tiny_config: Callable[..., RunConfig], surrogate: dict):
    run = Run(tiny_config(surrogate=surrogate, batch={"prompts": 3, "group": 4, "micro_batch": 5}))
    run.embed([p.text for p in run.task.eval_prompts(1)])
    assert isinstance(run.algorithm, TDMR1)
    phases = Phases(run.algorithm, run.backbone)
    run.step()
    seen = {part: (phases.forward[part], phases.backward[part]) for part in phases.seconds if part != "decode"}
    declared = algorithm_of(run.config).evaluations(run.config)
    assert seen == {part: (count.frozen, count.trained) for part, count in declared.items()}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", TINY)
def test_working_memory_is_that_of_a_real_pass(name: str, checkpointing: bool):
    recipe = {"sd35_medium": "sd35m_geneval", "z_image": "zimage_geneval"}[name]
    changes = {"model.gradient_checkpointing": checkpointing, "model.resolution": 64, "model.teacher": None}
    config = load_recipe(recipe).override(changes | {"batch.prompts": 1, "batch.group": 6, "batch.micro_batch": 6})
    expected = estimate(config, **TINY[name])
    assert expected is not None
    backbone = random_backbone(name, config.model, device="cpu", **TINY[name])
    roles = build_roles(config, backbone, None)
    c = random_conditioning(backbone, 6, device="cpu")
    with Meter() as meter, roles.use(Role.FAKE) as velocity:
        velocity(torch.randn(6, *backbone.latent_shape), torch.rand(6), c).square().sum().backward()
    assert meter.peak == pytest.approx(expected.working["fake score"], rel=0.05)


def test_activations_are_kept_where_they_fit():
    many = {"batch.prompts": 1000, "batch.micro_batch": 24_000}  # so that the text encoders are not what needs most
    config = load_recipe("sd35m_geneval").override({"model.resolution": 64, **many})
    sizes = TINY["sd35_medium"]
    needed = {on: estimate(config.override({"model.gradient_checkpointing": on}), **sizes) for on in (False, True)}
    kept, recomputed = needed[False], needed[True]
    assert kept is not None
    assert recomputed is not None
    assert kept.peak > recomputed.peak
    for room, on in ((1.2 * kept.peak, False), (1.1 * kept.peak, True), (0.0, True)):
        decided = with_checkpointing_decided(config, room, **sizes)
        assert decided.model.gradient_checkpointing is on
        assert decided.override({"model.gradient_checkpointing": "auto"}) == config
    small = config.override({"batch.micro_batch": 6})
    assert estimate(small, **sizes) == estimate(small.override({"model.gradient_checkpointing": False}), **sizes)
    unknown = config.override({"model.path": "someone/some-model"})
    assert with_checkpointing_decided(unknown, 1e15).model.gradient_checkpointing is True


def test_a_run_decides_by_what_is_free(monkeypatch: pytest.MonkeyPatch):
    config = load_recipe("sd35m_geneval").override({"model.device": "cpu"})
    assert fitted(config, Console(quiet=True)).model.gradient_checkpointing is False
    monkeypatch.setattr("tdm_r1.train.memory.resolve_device", lambda name: "cuda")
    said = Console(record=True, quiet=False, width=200, file=StringIO())
    for gib, on in ((75, False), (40, True)):
        monkeypatch.setattr("tdm_r1.train.memory.free_memory", lambda device, gib=gib: gib * 2**30)
        assert fitted(config, said).model.gradient_checkpointing is on
    for changes, on in (
        ({"model.path": "mini"}, False),
        ({"model.path": "no/where"}, True),
        ({"model.shard": True}, True),
    ):
        assert fitted(config.override(changes), said).model.gradient_checkpointing is on
    text = said.export_text()
    assert text.count("the activations fit") == text.count("would not fit") == text.count("is not known") == 1
    asked = config.override({"model.gradient_checkpointing": True})
    assert fitted(asked, Console(quiet=True)) == asked


def test_the_estimate_follows_what_a_run_holds():
    changes = {"surrogate.reference": "dynamic", "surrogate.ema_decay": 0.9, "surrogate.added_delta": 0.0}
    config = load_recipe("sd35m_geneval").override(changes)
    sizes = TINY["sd35_medium"]
    lora, full = estimate(config, **sizes), estimate(config.override({"surrogate.weights": "full"}), **sizes)
    assert lora is not None
    assert full is not None
    backbone = random_backbone("sd35_medium", config.model, **sizes)
    base = sum(p.numel() for p in backbone.transformer.parameters())
    more = full.held["weights of 7 roles"] - lora.held["weights of 7 roles"]
    adapter = lora.held["weights of 7 roles"] / 7
    assert more == 3 * (4 * base - adapter)  # surrogate and two averages, in float32, for three adapters
    two_backbones = config.override({"model.teacher": "stabilityai/stable-diffusion-3.5-medium"})
    spread = estimate(config.override({"surrogate.weights": "full", "model.shard": True}), gpus=4, **sizes)
    assert spread.held["frozen transformer"] == full.held["frozen transformer"] / 4
    assert spread.held["gradients"] < full.held["gradients"]
    assert spread.held["optimizers"] < full.held["optimizers"]
    assert "each of 4 GPUs" in describe(spread)
    two = estimate(two_backbones, **sizes)
    assert two is not None
    assert two.held["frozen transformers"] == 2 * lora.held["frozen transformer"]
    assert two.held["adapters on a second transformer"] == 0
    added = estimate(two_backbones.override({"surrogate.added_delta": 1.0}), **sizes)
    assert added is not None
    assert added.held["adapters on a second transformer"] == adapter  # the copy that is added to the student's roles
    assert added.flops["surrogate"] > two.flops["surrogate"]
    assert lora.seconds(8) == pytest.approx(lora.seconds() / 8)


def test_dry_run_tells_memory_and_time_without_hub_and_gpu(capsys, tmp_path: Path):
    assert cli.main(["train", "sd35m_geneval", "--dry-run", "--batch.micro-batch", "2"]) == 0
    text = capsys.readouterr().out
    assert "# memory of one GPU, about " in text
    assert "s on 8 (without their exchanges)" in text
    (tmp_path / "dry.yaml").write_text(text)  # still a configuration
    assert load_recipe(str(tmp_path / "dry.yaml")) == load_recipe("sd35m_geneval").override({"batch.micro_batch": 2})
    assert cli.main(["train", "mini", "--dry-run"]) == 0
    assert "# no estimate" in capsys.readouterr().out


def test_gpu_benchmark_runs_on_a_cpu_with_tiny_transformers(tmp_path: Path):
    out = tmp_path / "gpu.json"
    script = str(ROOT / "benchmarks" / "gpu_iteration.py")
    sizes = ["--tiny", "--resolution", "64", "--prompts", "1", "--group", "2", "--iterations", "1"]
    subprocess.run([sys.executable, script, *sizes, "--out", str(out)], check=True, capture_output=True)
    result = json.loads(out.read_text())
    assert [row["recipe"] for row in result["models"]] == ["sd35m_geneval", "sd35m_geneval_release", "zimage_geneval"]
    assert [row["model"] for row in result["models"]] == ["sd35_medium", "sd35_medium", "z_image"]
    known = {"text encoders", "rollout", "decode", "diagnostics", "surrogate", "fake score", "generator"}
    for row, parts in zip(result["models"], (known, known - {"diagnostics"}, known), strict=True):
        assert set(row["parts"]) == parts
        assert all(p["seconds"] > 0 and p["expected_gib"] > 0 for p in row["parts"].values())
        assert "--out" not in row["command"]
    assert set(architectures()) >= {"sd35_medium", "z_image"}
    assert "| surrogate |" in out.with_suffix(".md").read_text()
