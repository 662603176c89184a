"""Short real runs on a randomly initialised model of the bundled one's classes."""

from __future__ import annotations

import json
import math
import os
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
from PIL import Image
from safetensors.torch import load_file

from reward_examples import here
from tdm_r1 import cli
from tdm_r1.algorithms.protocol import Batch
from tdm_r1.algorithms.rollout import draw_points, roll_out
from tdm_r1.config.load import distillation, load_recipe
from tdm_r1.config.run import RunConfig, dump
from tdm_r1.errors import UserError
from tdm_r1.evaluate.evaluation import Evaluator, generate
from tdm_r1.evaluate.sampling import FewStepModel
from tdm_r1.mini.build import MiniConfig, build
from tdm_r1.mini.bundle import bundle_path
from tdm_r1.mini.pretrain import PretrainConfig
from tdm_r1.models.load import resolve_model
from tdm_r1.models.lora_files import lora_digest, read_lora
from tdm_r1.models.protocol import Conditioning
from tdm_r1.models.specification import Role
from tdm_r1.train.folder import RunFolder
from tdm_r1.train.run import Run
from tdm_r1.train.start import train, with_student

pytestmark = pytest.mark.slow

Make = Callable[..., RunConfig]


def weights(run: Run) -> dict[str, torch.Tensor]:
    return {
        f"{r}/{n}": p for r in Role if r in run.roles and r is not Role.TEACHER for n, p in run.roles.state(r).items()
    }


def assert_equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], *, atol: float = 0.0) -> None:
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], atol=atol, rtol=0)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tdm": {"fake_scores": "one"}},
        {
            "surrogate": {"loss": "preference", "reference": "dynamic", "weights": "lora", "ema_decay": 0.9},
            "tdm": {"fake_scores": "one"},
        },
        {
            "surrogate": {"loss": "preference", "trust_region": "anchor", "reference": "fake"},
            "tdm": {"fake_scores": "one"},
            "balance": {"policy": "ratio"},
        },
        {"surrogate": {"loss": "preference", "trust_region": "clip"}, "sampler": {"solver": "dpm"}},
        {"sampler": {"solver": "stochastic"}, "tdm": {"noise_range": "interval", "fake_scores": "two"}},
        {"algorithm": "tdm", "batch": {"group": 1}, "tdm": {"fake_scores": "one"}},
        {"surrogate": {"weights": "lora"}},
        {"model": {"roles": "full"}, "surrogate": {"added_delta": 0.0}},
    ],
    ids=["anchored", "one-fake-score", "paper", "fake-ratio", "clip-dpm", "stochastic", "tdm", "lora", "full"],
)
def test_every_variant_trains_every_role_it_should(tiny_config: Make, changes: dict):
    run = Run(tiny_config(**changes))
    before = weights(run)
    first, second = run.step(), run.step()
    moved = {k.split("/")[0] for k, v in weights(run).items() if not torch.equal(v, before[k])}
    expected = {"generator", "generator_ema", "fake"}
    if run.config.tdm.fake_scores == "two":
        expected |= {"fake_final"}
    if run.config.algorithm == "tdm_r1":
        expected |= {"surrogate", "surrogate_ema"}
        if run.config.surrogate.reference == "dynamic":
            expected |= {"reference"}
        assert first["reward/mean"] > 0
        assert second["generator/reward_part"] > 0
    assert moved == expected
    assert all(np.isfinite(v) or k == "surrogate/direction_cosine" for k, v in first.items())


def test_prompts_without_reward_are_never_scored_and_are_the_seeds_alone(tiny_config: Make, tmp_path: Path):
    prompts = tmp_path / "kl.txt"
    prompts.write_text("a blue square\ntwo red circles\n")
    found = []
    for settings in ({"kl": str(prompts)}, {"kl": str(prompts)}, {"kl": "mini_signs"}):
        run = Run(tiny_config(batch={"kl_prompts": 3}, task=settings))
        seen: list[int] = []
        real = run.algorithm.step
        run.algorithm.step = lambda batch, real=real, seen=seen: seen.append(batch) or real(batch)  # type: ignore[method-assign]
        run.step()
        assert run.scored == 12
        assert len(seen[0].kl) == len(seen[0].kl_x_1) == 3
        found.append((seen[0].kl_x_1, seen[0].kl["embeds"]))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])
    assert not torch.equal(found[0][1], found[2][1])
    with pytest.raises(ValueError, match="nowhere"):
        Run(tiny_config(batch={"kl_prompts": 3}, task={"kl": "nowhere"}))


