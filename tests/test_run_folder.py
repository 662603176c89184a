"""What lies in a run's folder: who may write there, how a run goes on from it, and what is done with damage."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from filelock import FileLock
from PIL import Image
from safetensors import SafetensorError

from reward_examples import brightness, here
from tdm_r1 import cli
from tdm_r1.config.load import differences, distillation, load_recipe, run_of
from tdm_r1.config.run import LOG, RunConfig, dump
from tdm_r1.errors import UserError
from tdm_r1.evaluate.comparison import Comparison
from tdm_r1.evaluate.sampling import FewStepModel
from tdm_r1.models.specification import Role
from tdm_r1.rewards.scorer import Scorer
from tdm_r1.train import checkpoint
from tdm_r1.train.checkpoint import DamagedError, load_state
from tdm_r1.train.folder import RunFolder, iteration_of
from tdm_r1.train.run import Run
from tdm_r1.train.start import train, with_student

pytestmark = pytest.mark.slow

Make = Callable[..., RunConfig]


def logged(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / LOG).read_text().splitlines()]


def digests(folder: Path) -> dict[Path, str]:
    """Of every file's contents."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture
def finished(finished_run: Path, tmp_path: Path) -> Path:
    """A finished run's folder of one's own: a copy is a run as well."""
    return shutil.copytree(finished_run, tmp_path / "elsewhere" / "copy")


def test_a_resumed_run_keeps_its_own_settings(finished: Path, tmp_path: Path, capsys):
    """What was given when it was started need not be given again, and what is given now is kept in its turn."""
    own = load_recipe(str(finished))
    (tmp_path / "recipe.yaml").write_text(dump(own.override({"reward": here("brightness")})))
    recipe = ["train", str(tmp_path / "recipe.yaml"), "--iterations", "2", "--resume"]
    assert cli.main(recipe) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert f"keeps its own reward = {own.reward!r} (the recipe's is {here('brightness')!r})" in told
    assert "iterations = 2 from here on (1 before)" in told
    assert load_recipe(str(finished)) == own.override({"iterations": 2})
    assert logged(finished)[-1]["iteration"] == 2
    assert cli.main(["train", str(finished), "--resume"]) == 0
    assert "from here on" not in capsys.readouterr().out


def test_settings_that_differ_are_told_by_name():
    config = load_recipe("mini").override({"task.weights": None})
    other = config.override({"surrogate.beta": 7.0, "task.weights": {"counting": 1.0}, "name": "else"})
    expected = [("surrogate.beta", config.surrogate.beta, 7.0), ("task.weights.counting", None, 1.0)]
    assert differences(config, other) == expected


def test_what_a_resumed_run_is_given_is_what_it_uses(tiny_config: Make):
    """AdamW's own loading brings back the betas and the weight decay that were saved."""
    config = tiny_config(iterations=1)
    Run(config).fit()
    given = {"tdm.generator.betas": (0.5, 0.6), "tdm.generator.weight_decay": 0.25, "tdm.fake.learning_rate": 0.5}
    run = Run(config.override({"iterations": 2} | given))
    run.open(resume=True)
    (group,) = run.algorithm.tdm.optimizers[Role.GENERATOR].adamw.param_groups
    assert (group["betas"], group["weight_decay"]) == ((0.5, 0.6), 0.25)
    state = run.algorithm.tdm.optimizers[Role.GENERATOR].adamw.state
    assert any(bool(s["exp_avg"].any()) for s in state.values())  # its averages are the saved ones
    run.step()
    (group,) = run.algorithm.tdm.optimizers[Role.FAKE].adamw.param_groups
    assert group["lr"] == pytest.approx(0.5 * 5 / 10)  # of the fifth update in a warm-up of 10, which comes next


