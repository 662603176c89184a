"""Configuration, command line, rewards, checkpoints: what users touch, and how it fails."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from tdm_r1 import cli
from tdm_r1.config.load import load_recipe
from tdm_r1.config.recipes import recipe_names
from tdm_r1.config.run import dump, validate
from tdm_r1.errors import UserError
from tdm_r1.mini.report import changes, finished_run, markdown
from tdm_r1.tasks.prompt_files import PromptFileTask, read_prompts
from tdm_r1.train.checkpoint import load_state, save_state

SOURCE = Path(__file__).parent.parent / "src" / "tdm_r1"

# ------------------------------------------------------------------------------------------ configuration


@pytest.mark.parametrize("name", recipe_names())
def test_recipes_resolve_and_round_trip(name: str, tmp_path: Path):
    config = load_recipe(name)
    (tmp_path / "config.yaml").write_text(dump(config))
    assert load_recipe(str(tmp_path)) == config.override({"output": tmp_path.parent, "name": tmp_path.name})
    assert load_recipe(str(tmp_path / "config.yaml")) == config


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"surrogate": {"draw": 2}}, r"unknown setting surrogate\.draw = 2"),
        ({"name": "../elsewhere"}, r"^name = '\.\./elsewhere': the run's folder lies inside output"),
        ({"name": "/elsewhere"}, r"^name = '/elsewhere': the run's folder lies inside output"),
        (
            {"reward": "ocr + http://me:opensesame@host:80/score"},
            r"^reward has a URL with a name, a password or a token for host, and (?!.*opensesame)",
        ),
        ({"reward": "http://me:open@sesame@host/score"}, r"^reward has a URL .* for host, and (?!.*(open|sesame))"),
        ({"reward": "http://host/score?token=opensesame"}, r"^reward has a URL .* for host, and (?!.*opensesame)"),
        (
            {"scoring": {"environments": {"ocr": {"pip": ["--index-url https://me:opensesame@host/simple"]}}}},
            r"^scoring\.environments of 'ocr' has a URL .* for host, and (?!.*opensesame)",
        ),
        (
            {"scoring": {"environments": {"ocr": {"env_vars": {"WHO": "opensesame"}}}}},
            r"^scoring\.environments = \['ocr'\] with scoring\.backend = 'processes': (?!.*opensesame)",
        ),
        ({"name": "."}, r"^name = '\.': the run's folder lies inside output"),
        (
            {"scoring": {"environments": {"ocr": {"env_vars": {"HF_TOKEN": "opensesame"}}}}},
            r"^scoring\.environments has HF_TOKEN for 'ocr', and (?!.*opensesame)",
        ),
        ({"surrogate": {"reference": "dynamic", "ema_decay": 0.995}}, r"^surrogate\.ema_decay = 0\.995 with reference"),
        (
            {"surrogate": {"added_delta": 1.0}, "model": {"roles": "full"}},
            r"^surrogate\.added_delta = 1\.0 with model",
        ),
        (
            {"model": {"roles": "full", "student_lora": "here"}},
            r"^model\.student_lora = 'here' with model\.roles = full: .* merge it into the model",
        ),
        ({"distill_with": "x", "model": {"roles": "full"}}, r"^distill_with = 'x' with model\.roles = full"),
        (
            {"surrogate": {"added_delta": 0.0, "added_delta_exported": 1.6}},
            r"^surrogate\.added_delta_exported = 1\.6 with added_delta = 0",
        ),
        (
            {"tdm": {"fake_scores": "two"}, "sampler": {"steps": 1}},
            r"^tdm\.fake_scores = two with sampler\.steps = 1",
        ),
        (
            {"model": {"dtype": "bfloat16", "merge": True}},
            r"^model\.merge = True with model\.dtype = bfloat16: .* are lost in bfloat16; set model\.merge to false",
        ),
        (
            {"model": {"dtype": "bfloat16"}, "surrogate": {"weights": "full", "added_delta": 1.0}},
            r"^surrogate\.added_delta = 1\.0 with surrogate\.weights = full and model\.dtype = bfloat16",
        ),
        (
            {"model": {"teacher": "other/base"}, "surrogate": {"weights": "full", "added_delta": 1.0}},
            r"^surrogate\.added_delta = 1\.0 with surrogate\.weights = full and model\.teacher = 'other/base'",
        ),
        (
            {"model": {"shard": True}, "surrogate": {"weights": "full", "added_delta": 1.0}},
            r"^surrogate\.added_delta = 1\.0 with surrogate\.weights = full and model\.shard = True",
        ),
        ({"evaluation": {"also": ["geneval"]}}, r"evaluation\.also = 'geneval': this task has no metrics"),
        ({"model": {"dtype": "float16"}}, r"model\.dtype = 'float16': .*'float32' or 'bfloat16'"),
        ({"iterations": 0}, "iterations = 0: .*greater than or equal to 1"),
        ({"batch": {"group": 1}}, r"batch\.group = 1: tdm_r1 compares samples"),
        ({"task": {"name": "prompts"}}, r"task\.prompts = None with task\.name = 'prompts': give a file of prompts"),
        ({"batch": {"trained": 1}}, r"batch\.trained = 1: one sample of a group has nothing to be compared with"),
        (
            {"algorithm": "tdm", "batch": {"prompts": 1, "group": 1}, "tdm": {"fake_scores": "two"}},
            r"tdm\.fake_scores = two with one sample an iteration",
        ),
        (
            {"tdm": {"fake_scores": "two"}, "surrogate": {"reference": "fake"}},
            r"^surrogate\.reference = fake with tdm\.fake_scores = two: which of them is not defined; set "
            r"tdm\.fake_scores to one, or use another reference$",
        ),
        ({"batch": {"group": 8, "trained": 9}}, r"^batch\.trained = 9 is more than batch\.group = 8: lower it$"),
        ({"surrogate": {"draws": 0}}, r"^surrogate\.draws = 0 without model\.surrogate_lora"),
        (
            {"surrogate": {"weights": "full"}, "model": {"surrogate_lora": "here"}},
            r"^model\.surrogate_lora = 'here' with surrogate\.weights = full",
        ),
        ({"algorithm": "nft", "batch": {"kl_prompts": 4}}, r"^batch\.kl_prompts = 4: nft has none"),
        ({"seed": -1}, r"seed = -1: .*greater than or equal to 0"),
        ({"evaluation": {"seed": -1}}, r"evaluation\.seed = -1: .*greater than or equal to 0"),
        (
            {"task": {"name": "mini_signs", "weights": {"counting": 1}}},
            r"task\.weights = .*does not take it: set task\.weights to null",
        ),
        (
            {"task": {"name": "prompts", "prompts": "a.txt", "weights": {"counting": 1}}},
            r"task\.weights = .*does not take it: set task\.weights to null",
        ),
        (
            {"task": {"eval_prompts": "x.txt"}},
            r"task\.eval_prompts = x\.txt with task\.name = 'mini', which",
        ),
        ({"surrogate": {"time_range": [0.9, 0.3]}}, r"surrogate\.time_range = .*must satisfy 0 <= low < high <= 1"),
        ({"surrogate": {"loss": "dpo"}}, r"surrogate\.loss = 'dpo': .*'anchored' or 'preference'"),
    ],
)
def test_bad_configuration_names_field_value_and_fix(values: dict, message: str):
    with pytest.raises(UserError, match=message) as error:
        validate(values)
    assert "\n" not in str(error.value)


def test_settings_at_the_edge_are_taken():
    two = {"fake_scores": "two"}
    validate({"algorithm": "tdm", "batch": {"prompts": 2, "group": 1}, "tdm": two, "sampler": {"steps": 2}})
    validate({"batch": {"group": 2, "trained": 2}})
    validate({"tdm": two, "surrogate": {"reference": "static"}})
    validate({"tdm": {"fake_scores": "one"}, "surrogate": {"reference": "fake"}})


def test_a_recipe_extends_another_key_by_key(tmp_path: Path):
    file = tmp_path / "mine.yaml"
    file.write_text("extends: mini\nname: mine\nsurrogate: {draws: 2}\n")
    assert load_recipe(str(file)) == load_recipe("mini").override({"name": "mine", "surrogate.draws": 2})
    file.write_text(f"extends: {file}\n")
    with pytest.raises(UserError, match="extends itself"):
        load_recipe(str(file))
    file.write_text("extends: nobody\n")
    with pytest.raises(UserError, match="recipe 'nobody' is neither"):
        load_recipe(str(file))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "holds nothing"),
        (b"- mini\n", "holds a list"),
        (b"\x89PNG\xff", "is no text in UTF-8"),
        (b"extends: mini\nname: a\nname: b\n", r"name is given twice .*line 1"),
        (b"extends: mini\nbatch: {group: 2, group: 3}\n", "group is given twice"),
        (b"a: !!python/object/apply:os.getcwd []\n", "could not determine a constructor"),
    ],
)
def test_a_file_that_is_no_recipe_is_named(content: bytes, message: str, tmp_path: Path):
    file = tmp_path / "mine.yaml"
    file.write_bytes(content)
    with pytest.raises(UserError, match=rf"mine\.yaml' .*{message}"):
        load_recipe(str(file))


# ------------------------------------------------------------------------------------------ command line


def test_dry_run_prints_the_resolved_configuration(capsys):
    assert cli.main(["train", "mini", "--dry-run", "--surrogate.draws", "7", "--reward", "mine.py:f"]) == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["surrogate"]["draws"] == 7
    assert printed["reward"] == "mine.py:f"


PROMPTS = ("--task.name", "prompts", "--task.weights", "None", "--task.prompts")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["train", "nothing"], "recipe 'nothing' is neither a run's folder, nor a YAML file, nor one of: mini"),
        (["fly"], "unknown command 'fly'"),
        (["distill", "mini", "--dry-run"], "distill needs a recipe of tdm"),
        (["train", "mini", "--reward", "nobody"], "reward = 'nobody' is not known: use one of mini"),
        (["train", "mini", "--reward", "gone.py:f"], "no such file 'gone.py'"),
        (["train", "mini", "--task.name", "prompts", "--task.weights", "None"], "give a file of prompts"),
        (["train", "mini", "--task.name", "prompts", "--task.prompts", "a.txt"], "set task.weights to null"),
        (["train", "mini", *PROMPTS, "gone.txt"], "no such file"),
        (["train", "mini", "--model.device", "cuda"], "model.device = 'cuda' cannot be used"),
        (["train", "mini", "--from", "3"], "--from = 3: works only together with --resume"),
        (["sample", "--prompt", "a circle", "--lora", "gone"], "no LoRA at 'gone'"),
        (["sample", "--prompt", "a circle", "--images", "0"], "--images = 0: at least one"),
    ],
)
def test_errors_are_one_line(args: list[str], message: str, capsys, tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    try:
        assert cli.main(args) == 2
    except SystemExit as stop:  # tyro prints its own box for what does not parse
        assert stop.code == 2  # noqa: PT017
    error = capsys.readouterr().err
    assert message in " ".join(error.replace("│", " ").split())
    assert not list(tmp_path.iterdir())  # nothing was written


def test_a_reader_that_has_seen_enough_is_no_error(tmp_path: Path):
    command = f"{sys.executable} -m tdm_r1 train sd35m_geneval --dry-run | head -n 1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, cwd=tmp_path, check=True)
    assert done.stdout == "algorithm: tdm_r1\n"
    assert done.stderr == ""


def test_unknown_flag_fails(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["train", "mini", "--surrogate.drows", "2"])
    assert stop.value.code == 2
    assert "--surrogate.draws" in capsys.readouterr().err  # the near miss is named


def test_help_lists_commands_and_recipes(capsys):
    assert cli.main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(word in text for word in ("train", "distill", "sample", "eval", "mini path", *recipe_names()))


# ------------------------------------------------------------------------------------------ tasks


def test_prompt_files(tmp_path: Path):
    text = tmp_path / "a.txt"
    text.write_text("a cat\n\na dog\n")
    assert [p.text for p in PromptFileTask(text).eval_prompts(3)] == ["a cat", "a dog", "a cat"]
    (tmp_path / "held_out.txt").write_text("a fox\n")
    apart = PromptFileTask(text, tmp_path / "held_out.txt")
    assert [p.text for p in apart.eval_prompts(2)] == ["a fox", "a fox"]
    assert {p.text for p in apart.train_prompts(20, np.random.default_rng(0))} == {"a cat", "a dog"}
    rows = tmp_path / "a.jsonl"
    rows.write_text(json.dumps({"prompt": "a cat", "count": 2}) + "\n")
    assert PromptFileTask(rows).eval_prompts(1)[0].metadata == {"count": 2}
    rows.write_text('{"text": "a cat"}\n')
    with pytest.raises(ValueError, match=r"a\.jsonl:1: expected a JSON object with a 'prompt'"):
        PromptFileTask(rows)
    text.write_text("\n")
    with pytest.raises(ValueError, match="contains no prompts"):
        PromptFileTask(text)


def test_prompt_files_as_spreadsheets_and_editors_write_them(tmp_path: Path):
    mark = b"\xef\xbb\xbf"
    for name, text in (
        ("a.txt", "a cat\r\na café\r\n"),
        ("a.csv", "prompt,n\r\na cat,1\r\na café,2\r\n"),
        ("a.jsonl", '{"prompt": "a cat"}\r\n{"prompt": "a café"}\r\n'),
    ):
        (tmp_path / name).write_bytes(mark + text.encode())
        assert [p.text for p in read_prompts(tmp_path / name, "task.prompts")] == ["a cat", "a café"], name
    (tmp_path / "a.jsonl").write_text('{"prompt": "two\u2028lines"}\n', encoding="utf-8")
    assert read_prompts(tmp_path / "a.jsonl", "task.prompts")[0].text == "two\u2028lines"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "a.csv",
            b"prompt\na red circle, two crosses\n",
            r"a\.csv:2: more columns .* quote a prompt that holds a comma",
        ),
        ("a.jsonl", b'{"prompt": "a"}\n\n{"prompt": null}\n', r"a\.jsonl:3: prompt = None is no text"),
        ("a.jsonl", b'{"prompt": ["a"]}\n', r"a\.jsonl:1: prompt = \['a'\] is no text"),
        ("a.txt", b"caf\xe9\n", r"task\.prompts = .*a\.txt' is no text in UTF-8"),
        ("a.json", b'{"prompts": ["a"]}', r"a\.json: expected a list of prompts, found a JSON dict"),
        ("a.json", b'["a", 3]', r"a\.json, entry 2: expected a JSON object with a 'prompt', got 3"),
        ("a.json", b"[", r"a\.json: this is no JSON"),
        ("a.md", b"a cat", r"a\.md': give a file of one of the kinds \.txt, \.jsonl"),
        ("a.csv", b"Category; Text\na;b\n", r"expected a column 'prompt', found Category; Text"),
    ],
)
def test_prompt_files_that_would_be_misread_are_refused(name: str, content: bytes, message: str, tmp_path: Path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_prompts(tmp_path / name, "task.prompts")


@pytest.mark.parametrize(
    ("name", "content", "texts"),
    [
        ("a.json", '[\n  "a fox, oil",\n  {"prompt": "a lantern", "n": 1}\n]\n', ["a fox, oil", "a lantern"]),
        ("a.tsv", 'Prompt\tNote\n"HELLO" on a wall\tx\na key\ty\n', ['"HELLO" on a wall', "a key"]),
        ("a.csv", 'Category, Prompt \nSigns, "a shop, with ""OPEN"""\n', ['a shop, with "OPEN"']),
    ],
)
def test_prompts_are_read_as_they_stand(name: str, content: str, texts: list[str], tmp_path: Path):
    (tmp_path / name).write_text(content)
    assert [p.text for p in read_prompts(tmp_path / name, "task.prompts")] == texts