def test_a_surrogate_of_another_run_can_be_used_frozen(tiny_config: Make, tmp_path: Path):
    first = Run(tiny_config(name="first", surrogate={"weights": "lora", "added_delta": 0.0}))
    first.fit()
    lora = first.folder / "lora_surrogate"
    frozen = {"weights": "lora", "added_delta": 0.0, "draws": 0}
    run = Run(tiny_config(name="second", surrogate=frozen, model={"surrogate_lora": str(lora)}))
    start = run.roles.state(Role.SURROGATE)
    for a, b in zip(first.roles.deltas(Role.SURROGATE_EMA), run.roles.deltas(Role.SURROGATE_EMA), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)
    for _ in range(2):
        metrics = run.step()
    assert metrics["generator/reward_part"] > 0
    assert "surrogate/loss" not in metrics
    assert all(torch.equal(p.cpu(), start[n].cpu()) for n, p in run.roles.weights(Role.SURROGATE).items())


@pytest.mark.parametrize("loss", ["anchored", "preference"])
def test_micro_batches_change_nothing(tiny_config: Make, loss: str):
    """Also where a group (4) is larger than a micro-batch (3): the group sum stands inside the sigmoid."""
    whole, parts = (
        Run(tiny_config(surrogate={"loss": loss, "beta": 1000.0}, batch={"micro_batch": n})) for n in (12, 3)
    )
    for run in (whole, parts):
        # SGD in place of Adam: Adam turns rounding errors of tiny gradients into whole steps
        for optimizer in (run.algorithm.surrogate.optimizer, *run.algorithm.tdm.optimizers.values()):
            optimizer.adamw = torch.optim.SGD(optimizer.parameters, lr=1e-2)
        a = run.step()
        assert a["surrogate/grad_norm"] > 0
    assert_equal(weights(whole), weights(parts), atol=2e-6)


def test_no_more_than_a_micro_batch_goes_through_the_network(tiny_config: Make):
    """Without gradients as well, twice as many where the teacher is guided: memory is bounded by it."""
    run = Run(tiny_config(batch={"micro_batch": 5}))
    sizes: dict[bool, set[int]] = {True: set(), False: set()}

    def note(module, args, kwargs):
        sizes[torch.is_grad_enabled()].add(len(kwargs["hidden_states"]))

    hosts = {id(t): t for t in (run.roles.transformer(role) for role in Role if role in run.roles)}
    for transformer in hosts.values():
        transformer.register_forward_pre_hook(note, with_kwargs=True)
    run.step()
    assert max(sizes[True]) == 5
    assert max(sizes[False]) == 10


def test_the_surrogate_keeps_to_its_points_and_noise_levels(tiny_config: Make):
    run = Run(tiny_config(surrogate={"points": "final", "time_range": (0.3, 0.8)}))
    run.step()
    algorithm, noise = run.algorithm, torch.Generator().manual_seed(0)
    c = run.embed(["a red circle", "a cross"] * 100)
    x_1 = torch.randn(len(c), *run.backbone.latent_shape, generator=noise).to(c.device)
    rollout = algorithm.tdm.roll_out(Batch(c, x_1, 1, noise))
    every = draw_points(rollout, noise, time_range=(0.3, 0.8)).all()
    final = draw_points(rollout, noise, points="final", time_range=(0.3, 0.8)).all()
    assert set(every.index.tolist()) == {0, 1, 2, 3}
    assert (every.t > every.s).all()
    assert ((every.t >= 0.3) & ((every.t <= 0.8) | (every.s >= 0.8))).all()
    assert (final.s == 0).all()
    x_0, eps, t = rollout.trajectory.final, final.eps, final.t[:, None, None, None]
    torch.testing.assert_close(final.x_t, (1 - t) * x_0 + t * eps)
    assert final.t.min() >= 0.3
    assert 0.75 < final.t.max() <= 0.8
    t = torch.linspace(0, 1, len(c), device=x_1.device)
    part = algorithm.reward_part(x_1, t, c).flatten(1).abs().sum(1)
    inside = (t >= 0.3) & (t <= 0.8)
    assert (part[inside] > 0).all()
    assert (part[~inside] == 0).all()


def inputs_of(run: Run) -> tuple[torch.Tensor, torch.Tensor, Conditioning]:
    """Two latents, their times and conditioning, for a velocity."""
    device = run.backbone.device
    return (
        torch.randn(2, 8, 8, 8).to(device),
        torch.full((2,), 0.5, device=device),
        run.embed(["a cross", "a red circle"]),
    )