def test_a_controlled_scale_goes_on_unless_another_start_is_given(tiny_config: Make):
    config = tiny_config(iterations=1, balance={"policy": "ratio", "scale": 2.0, "rate": 0.5})
    first = Run(config)
    first.fit()
    reached = first.algorithm.balance.scale
    assert reached != 2.0
    scales = []
    for changes in ({}, {"balance.scale": 3.0}, {"balance.policy": "fixed"}):
        run = Run(config.override({"iterations": 2} | changes))
        run.open(resume=True)
        scales.append(run.algorithm.balance.scale)
    assert scales == [reached, 3.0, 2.0]


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("algorithm", "tdm"),
        ("tdm.fake_scores", "one"),
        ("surrogate.weights", "full"),
        ("model.lora.rank", "8"),
        ("model.lora.alpha", "8"),
        ("tdm.fake.eight-bit", None),
        ("model.student-lora", "elsewhere"),
        ("distill-with", "mini_distill"),
    ],
)
def test_what_a_run_cannot_change_is_refused_by_name(setting: str, value: str | None, finished: Path, capsys):
    before = digests(finished)
    given = ["--surrogate.added-delta", "0"] if setting == "algorithm" else []
    assert cli.main(["train", str(finished), "--resume", f"--{setting}", *([value] if value else []), *given]) == 2
    error = capsys.readouterr().err
    assert f"{setting.replace('-', '_')} = " in error
    assert "the run was started with" in error
    assert digests(finished) == before


def test_a_checkpoint_of_other_roles_is_refused_where_the_settings_are_gone(finished: Path):
    config = load_recipe(str(finished)).override({"tdm.fake_scores": "one", "iterations": 2})
    (finished / "config.yaml").write_text("of: another version\n")
    with pytest.raises(UserError, match=r"first difference: fake_final"):
        Run(config).open(resume=True)


def test_an_earlier_checkpoint_is_gone_on_from(tiny_config: Make, capsys):
    config = tiny_config(iterations=4)
    run = Run(config)
    run.fit()
    third = run.checkpoints()[-2]
    assert cli.main(["train", str(run.folder), "--resume", "--from", "1"]) == 2
    assert "has checkpoints of iterations 2, 3, 4; name one of them" in capsys.readouterr().err
    expected = load_state(third)["roles"]["generator"]
    again = Run(config)
    again.open(resume=True, start_from=3)
    assert again.iteration == 3
    assert all(torch.equal(w, expected[n]) for n, w in again.roles.state(Role.GENERATOR).items())
    assert [iteration_of(p) for p in again.checkpoints()] == [2, 3]
    assert max(row["iteration"] for row in logged(run.folder)) == 3
    assert cli.main(["train", str(run.folder), "--resume", "--from", "2"]) == 0
    assert [iteration_of(p) for p in run.checkpoints()] == [2, 3, 4]


@pytest.mark.parametrize(("metric", "low", "best"), [("reward", False, 2), ("frechet", True, 1), ("strict", False, 7)])
def test_the_best_and_the_last_checkpoints_are_kept(metric: str, low: bool, best: int, tiny_config: Make):
    run = Run(tiny_config(iterations=8, evaluation={"best": metric}))
    run.best_is_low = low
    run.open()
    for iteration, reward in enumerate((0.1, 0.9, 0.3, 0.2, 0.8, 0.5, 0.4)):
        run.iteration = iteration + 1
        run.save()
        run._log({"eval/reward": reward, "eval/frechet": reward})
    assert [iteration_of(p) for p in run.checkpoints()] == sorted({best, 5, 6, 7})


def test_the_metric_of_the_best_checkpoint_has_to_be_measured(tiny_config: Make):
    with pytest.raises(UserError, match=r"evaluation\.best = 'beauty': the metrics are .*strict.*; name one"):
        Run(tiny_config(evaluation={"best": "beauty"})).fit()
    run = Run(tiny_config(evaluation={"best": "frechet"}))
    run.fit()
    assert run.best_is_low
    before = run.checkpoints()
    with pytest.raises(UserError, match=r"evaluation\.best = 'beauty': the metrics are .*strict.*; name one"):
        Run(tiny_config(iterations=9, evaluation={"best": "beauty"})).fit(resume=True)
    assert run.checkpoints() == before


def test_a_diverged_run_names_the_checkpoints_that_there_are(tiny_config: Make, monkeypatch):
    run = Run(tiny_config(iterations=4))
    step = run.step

    def diverges():
        if run.iteration == 2:
            raise FloatingPointError("the run has diverged")
        return step()

    run.step = diverges  # type: ignore[method-assign]
    told = r"has diverged\. The last batch is in .*--resume --from ITERATION; there are checkpoints of 1, 2$"
    with pytest.raises(UserError, match=told):
        run.fit()
    assert [iteration_of(p) for p in run.checkpoints()] == [1, 2]
    batch = checkpoint.load_state(run.folder / "diverged.safetensors")
    assert batch["iteration"] == 1
    n = len(batch["prompts"])
    assert (batch["latents"].shape[0], len(batch["scores"])) == (n, n)