def test_prompt_tables_and_datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    drawbench = tmp_path / "drawbench.csv"
    drawbench.write_text('Prompts,Category\n"a red car, parked",Colors\na pair of dogs,Counting\n')
    first, second = read_prompts(drawbench, "task.prompts")
    assert (first.text, first.metadata) == ("a red car, parked", {"Category": "Colors"})
    assert second.text == "a pair of dogs"
    parti = tmp_path / "parti.tsv"
    parti.write_text("Prompt\tCategory\nbond\tAbstract\n")
    assert read_prompts(parti, "task.prompts")[0].text == "bond"
    parti.write_text("text\tCategory\nbond\tAbstract\n")
    with pytest.raises(ValueError, match=r"expected a column 'prompt', found text, Category"):
        read_prompts(parti, "task.prompts")

    def download(repo: str, file: str, *, repo_type: str) -> str:
        if (repo, file, repo_type) != ("owner/set", "data/drawbench.csv", "dataset"):
            raise OSError("no such file on the hub")
        return str(drawbench)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    assert len(read_prompts(Path("owner/set/data/drawbench.csv"), "task.prompts")) == 2
    with pytest.raises(
        ValueError, match=r"task\.prompts = .*no such file, and the hub gives no c\.txt of a dataset a/b"
    ):
        read_prompts(Path("a/b/c.txt"), "task.prompts")