def test_what_is_exported_may_carry_more_than_training_does(tiny_config: Make):
    """Training is the same to the last bit; the averaged generator has phi's change once more in its weights."""
    settings = [{"added_delta": 1.0, "added_delta_exported": w, "ema_decay": 0.0} for w in (None, 2.0)]
    as_trained, more = (Run(tiny_config(surrogate=s)) for s in settings)
    for run in (as_trained, more):
        run.step()
        run.step()
    assert_equal(weights(as_trained), weights(more))
    change = more.roles.deltas(Role.SURROGATE_EMA)
    assert max(float(d.abs().max()) for d in change) > 1e-4
    added = (run.roles.added_to(Role.GENERATOR_EMA) for run in (as_trained, more))
    for once, twice, d in zip(*added, change, strict=True):
        torch.testing.assert_close(once, d, atol=1e-6, rtol=0)
        torch.testing.assert_close(twice, 2 * d, atol=1e-6, rtol=0)
    inputs = inputs_of(as_trained)
    outputs = []
    for run in (as_trained, more):
        with torch.no_grad(), run.roles.use(Role.GENERATOR_EMA) as velocity:
            outputs.append(velocity(*inputs))
    assert (outputs[0] != outputs[1]).any()


@pytest.mark.parametrize("weights_of", ["lora", "full"])
def test_the_limit_weakens_what_is_added_as_much_as_the_scale(tiny_config: Make, weights_of: str):
    surrogate = {"weights": weights_of, "added_delta": 0.5, "added_delta_exported": 2.0, "ema_decay": 0.0}
    run = Run(tiny_config(surrogate=surrogate, balance={"scale": 3.0, "limit": 1e-30}, iterations=2))
    inputs = inputs_of(run)

    def acting(run: Run) -> torch.Tensor:
        with torch.no_grad(), run.roles.use(Role.GENERATOR) as velocity:
            return velocity(*inputs)

    run.fit()
    strength = math.exp(-0.2)
    assert run.algorithm.balance.scale == pytest.approx(3.0 * strength)
    again = Run(run.config)  # a run that goes on adds what the one before did
    again.load(again.checkpoints()[-1])
    change = run.roles.deltas(Role.SURROGATE_EMA)
    assert max(float(d.abs().max()) for d in change) > 1e-4
    for one in (run, again):
        for role, weight in ((Role.GENERATOR, 0.5), (Role.GENERATOR_EMA, 2.0)):
            for part, d in zip(one.roles.added_to(role), change, strict=True):
                torch.testing.assert_close(part, weight * strength * d, atol=1e-6, rtol=1e-4)
    assert torch.equal(acting(run), acting(again))
    weakened = acting(run)
    run.roles.weaken(Role.SURROGATE_EMA, 1.0)
    assert float((acting(run) - weakened).abs().max()) > 1e-6


def test_a_finished_run_is_exported_again_with_more_carried(tiny_config: Make, capsys):
    run = Run(tiny_config(surrogate={"ema_decay": 0.0}, iterations=1))
    run.fit()
    file = next((run.folder / "lora").glob("*.safetensors"))
    before, digest, log = load_file(file), lora_digest(file), (run.folder / "metrics.jsonl").read_text()
    assert cli.main(["train", str(run.folder), "--resume"]) == 0
    assert_equal(load_file(file), before)
    assert lora_digest(file) == digest
    assert cli.main(["train", str(run.folder), "--resume", "--surrogate.added-delta-exported", "2"]) == 0
    capsys.readouterr()
    assert any((w != before[name]).any() for name, w in load_file(file).items())
    assert lora_digest(file) != digest
    assert (run.folder / "metrics.jsonl").read_text() == log


def test_each_fake_score_knows_its_points(tiny_config: Make):
    run = Run(tiny_config(tdm={"fake_scores": "two"}))
    run.step()
    tdm, noise = run.algorithm.tdm, torch.Generator().manual_seed(0)
    c = run.embed(["a red circle", "a cross", "a cross", "a red circle"])
    x_t = torch.randn(4, *run.backbone.latent_shape, generator=noise).to(c.device)
    t = torch.full((4,), 0.6, device=x_t.device)
    with torch.no_grad():
        together = tdm.fake_velocity(x_t, t, c, torch.tensor([3, 0, 2, 3]))
        with run.roles.use(Role.FAKE) as velocity:
            earlier = velocity(x_t, t, c)
        with run.roles.use(Role.FAKE_FINAL) as velocity:
            final = velocity(x_t, t, c)
    assert (earlier - final).abs().flatten(1).amax(1).min() > 0
    torch.testing.assert_close(together[[0, 3]], final[[0, 3]])
    torch.testing.assert_close(together[[1, 2]], earlier[[1, 2]])
    x_1 = torch.randn(200, *x_t.shape[1:], generator=noise).to(x_t.device)
    rollout = tdm.roll_out(Batch(run.embed(["a cross"] * 200), x_1, 1, noise))
    assert set(draw_points(rollout, noise, points="earlier").index.tolist()) == {0, 1, 2}
    assert set(draw_points(rollout, noise, points="final").index.tolist()) == {3}


def test_a_fake_lora_beside_the_bundled_student_is_used(random_model: Path):
    config = load_recipe("mini").model
    assert resolve_model(config).fake_lora == bundle_path() / "tdm_4step_fake"
    assert resolve_model(config.model_copy(update={"fake_lora": "mine"})).fake_lora == "mine"