def test_a_full_disk_costs_nothing_that_was_whole(tiny_config: Make, monkeypatch):
    """In one line, with how to go on."""
    run = Run(tiny_config(iterations=3))
    writes = checkpoint.save_file

    def full(tensors, path, metadata):
        if run.iteration == 2:
            Path(path).write_bytes(b"half")
            raise SafetensorError("I/O error: No space left on device (os error 28)")
        writes(tensors, path, metadata=metadata)

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(
        UserError, match=r"cannot write .*No space left.*the last whole one is .*000001\..*--resume"
    ) as error:
        run.fit()
    assert "\n" not in str(error.value)
    assert [iteration_of(p) for p in run.checkpoints()] == [1]
    assert not list(run.folder.rglob("*.partial"))
    monkeypatch.undo()
    again = Run(run.config)
    again.fit(resume=True)
    assert again.iteration == 3


def test_the_log_is_json(tiny_config: Make):
    """NaN is none: a metric that is not a number is left out of its row."""
    run = Run(tiny_config())
    run.open()
    run._log({"a": math.nan, "b": math.inf, "c": 1.0})
    (row,) = (json.loads(line, parse_constant=pytest.fail) for line in (run.folder / LOG).read_text().splitlines())
    assert row.keys() & {"a", "b", "c"} == {"c"}


def test_half_a_distillation_is_no_start(tiny_config: Make, tmp_path: Path):
    """Also where it was gone on with by hand, and exported, and interrupted again."""
    recipe = tiny_config(algorithm="tdm", iterations=3, surrogate={"added_delta": 0.0}, name="unused")
    (tmp_path / "tdm.yaml").write_text(dump(recipe))
    config = tiny_config(distill_with=str(tmp_path / "tdm.yaml"), name="both")
    half = Run(distillation(config))
    half.open()
    half.step()
    half._log({})
    half.save()
    half.export(half.folder)
    assert not half.files.is_finished()
    start = with_student(config)
    assert half.files.is_finished()
    assert Path(start.model.student_lora) == half.folder / "lora"
    assert logged(half.folder)[-1]["iteration"] == 3


def test_an_export_that_is_broken_off_leaves_the_old_one(finished: Path, monkeypatch):
    run = Run(load_recipe(str(finished)))
    run.open(resume=True)
    before = digests(finished / "lora")

    def broken(folder: Path, *rest):
        (folder / "half").write_text("x")
        raise KeyboardInterrupt

    monkeypatch.setattr(run.backbone, "save_lora", broken)
    with pytest.raises(KeyboardInterrupt):
        run.export(finished)
    assert digests(finished / "lora") == before
    assert not list(finished.glob("*.partial"))


def test_a_reward_given_in_python_is_asked_for_again(finished: Path, capsys):
    """No other reward takes its place, whoever goes on with the run."""
    config = load_recipe(str(finished))
    Run(config, reward=brightness).fit(resume=True)
    written = load_recipe(str(finished))
    assert written.reward == "python:brightness"
    with pytest.raises(ValueError, match=r"give it again as Run\(\.\.\., reward=\.\.\.\).*my_rewards.py:brightness"):
        Scorer(written.reward, written.scoring)
    assert cli.main(["train", str(finished), "--resume", "--iterations", "2"]) == 2
    assert "is a function that the run was given in Python" in capsys.readouterr().err
    Run(written, reward=brightness).open(resume=True)  # it may be gone on with so


def test_a_run_that_saved_nothing_is_started_anew(tiny_config: Make, monkeypatch: pytest.MonkeyPatch):
    """Out of memory in the first iteration, say: the same command, with a smaller micro-batch, is all it takes."""
    config = tiny_config()

    def breaks(self):
        raise RuntimeError("CUDA out of memory")

    with monkeypatch.context() as patched:
        patched.setattr(Run, "step", breaks)
        with pytest.raises(RuntimeError, match="out of memory"):
            train(config)
    assert len(logged(config.folder)) == 1  # the evaluation of the start
    train(config.override({"batch.micro_batch": 6, "iterations": 1}))
    assert [row["iteration"] for row in logged(config.folder)] == [0, 1, 1]


def test_a_run_is_not_written_over(finished: Path):
    config = load_recipe(str(finished))
    with pytest.raises(UserError, match="already holds a run"):
        train(config)
    shutil.rmtree(finished / "checkpoints")
    with pytest.raises(UserError, match="already holds a run"):  # its LoRA is there
        train(config)
    with pytest.raises(UserError, match="holds no checkpoint"):
        train(config, resume=True)