# ------------------------------------------------------------------------------------------ checkpoints


def test_checkpoint_round_trip(tmp_path: Path):
    state = {
        "a": {0: torch.arange(3), "x": [torch.ones(2, dtype=torch.bfloat16), 1.5, None, True, "text"]},
        "same": torch.zeros(2),
    }
    state["again"] = state["same"]  # shared storage
    save_state(tmp_path / "c.safetensors", state)
    loaded = load_state(tmp_path / "c.safetensors")
    assert loaded["a"][0].tolist() == [0, 1, 2]
    assert loaded["a"]["x"][0].dtype == torch.bfloat16
    assert loaded["a"]["x"][1:] == [1.5, None, True, "text"]
    assert [p.name for p in tmp_path.iterdir()] == ["c.safetensors"]


def test_checkpoint_refuses_other_things(tmp_path: Path):
    from safetensors.torch import save_file

    with pytest.raises(TypeError, match="only tensors and plain values"):
        save_state(tmp_path / "c.safetensors", {"f": object()})
    assert not list(tmp_path.iterdir())
    (tmp_path / "full").mkdir()  # stands for a disk that is: it cannot be replaced by a file
    (tmp_path / "full" / "x").touch()
    with pytest.raises(OSError, match="full"):
        save_state(tmp_path / "full", {"a": torch.zeros(1)})
    assert [p.name for p in tmp_path.iterdir()] == ["full"]
    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="not a tdm-r1 checkpoint"):
        load_state(tmp_path / "other.safetensors")