@pytest.mark.parametrize("batch", [1, 4, 6])
def test_a_stochastic_sampler_depends_on_seed_and_picture_alone(batch: int, tiny_config: Make):
    run = Run(tiny_config(sampler={"solver": "stochastic"}))
    prompts, x_1 = ["a cross"] * 6, torch.zeros(6, *run.backbone.latent_shape)
    sample = partial(generate, run.backbone, run.roles, run.few_step(), run.embed)
    whole = sample(prompts, x_1, batch=6, seed=1)
    assert len({picture.tobytes() for picture in whole}) == 6  # each has its own noise
    assert (whole != sample(prompts, x_1, batch=6, seed=2)).any()
    parts = sample(prompts, x_1, batch=batch, seed=1)
    assert np.abs(parts.astype(int) - whole).max() <= 1  # rounding
    some = sample(prompts[:2], x_1[:2], batch=2, seed=1, numbers=[3, 5])
    assert np.abs(some.astype(int) - whole[[3, 5]]).max() <= 1


def test_resume_is_exact(tiny_config: Make):
    cpu = {"device": "cpu"}  # a GPU's sums have no order
    straight = Run(tiny_config(name="straight", iterations=3, model=cpu))
    straight.fit()
    first = Run(tiny_config(name="broken", iterations=3, model=cpu))
    first.open()
    first.step()
    first.save()
    first._log({"x": 1.0})
    first.iteration = 2
    first._log({"x": 2.0})  # written after the checkpoint, as a crash would leave it
    second = Run(tiny_config(name="broken", iterations=3, model=cpu))
    second.fit(resume=True)
    assert_equal(weights(straight), weights(second))
    rows = [json.loads(line) for line in (second.folder / "metrics.jsonl").read_text().splitlines()]
    assert [r["iteration"] for r in rows if r.get("x") == 2.0] == []
    assert rows[-1]["scored"] == 3 * 12


def test_interrupt_finishes_the_iteration_saves_and_says_how_to_resume(tiny_config: Make, capsys):
    run = Run(tiny_config(iterations=50))
    step = run.step

    def interrupted_step():
        metrics = step()
        os.kill(os.getpid(), signal.SIGINT)
        return metrics

    run.step = interrupted_step  # type: ignore[method-assign]
    run.fit()
    assert run.iteration == 1
    assert [p.name for p in run.checkpoints()] == ["iteration_000001.safetensors"]
    assert "--resume" in capsys.readouterr().out
    again = Run(tiny_config(iterations=2))
    with pytest.raises(UserError, match="already holds a run"):
        again.fit()
    again.fit(resume=True)
    assert again.iteration == 2


def test_run_folder_and_plain_diffusers_load_the_lora(tiny_config: Make):
    """The exported LoRA, loaded by diffusers at scale 1.0, samples the run's own pictures: on the bundled model."""
    config = tiny_config(model={"path": "mini", "student_lora": "mini", "device": "cpu"})
    run = Run(config)
    run.fit()
    for name in ("config.yaml", "versions.json", "metrics.jsonl", "curves.png", "grids/iteration_000002.png"):
        assert (run.folder / name).stat().st_size > 0, name
    assert not list(run.folder.rglob("*.partial"))

    pipeline = StableDiffusion3Pipeline.from_pretrained(bundle_path())
    pipeline.set_progress_bar_config(disable=True)
    prompts = ["a red circle", "two crosses"]
    x_1 = torch.randn(2, 8, 8, 8, generator=torch.Generator().manual_seed(0))

    def plain() -> np.ndarray:
        return pipeline(
            prompts,
            num_inference_steps=4,
            sigmas=[1.0, 0.75, 0.5, 0.25],  # the scheduler's own shift of 3 makes them 1, .9, .75, .5
            guidance_scale=1.0,
            max_sequence_length=1,
            latents=x_1.clone(),
            output_type="np",
        ).images

    base = plain()
    pipeline.load_lora_weights(run.folder / "lora")
    tuned = plain()
    c = run.embed(prompts)
    with torch.no_grad():
        rollout = roll_out(run.roles, Role.GENERATOR_EMA, c, x_1, config.sampler, None, micro_batch=2)
        latents = rollout.trajectory.final
    ours = run.backbone.decode(latents)
    assert np.abs(tuned - base).max() > 0.2  # the LoRA does something
    assert np.abs(ours / 255.0 - tuned).max() < 2.5 / 255  # and it is the run's own

    model = FewStepModel(lora=run.folder / "lora")
    pictures = model(prompts, seed=0)
    assert np.abs(pictures.astype(int) - ours).max() <= 2