def test_a_folder_that_was_copied_is_a_run_of_its_own(finished: Path, finished_run: Path, monkeypatch):
    assert load_recipe(str(finished)).folder == finished != finished_run
    before = (finished_run / LOG).read_text()
    run = Run(load_recipe(str(finished)).override({"iterations": 2}))
    run.open(resume=True)
    run.save()
    assert load_recipe(str(finished)).iterations == 2
    assert load_recipe(str(finished_run)).iterations == 1
    assert (finished_run / LOG).read_text() == before
    monkeypatch.chdir(finished.parent)
    assert load_recipe("copy").folder == Path("copy")
    monkeypatch.chdir(finished)
    assert load_recipe(".").folder == finished


def test_a_run_goes_on_behind_what_is_damaged(finished: Path, capsys):
    """A checkpoint and a line that were being written when the disk was full."""
    config = load_recipe(str(finished)).override({"iterations": 2})
    run = Run(config)
    run.open(resume=True)
    run.step()
    run.save()
    newest = RunFolder(finished).checkpoints()[-1]
    whole = newest.read_bytes()
    newest.write_bytes(whole[: len(whole) // 2] + bytes(len(whole) - len(whole) // 2))  # its second half is zeros
    with pytest.raises(DamagedError, match="do not match their checksum"):
        load_state(newest)
    newest.write_bytes(whole[:-1000])
    rows = logged(finished)
    with (finished / LOG).open("a") as file:
        file.write('{"iteration": 2, "sec')
    again = Run(config)
    again.open(resume=True)
    assert "is damaged" in " ".join(capsys.readouterr().out.split())
    assert again.iteration == 1
    assert logged(finished) == rows
    for old in RunFolder(finished).checkpoints():
        old.write_bytes(b"nothing")
    with pytest.raises(UserError, match=r"none of the checkpoints in .* can be read.*Of the oldest: .*damaged"):
        Run(config).open(resume=True)


def test_two_processes_do_not_share_a_folder(finished: Path):
    run = Run(load_recipe(str(finished)))
    with FileLock(finished / ".lock"), pytest.raises(UserError, match="in use by another process"):
        run.fit(resume=True)
    run.fit(resume=True)


def test_what_a_run_left_is_sampled_as_it_was_trained(finished: Path, tmp_path: Path):
    """Model, steps and solver are those of the run whose LoRA it is, unless others are asked for."""
    config = load_recipe(str(finished))
    config = config.override({"sampler.steps": 2, "sampler.solver": "dpm", "sampler.shift": 2.0})
    (finished / "config.yaml").write_text(dump(config))
    lora = finished / "lora"
    assert run_of(lora) == config
    assert run_of(tmp_path / "nowhere" / "lora") is None
    sample = ["sample", "--lora", str(lora), "--prompt", "a red circle", "--images", "1"]
    assert cli.main([*sample, "--out", str(tmp_path / "own.png")]) == 0
    assert cli.main([*sample, "--steps", "3", "--out", str(tmp_path / "more.png")]) == 0
    for steps, name in ((2, "own"), (3, "more")):
        path = config.model.path
        model = FewStepModel(path, lora, steps=steps, shift=2.0, solver="dpm", max_sequence_length=1)
        expected = model(["a red circle"])[0]
        np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / f"{name}.png")), expected)
    assert cli.main([*sample, "--out", str(tmp_path)]) == 2


def test_a_bundled_student_brings_its_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """And a LoRA in a folder that is called as a recipe brings its run's."""
    monkeypatch.chdir(tmp_path)
    assert cli.main(["sample", "--lora", "mini_signs", "--prompt", 'a sign that says "47"', "--images", "1"]) == 0
    (drawn,) = FewStepModel("mini_signs", "mini_signs")(['a sign that says "47"'])
    np.testing.assert_array_equal(np.asarray(Image.open("sample.png")), drawn)
    config = load_recipe("mini_ocr").override({"output": "."})
    (tmp_path / "mini_ocr").mkdir()
    (tmp_path / "mini_ocr" / "config.yaml").write_text(dump(config))
    found = run_of("mini_ocr/lora")
    assert found is not None
    assert found.model.path == "mini_signs"