def test_a_study_takes_up_runs_that_finished_with_its_settings_and_no_others(tmp_path: Path):
    wanted = load_recipe("mini").override({"output": tmp_path})

    def leave(name: str, *, iterations: int = wanted.iterations, more: str = "", **changes: object) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.yaml").write_text(dump(wanted.override({"name": name} | changes)) + more)
        (folder / "result.json").write_text(json.dumps({"iterations": iterations}))
        return folder

    leave("study_mini_seed0", iterations=wanted.iterations - 1)
    leave("study_mini_seed0_2", more="of_another_version: 1\n")
    leave("study_mini_seed0_3", **{"surrogate.draws": 1})
    leave("study_mini_seed1")
    assert finished_run(wanted, "study_mini_seed0") is None
    last = leave("study_mini_seed0_4")
    assert finished_run(wanted, "study_mini_seed0") == last


def test_changes_are_measured_on_the_same_noise():
    """Draws differ more from each other than before and after do: the change has the smaller error."""
    start = [{"frechet": 5.0}, {"frechet": 9.0}, {"frechet": 7.0}]
    end = [{"frechet": 4.0}, {"frechet": 7.0}, {"frechet": 4.0}]
    found = changes(start, end)["frechet"]
    assert found == {"mean": -2.0, "error": pytest.approx(1 / 3**0.5, abs=1e-4)}
    record = {"seed": 0, "minutes": 1.0, "reward_evaluations": 8}
    record |= {"base": {"frechet": 3.0}, "before": {"frechet": 6.0}, "after": {"frechet": 4.5}}
    records = {"old": [record], "new": [record | {"change": {"frechet": found}}] * 4}
    page = markdown({"recipe": records, "noise_floor": {"frechet": 0.5}})
    assert "| frechet | 3.000 | 6.000 | 4.500 |  | 0.5 | down |" in page
    assert "| frechet | 3.000 ± 0.000 | 6.000 ± 0.000 | 4.500 ± 0.000 | -2.000 ± 0.289 | 0.5 | down |" in page