def test_eval_finds_what_the_run_found(tiny_config: Make, tmp_path: Path, capsys, monkeypatch):
    """Of a LoRA that is wider than the recipe's adapters, since it holds what the generator carried."""
    run = Run(tiny_config(iterations=1, reward="jpeg_compressibility"))
    last = run.fit()
    assert read_lora(run.folder / "lora").rank == 2 * run.config.model.lora.rank
    monkeypatch.setenv("COLUMNS", "200")
    arguments = [str(run.folder), "--lora", str(run.folder / "lora"), "--base-steps", "0"]
    assert cli.main(["eval", *arguments, "--out", str(tmp_path / "eval")]) == 0
    rows = [line.replace("│", " ").split() for line in capsys.readouterr().out.splitlines()]
    shown = {row[0]: row[1] for row in rows if len(row) == 2}
    for name in ("cleanliness", "frechet", "diversity"):
        assert float(shown[name]) == pytest.approx(last.metrics[name], abs=2e-3, rel=1e-2), name
    (model,) = json.loads((tmp_path / "eval" / "results.json").read_text())["models"]
    mean = model["scores"]["jpeg_compressibility"]["mean"]
    assert mean == pytest.approx(last.metrics["reward"], abs=2e-3, rel=1e-2)
    assert (tmp_path / "eval" / "grid.png").exists()


def pictures_in(folder: Path) -> list[Path]:
    return sorted((folder / "pictures").rglob("*.png"))


def difference(one: Path, other: Path) -> int:
    """The largest difference of two pictures, in levels of 255."""
    a, b = (np.asarray(Image.open(file)).astype(int) for file in (one, other))
    return int(np.abs(a - b).max())


def test_eval_goes_on_and_shares_its_work(tiny_config: Make, tmp_path: Path, capsys):
    config = tiny_config(reward="jpeg_compressibility")
    (tmp_path / "recipe.yaml").write_text(dump(config))
    arguments = ["eval", str(tmp_path / "recipe.yaml"), "--lora", "none", "--base-steps", "3", "--guidance", "1", "2"]
    arguments += ["--metrics", "jpeg_incompressibility", here("graded")]
    alone, shared = ["--out", str(tmp_path / "alone")], ["--out", str(tmp_path / "shared")]
    assert cli.main([*arguments, *alone]) == 0
    assert cli.main([*arguments, *shared, "--shard", "2/2"]) == 0
    assert "18 pictures of other shares are missing" in capsys.readouterr().out
    assert not (tmp_path / "shared" / "table.md").exists()
    assert cli.main([*arguments, *shared, "--shard", "1/2"]) == 0
    results = [json.loads((tmp_path / name / "results.json").read_text()) for name in ("alone", "shared")]
    for one, other in zip(*(pictures_in(tmp_path / name) for name in ("alone", "shared")), strict=True):
        assert one.name == other.name
        assert difference(one, other) <= 1  # a batch of another size rounds otherwise
    assert [m["model"] for m in results[0]["models"]] == ["base, guidance 1", "base, guidance 2", "none"]
    assert [m["network_evaluations"] for m in results[0]["models"]] == [3, 6, 4]
    scores = results[0]["models"][2]["scores"]
    assert scores["jpeg_incompressibility"]["mean"] == pytest.approx(-scores["jpeg_compressibility"]["mean"])
    families = [v for k, v in scores["jpeg_compressibility"].items() if k not in ("mean", "missing", "overall")]
    assert scores["jpeg_compressibility"]["overall"] == pytest.approx(np.mean(families))
    assert {"strict overall", "strict counting", "overall", "counting"} <= scores[here("graded")].keys()
    header = (tmp_path / "alone" / "table.md").read_text().splitlines()[2]
    assert f"| {here('graded')}: strict overall |" in header
    assert "mean" not in header

    kept = tmp_path / "alone" / "pictures" / "none"
    before = {f.name: f.stat().st_mtime_ns for f in kept.iterdir()}
    old = (kept / "000003.png").rename(tmp_path / "old.png")
    assert cli.main([*arguments, *alone]) == 0
    after = {f.name: f.stat().st_mtime_ns for f in kept.iterdir()}
    assert {name for name in before if after[name] != before[name]} == {"000003.png"}
    assert difference(kept / "000003.png", old) <= 1

    assert cli.main([*arguments, *alone, "--prompts", "3"]) == 2
    assert "holds pictures of other prompts" in capsys.readouterr().err
    assert cli.main([*arguments[:3], "none", "--base-steps", "4", "--guidance", "1", *alone]) == 2
    assert "holds pictures of another version of 'base, guidance 1'" in capsys.readouterr().err
    assert cli.main([*arguments, *alone, "--shard", "3/2"]) == 2
    assert "--shard = '3/2': write NUMBER/OF" in capsys.readouterr().err