def test_a_moved_run_finds_what_it_distilled(tiny_config: Make, tmp_path: Path):
    start = {"student_lora": str(tmp_path / "old" / "distill" / "lora"), "fake_lora": "elsewhere/lora_fake"}
    config = tiny_config(distill_with="mini_distill", model=start, name="old")
    moved = tmp_path / "new"
    for lora in ("lora", "lora_fake"):
        (moved / "distill" / lora).mkdir(parents=True)
    (moved / "config.yaml").write_text(dump(config))
    model = load_recipe(str(moved)).model
    assert model.student_lora == str(moved / "distill" / "lora")
    assert model.fake_lora == "elsewhere/lora_fake"


def test_an_evaluation_keeps_out_of_a_runs_folder(finished: Path, capsys):
    before = (finished / "config.yaml").read_text()
    assert cli.main(["eval", "mini", "--lora", "mini", "--out", str(finished)]) == 2
    assert "is a run's folder: name another" in capsys.readouterr().err
    assert (finished / "config.yaml").read_text() == before


def test_scores_and_pictures_are_not_taken_for_those_of_others(tiny_config: Make, random_model, tmp_path: Path, capsys):
    """What is kept goes by the exact metric, prompts with what rewards know of them, and the weights that drew."""
    model = tmp_path / "model"
    shutil.copytree(random_model, model)
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "a red circle", "target": 1}\n{"prompt": "a cross", "target": 2}\n')
    mine = tmp_path / "mine.py"
    mine.write_text("def target(images, prompts, metadata):\n    return [m['target'] for m in metadata]\n")
    task = {"name": "prompts", "prompts": str(prompts), "weights": None}
    config = tiny_config(reward=f"{mine}:target", task=task, model={"path": str(model)}, evaluation={"prompts": 2})
    (tmp_path / "recipe.yaml").write_text(dump(config))
    arguments = ["eval", str(tmp_path / "recipe.yaml"), "--lora", "none", "--base-steps", "0"]
    arguments += ["--out", str(tmp_path / "eval"), "--metrics"]

    def means(*metrics: str) -> list[float]:
        assert cli.main([*arguments, *metrics]) == 0
        (found,) = json.loads((tmp_path / "eval" / "results.json").read_text())["models"]
        return [found["scores"][name]["mean"] for name in (f"{mine}:target", *metrics)]

    jpeg = "jpeg_compressibility"
    target, plus, minus = means(f"{mine}:target + 0.5*{jpeg}", f"{mine}:target + -0.5*{jpeg}")
    assert target == 1.5
    assert plus < 1.5 < minus
    prompts.write_text(prompts.read_text().replace(": 2", ": 4"))
    assert means()[0] == 2.5
    mine.write_text(mine.read_text().replace("m['target'] for", "2 * m['target'] for"))
    assert means()[0] == 5.0
    weights = model / "transformer" / "diffusion_pytorch_model.safetensors"
    raw = bytearray(weights.read_bytes())
    raw[-1] ^= 1
    weights.write_bytes(bytes(raw))
    capsys.readouterr()
    assert cli.main(arguments[:-1]) == 2
    assert "holds pictures of other prompts, noise or model" in capsys.readouterr().err
    shutil.rmtree(tmp_path / "eval" / "pictures")
    assert means()[0] == 5.0  # nothing of the other model is left
    capsys.readouterr()
    (tmp_path / "recipe.yaml").write_text(dump(config.override({"reward": "python:target"})))
    assert means(f"{mine}:target")[0] == 5.0
    assert "python:target was given to the run in Python: it is left out here" in capsys.readouterr().out


def test_two_evaluations_in_one_folder_do_not_mix(tiny_config: Make, tmp_path: Path, capsys, monkeypatch):
    """The second has begun before the first had a picture."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(dump(tiny_config(reward="jpeg_compressibility")))
    arguments = ["eval", str(recipe), "--lora", "none", "--base-steps", "0", "--out", str(tmp_path / "eval")]
    sampled = Comparison.sample

    def late(self: Comparison) -> None:
        monkeypatch.setattr(Comparison, "sample", lambda self: None)
        cli.main([*arguments, "--prompts", "3"])
        sampled(self)

    monkeypatch.setattr(Comparison, "sample", late)
    assert cli.main(arguments) == 2
    assert "another evaluation has begun" in capsys.readouterr().err
    assert not list((tmp_path / "eval").rglob("*.png"))