def test_eval_measures_metrics_on_prompts_of_their_own(tiny_config: Make, tmp_path: Path, capsys):
    """As the paper's table: the task's reward on its prompts, quality on DrawBench's, models down."""
    (tmp_path / "recipe.yaml").write_text(dump(tiny_config(reward="jpeg_compressibility")))
    (tmp_path / "drawbench.csv").write_text("Prompts,Category\na red circle,Colors\ntwo crosses,Counting\na cross,x\n")
    arguments = ["eval", str(tmp_path / "recipe.yaml"), "--lora", "none", "--base-steps", "2", "--guidance", "1"]
    arguments += ["--out", str(tmp_path / "eval"), "--metrics-prompts", str(tmp_path / "drawbench.csv")]
    assert cli.main(arguments) == 2
    assert "say with --metrics what is measured on them" in capsys.readouterr().err
    metrics = ["--metrics", "jpeg_compressibility", "jpeg_incompressibility"]
    assert cli.main([*arguments, *metrics, "--shard", "1/2"]) == 0
    assert "14 pictures of other shares are missing" in capsys.readouterr().out  # 6 of 12, 1 of 3, of each model
    assert cli.main([*arguments, *metrics, "--shard", "2/2"]) == 0
    result = json.loads((tmp_path / "eval" / "results.json").read_text())
    apart = json.loads((tmp_path / "eval" / "metrics" / "results.json").read_text())
    assert (result["prompts"], apart["prompts"], apart["images_per_prompt"]) == (6, 3, 1)
    for model, other in zip(result["models"], apart["models"], strict=True):
        scores, own = model["scores"], other["scores"]
        assert set(scores) == {"jpeg_compressibility", "held_out", *(f"{m} (drawbench)" for m in metrics[1:])}
        assert scores["jpeg_incompressibility (drawbench)"] == own["jpeg_incompressibility"]
        assert own["jpeg_incompressibility"]["mean"] == pytest.approx(-own["jpeg_compressibility"]["mean"])
        assert own["jpeg_compressibility"]["mean"] != scores["jpeg_compressibility"]["mean"]
    text = (tmp_path / "eval" / "table.md").read_text()
    assert f"(drawbench): 3 prompts of {tmp_path / 'drawbench.csv'}, 1 each." in text
    assert "| jpeg_incompressibility (drawbench) |" in text


def test_a_distillation_has_the_runs_model_sampler_and_micro_batch():
    changes = {"model.lora.rank": 16, "sampler.steps": 2, "batch.micro_batch": 4, "model.offload": False}
    changes |= {"model.gradient_checkpointing": False, "model.vae_tiling": True}
    config = load_recipe("sd35m_geneval").override(changes)
    first = distillation(config)
    assert first.model == config.model
    assert first.sampler == config.sampler
    assert first.batch.micro_batch == 4
    assert first.batch.prompts == load_recipe("sd35m_tdm").batch.prompts
    frozen = config.override({"surrogate.draws": 0, "model.surrogate_lora": "runs/other/lora_surrogate"})
    assert distillation(frozen).model.surrogate_lora is None  # TDM has none


def test_what_is_wrong_with_a_run_is_said_before_its_distillation(tiny_config: Make, tmp_path: Path):
    (tmp_path / "tdm.yaml").write_text(dump(tiny_config(algorithm="tdm", surrogate={"added_delta": 0.0})))
    config = tiny_config(distill_with=str(tmp_path / "tdm.yaml"), name="late", reward="nobody")
    with pytest.raises(ValueError, match="reward = 'nobody' is not known"):
        train(config)
    assert not (tmp_path / "late").exists()


def test_a_run_distils_its_start_first_and_only_once(tiny_config: Make, tmp_path: Path):
    recipe = tiny_config(algorithm="tdm", iterations=1, surrogate={"added_delta": 0.0}, name="unused")
    (tmp_path / "tdm.yaml").write_text(dump(recipe))
    config = tiny_config(distill_with=str(tmp_path / "tdm.yaml"), name="both")
    assert train(config) is not None
    folder = tmp_path / "both"
    assert (folder / "distill" / "metrics.jsonl").exists()
    start = with_student(config)
    assert start.model.student_lora == str(folder / "distill" / "lora")
    assert start.model.fake_lora == str(folder / "distill" / "lora_fake")
    written = load_recipe(str(folder))
    assert written == start
    assert with_student(written) == written
    with pytest.raises(UserError, match=r"distill_with = 'mini': its algorithm is tdm_r1; name one of tdm"):
        with_student(tiny_config(distill_with="mini", name="wrong"))


def test_an_interrupted_distillation_goes_on_and_ends_as_one_that_was_not(
    tiny_config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    recipe = tiny_config(algorithm="tdm", iterations=2, surrogate={"added_delta": 0.0}, name="unused")
    (tmp_path / "tdm.yaml").write_text(dump(recipe))
    whole = with_student(tiny_config(distill_with=str(tmp_path / "tdm.yaml"), name="whole"))

    config = tiny_config(distill_with=str(tmp_path / "tdm.yaml"), name="broken")
    step = Run.step

    def interrupted_step(run: Run):
        os.kill(os.getpid(), signal.SIGINT)
        return step(run)

    with monkeypatch.context() as patched:
        patched.setattr(Run, "step", interrupted_step)
        with pytest.raises(UserError, match="the distillation was interrupted; the same command goes on with it"):
            with_student(config)
    assert not RunFolder(tmp_path / "broken" / "distill").is_finished()
    resumed = with_student(config)
    for name in ("student_lora", "fake_lora"):
        folders = (Path(getattr(config.model, name)) for config in (whole, resumed))
        assert_equal(*(load_file(folder / "pytorch_lora_weights.safetensors") for folder in folders))


def test_full_weights_leave_a_transformer_that_plain_diffusers_loads(tiny_config: Make):
    run = Run(tiny_config(model={"roles": "full"}, surrogate={"added_delta": 0.0}, iterations=1))
    run.fit()
    loaded = SD3Transformer2DModel.from_pretrained(run.folder / "transformer")
    expected = run.roles.state(Role.GENERATOR_EMA)
    assert_equal(dict(loaded.named_parameters()), expected)
    assert not (run.folder / "lora").exists()


def test_learning_rates_warm_up_and_decay(tiny_config: Make):
    settings = {"learning_rate": 1e-3, "warmup_steps": 2, "decay_share": 0.5}
    run = Run(tiny_config(iterations=8, tdm={"generator": settings}))
    optimizer = run.algorithm.tdm.optimizers[Role.GENERATOR]
    rates = []
    for _ in range(9):  # one more than planned does no harm
        optimizer.parameters[0].grad = torch.ones_like(optimizer.parameters[0])
        rates.append(optimizer.step()["learning_rate"] * 1e3)
    np.testing.assert_allclose(rates, [0.5, 1, 1, 1, 1, 0.75, 0.5, 0.25, 0])


def test_a_diverged_run_stops_and_says_so(tiny_config: Make):
    run = Run(tiny_config())
    optimizer = run.algorithm.surrogate.optimizer
    before = run.roles.state(Role.SURROGATE)

    def diverge() -> None:
        optimizer.parameters[0].grad = torch.full_like(optimizer.parameters[0], torch.nan)
        optimizer.step()

    for _ in range(4):
        diverge()
    with pytest.raises(FloatingPointError, match=r"5 updates in a row.*learning rate"):
        diverge()
    assert_equal(run.roles.state(Role.SURROGATE), before)


def test_pretraining_goes_on_from_a_folder(tmp_path: Path):
    base = PretrainConfig(steps=2, batch_size=4, pool_size=12, warmup_steps=1, ema_decay=0.0)
    config = MiniConfig(work=tmp_path, out=tmp_path / "model", start=bundle_path(), base=base)
    old, new = (
        SD3Transformer2DModel.from_pretrained(folder, subfolder="transformer").state_dict()
        for folder in (bundle_path(), build(config))
    )
    change = [float((new[k] - v).norm() / v.norm()) for k, v in old.items() if v.norm() > 0 and "pos_embed" not in k]
    assert np.median(change) > 0  # not min: the last block never asks its text anything
    assert max(change) < 0.5  # two steps from where it stood, not from a fresh start
    assert (tmp_path / "model" / "features.safetensors").is_file()
    with pytest.raises(UserError, match="no pipeline folder"):
        build(MiniConfig(start=tmp_path))
    assert build(config.model_copy(update={"compiled": True})) == tmp_path / "model"  # nothing is left to train
    with pytest.raises(UserError, match=r"holds a model that was begun with another seed \(config.yaml there\)"):
        build(config.model_copy(update={"seed": 1}))


def test_prompts_are_embedded_as_the_pipeline_does(random_model: Path):
    """Pretraining's own encoder call equals `encode_prompt`, with a T5 that is zero and without any."""
    from tdm_r1.mini import text

    prompts = ["a red circle left of a blue square", ""]
    with_t5 = StableDiffusion3Pipeline.from_pretrained(random_model)
    without = StableDiffusion3Pipeline.from_pretrained(random_model, text_encoder_3=None, tokenizer_3=None)
    with torch.no_grad():
        ours = text.encode([with_t5.text_encoder, with_t5.text_encoder_2], text.token_ids(with_t5.tokenizer, prompts))
        for pipeline in (with_t5, without):
            embeds, _, pooled, _ = pipeline.encode_prompt(
                prompts, None, None, do_classifier_free_guidance=False, max_sequence_length=1
            )
            torch.testing.assert_close(embeds, ours[0])
            torch.testing.assert_close(pooled, ours[1])


def test_prompt_file_and_missing_scores(tiny_config: Make, tmp_path: Path):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "a red circle", "target": 0.3}\n{"prompt": "a blue cross", "target": 0.9}\n')
    reward = tmp_path / "flaky.py"
    reward.write_text(
        "def near(images, prompts, metadata):\n"
        "    out = [-abs(float(i.mean()) / 255 - m['target']) for i, m in zip(images, metadata)]\n"
        "    out[0] = None\n"
        "    return out\n"
    )
    run = Run(tiny_config(task={"name": "prompts", "prompts": prompts, "weights": None}, reward=f"{reward}:near"))
    metrics = run.step()
    assert metrics["reward/missing"] == 1
    assert metrics["reward/skipped_groups"] == 0
    result = run.evaluator()(run.few_step())
    own = {"reward", "reward_missing", "network_evaluations", "images_per_second"}
    assert {name for name in result.metrics if not name.startswith("pictures/")} == own


def test_a_constant_reward_changes_no_surrogate(tiny_config: Make, tmp_path: Path):
    reward = tmp_path / "constant.py"
    reward.write_text("def one(images, prompts, metadata):\n    return [1.0] * len(images)\n")
    run = Run(tiny_config(reward=f"{reward}:one"))
    before = run.roles.state(Role.SURROGATE)
    metrics = run.step()
    assert metrics["reward/skipped_groups"] == 3
    assert all(torch.equal(p, before[n]) for n, p in run.roles.state(Role.SURROGATE).items())


# ------------------------------------------------------------------------------------------ rewards that fail


def test_worker_processes_change_nothing(tiny_config: Make):
    cpu = {"device": "cpu"}  # a GPU's sums have no order
    here = Run(tiny_config(model=cpu))
    there = Run(tiny_config(scoring={"workers": 1, "chunk": 5}, model=cpu))
    for run in (here, there):
        run.step()
    there.scorer.close()
    assert_equal(weights(here), weights(there))


def test_a_sum_of_rewards_logs_its_breakdown(tiny_config: Make):
    config = tiny_config()
    run = Run(tiny_config(reward=f"{config.reward} + 0.1*jpeg_compressibility", scoring={"normalize": "group"}))
    metrics = run.step()
    assert {f"reward_parts/{config.reward}", "reward_parts/jpeg_compressibility"} <= metrics.keys()


class FailsAfter:
    """Scores left brightness for a number of batches, then breaks down."""

    def __init__(self, batches: int) -> None:
        self.left = batches

    def __call__(self, images, prompts, metadata):
        self.left -= 1
        if self.left < 0:
            raise ConnectionError("the server is gone")
        return images[:, :, :32].mean((1, 2, 3))


def test_a_reward_that_breaks_down_stops_the_run_with_everything_saved(tiny_config: Make):
    config = tiny_config(iterations=8, save_every=100)
    with pytest.raises(
        UserError, match=r"for 3 batch.*the server is gone.*Checkpoint saved after iteration 4.*resume=True"
    ):
        Run(config, reward=FailsAfter(3)).fit()  # the evaluation before, two iterations; two without a score, then stop
    run = Run(config, reward=FailsAfter(100))
    run.fit(resume=True)
    assert run.iteration == 8
    rows = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    missing = {r["iteration"]: r["reward/missing"] for r in rows if "reward/missing" in r}
    assert missing == {1: 0, 2: 0, 3: 12, 4: 12, 5: 0, 6: 0, 7: 0, 8: 0}


def test_an_evaluation_that_breaks_loses_no_iteration(tiny_config: Make, monkeypatch: pytest.MonkeyPatch):
    """The weights are saved before it, and the run that goes on makes up for it."""
    config = tiny_config(iterations=3, save_every=100)
    run = Run(config)

    def breaks(*args, **kwargs):
        raise RuntimeError("CUDA out of memory")

    first = run.evaluator()(run.few_step())
    monkeypatch.setattr(Evaluator, "__call__", breaks)
    with pytest.raises(RuntimeError, match="out of memory"):
        run.fit(first=first)
    monkeypatch.undo()
    again = Run(config)
    assert again.fit(resume=True) is not None
    rows = [json.loads(line) for line in (again.folder / "metrics.jsonl").read_text().splitlines()]
    assert [r["iteration"] for r in rows if "reward/mean" in r] == [1, 2, 3]
    assert [r["iteration"] for r in rows if "eval/reward" in r] == [0, 3]
    assert Run(config).fit(resume=True) is None  # nothing is left to do


def test_a_reward_that_never_works_stops_before_training(tiny_config: Make):
    config = tiny_config()
    with pytest.raises(UserError, match=r"no score at all for 1 batch.*the server is gone"):
        Run(config, reward=FailsAfter(0)).fit()
    assert Run(config).fit() is not None  # the folder can be used
