"""Rewards by name, and the commands that list, serve and use them."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from matplotlib.cbook import get_sample_data
from PIL import Image, ImageFilter

from reward_examples import IMAGES, SCORES, TEXTS, here
from tdm_r1 import cli
from tdm_r1.errors import UserError
from tdm_r1.rewards.folder import picture_files, prompts_of
from tdm_r1.rewards.overview import is_cached, state_of
from tdm_r1.rewards.registry import BUILT_IN, Entry, load_reward

BRIGHTNESS = "reward_examples:brightness"


def test_an_extra_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setitem(BUILT_IN, "far", Entry("x", BRIGHTNESS, None, extra="far", modules=("no_such_module",)))
    with pytest.raises(ValueError, match=r"needs no_such_module, which is not installed: pip install 'tdm-r1\[far\]'"):
        load_reward("far")


def test_jpeg_rewards_are_the_file_size():
    flat, noise = IMAGES[0], np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    up = load_reward("jpeg_incompressibility")(np.stack([flat, noise]), ["", ""], [{}, {}])
    down = load_reward("jpeg_compressibility")(np.stack([flat, noise]), ["", ""], [{}, {}])
    assert up[0] < up[1]
    np.testing.assert_array_equal(up, -np.array(down))
    assert (up * 1000 == np.round(up * 1000)).all()  # kB


def test_brisque_prefers_the_photograph():
    pytest.importorskip("brisque")  # not among the requirements of development: it is compiled on installing
    with get_sample_data("grace_hopper.jpg") as file:
        photograph = np.asarray(Image.open(file).convert("RGB").resize((256, 256)))
    noise = np.random.default_rng(0).normal(0, 40, photograph.shape)
    noisy = (photograph + noise).clip(0, 255).astype(np.uint8)
    blurred = np.asarray(Image.fromarray(photograph).filter(ImageFilter.GaussianBlur(3)))
    flat = np.full_like(photograph, 128)
    scores = load_reward("brisque")(np.stack([photograph, noisy, blurred, flat]), [""] * 4, [{}] * 4).values
    assert scores[0] > -20
    assert (scores[1:3] < scores[0] - 30).all()
    assert np.isnan(scores[3])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for i, image in enumerate(IMAGES):
        size = (8, 8) if i != 3 else (12, 10)
        Image.fromarray(image).resize(size).save(tmp_path / f"{i:02d}.png")
    return tmp_path


def test_score_a_folder(folder: Path, capsys):
    prompts = folder / "prompts.txt"
    prompts.write_text("\n".join(TEXTS))
    out = folder / "scores.jsonl"
    args = ["score", str(folder), "--reward", here("brightness"), "--prompts", str(prompts), "--out", str(out)]
    assert cli.main([*args, "--chunk", "4"]) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [r["file"] for r in rows] == [f"{i:02d}.png" for i in range(6)]
    assert [r["prompt"] for r in rows] == TEXTS
    assert [r["score"] for r in rows] == pytest.approx(SCORES)
    assert "6 pictures" in capsys.readouterr().out


def test_pictures_are_taken_as_people_count(tmp_path: Path):
    for name in ("10.png", "2.png", "1.png", "a/10.png", "a/9.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.fromarray(IMAGES[0]).save(tmp_path / name)
    names = [f.relative_to(tmp_path).as_posix() for f in picture_files(tmp_path)]
    assert names == ["1.png", "2.png", "10.png", "a/9.png", "a/10.png"]


def test_a_picture_that_cannot_be_read_costs_its_own_score(folder: Path, capsys):
    for name in ("01.png", "03.png", "04.png"):
        (folder / name).write_bytes(b"\x89PNG half a picture")
    out = folder / "new" / "scores.jsonl"
    assert cli.main(["score", str(folder), "--reward", here("graded"), "--out", str(out), "--chunk", "4"]) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    lost = [None if i in (1, 3, 4) else score for i, score in enumerate(SCORES)]
    assert [r["score"] for r in rows] == [pytest.approx(s) if s is not None else None for s in lost]
    assert [r["parts"]["strict"] is None for r in rows] == [s is None for s in lost]
    assert "04.png' cannot be read as a picture" in " ".join(capsys.readouterr().out.split())


def test_pictures_are_scored_upright(tmp_path: Path):
    """As viewers show them: cameras store how to turn a picture beside its pixels."""
    tall = Image.fromarray(np.repeat(np.repeat(IMAGES[2], 4, axis=0), 2, axis=1))
    for orientation in (1, 2, 3, 6, 8):
        exif = Image.Exif()
        exif[0x0112] = orientation
        stored = tall if orientation < 5 else tall.transpose(Image.Transpose.ROTATE_90)
        stored.save(tmp_path / f"{orientation}.jpg", exif=exif)
    (tmp_path / "shape.py").write_text(
        "def f(images, p, m):\n    return [images.shape[1] / images.shape[2]] * len(images)\n"
    )
    out = tmp_path / "scores.jsonl"
    assert cli.main(["score", str(tmp_path), "--reward", f"{tmp_path}/shape.py:f", "--out", str(out)]) == 0
    assert [json.loads(line)["score"] for line in out.read_text().splitlines()] == [2.0] * 5


def test_decoders_that_raise_anything_cost_one_picture(folder: Path):
    """PIL raises a SyntaxError on a PNG whose chunks are damaged."""
    raw = bytearray((folder / "01.png").read_bytes())
    raw[raw.index(b"IDAT") - 1] = 5  # the chunk's length: what follows is no chunk
    (folder / "01.png").write_bytes(bytes(raw))
    out = folder / "scores.jsonl"
    assert cli.main(["score", str(folder), "--reward", here("brightness"), "--out", str(out)]) == 0
    scores = [json.loads(line)["score"] for line in out.read_text().splitlines()]
    assert [i for i, score in enumerate(scores) if score is None] == [1]


def test_what_macos_puts_beside_pictures_is_no_picture(folder: Path):
    names = [f.name for f in picture_files(folder)]
    (folder / "__MACOSX").mkdir()
    for name in ("._00.png", ".hidden.png", "__MACOSX/._01.png", "__MACOSX/02.png"):
        (folder / name).write_bytes(b"\x00\x05\x16\x07")
    assert [f.name for f in picture_files(folder)] == names


def test_rows_name_their_picture_as_image_folders_do(folder: Path):
    rows = [{"file_name": f"{i:02d}.png", "prompt": text} for i, text in enumerate(TEXTS)]
    (folder / "metadata.jsonl").write_text("\n".join(json.dumps(row) for row in rows[::-1]))
    files = picture_files(folder)
    assert [p.text for p in prompts_of(folder, files, folder / "metadata.jsonl")] == TEXTS


def test_a_folder_without_any_score_is_a_failure(folder: Path, capsys):
    assert cli.main(["score", str(folder), "--reward", here("raises")]) == 1
    assert "no image has a score" in capsys.readouterr().err


def test_prompts_that_a_reward_cannot_score_are_told_first(folder: Path, capsys):
    (folder / "prompts.txt").write_text("\n".join([*(f'a sign that says "{t}"' for t in "abcde"), "a blank sign"]))
    arguments = ["score", str(folder), "--prompts", str(folder / "prompts.txt"), "--reward"]
    assert cli.main([*arguments, "ocr_line"]) == 2
    assert "reward = 'ocr_line' cannot score prompt 6: prompt 'a blank sign' has no text" in capsys.readouterr().err


def test_scoring_that_is_broken_off_leaves_what_it_had(folder: Path, tmp_path: Path):
    out = tmp_path / "scores.jsonl"
    out.write_text("of yesterday\n")
    (folder / "prompts.jsonl").write_text("\n".join(json.dumps({"prompt": t, "i": i}) for i, t in enumerate(TEXTS)))
    args = ["--prompts", str(folder / "prompts.jsonl"), "--out", str(out), "--chunk", "2"]
    assert cli.main(["score", str(folder), "--reward", here("interrupted_at_three"), *args]) == 130
    assert out.read_text() == "of yesterday\n"
    rows = [json.loads(line) for line in (tmp_path / "scores.jsonl.partial").read_text().splitlines()]
    assert [r["score"] for r in rows] == pytest.approx(SCORES[:2])


def test_a_reward_of_ones_own_may_import_its_neighbours(tmp_path: Path):
    (tmp_path / "neighbour_of_mine.py").write_text("SCORE = 0.25\n")
    (tmp_path / "mine_too.py").write_text(
        "import neighbour_of_mine\ndef f(images, prompts, metadata):\n    return [neighbour_of_mine.SCORE]\n"
    )
    assert load_reward(f"{tmp_path}/mine_too.py:f")(IMAGES[:1], TEXTS[:1], [{}]) == [0.25]
    (tmp_path / "lost.py").write_text("import no_such_neighbour\n")
    with pytest.raises(ValueError, match=r"lost\.py' cannot be imported: No module named 'no_such_neighbour'"):
        load_reward(f"{tmp_path}/lost.py:f")
    (tmp_path / "wrong.py").write_text("def f(:\n")
    with pytest.raises(ValueError, match=r"wrong\.py' cannot be imported: SyntaxError: .*line 1"):
        load_reward(f"{tmp_path}/wrong.py:f")


def test_prompts_go_with_pictures_by_name(folder: Path, tmp_path: Path):
    rows = [{"file": f"{i:02d}.png", "prompt": TEXTS[i], "i": 10 * i} for i in reversed(range(6))]
    (tmp_path / "p.jsonl").write_text("\n".join(json.dumps(r) for r in rows))
    found = prompts_of(folder, picture_files(folder), tmp_path / "p.jsonl")
    assert found is not None
    assert [(p.text, p.metadata["i"]) for p in found] == [(t, 10 * i) for i, t in enumerate(TEXTS)]


@pytest.fixture
def geneval_layout(tmp_path: Path) -> Path:
    for i in range(2):
        (tmp_path / f"{i:05d}/samples").mkdir(parents=True)
        row = {"tag": "single_object", "include": [{"class": "cat", "count": 1}], "prompt": f"prompt {i}"}
        (tmp_path / f"{i:05d}/metadata.jsonl").write_text(json.dumps(row))
        for k in range(2):
            Image.fromarray(IMAGES[2 * i + k]).save(tmp_path / f"{i:05d}/samples/{k:04d}.png")
    return tmp_path


def test_pictures_of_one_name_are_told_apart(geneval_layout: Path):
    files = picture_files(geneval_layout)
    names = [f.relative_to(geneval_layout).as_posix() for f in files]
    rows = geneval_layout / "rows.jsonl"
    rows.write_text("\n".join(json.dumps({"file": name, "prompt": name}) for name in reversed(names)))
    assert [p.text for p in prompts_of(geneval_layout, files, rows) or []] == names
    rows.write_text(json.dumps({"file": "0000.png", "prompt": "which?"}))
    with pytest.raises(UserError, match=r"no row with file = '00000/samples/0000\.png'"):
        prompts_of(geneval_layout, files, rows)
    rows.write_text("\n".join([json.dumps({"file": names[0], "prompt": "a"})] * 2))
    with pytest.raises(UserError, match="two rows with file"):
        prompts_of(geneval_layout, files, rows)


def test_genevals_layout_brings_its_prompts(geneval_layout: Path, capsys):
    out = geneval_layout / "scores.jsonl"
    assert cli.main(["score", str(geneval_layout), "--reward", here("brightness"), "--out", str(out)]) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [r["prompt"] for r in rows] == ["prompt 0", "prompt 0", "prompt 1", "prompt 1"]
    assert rows[3]["file"] == "00001/samples/0001.png"


def test_genevals_figure_is_the_mean_of_its_families(geneval_layout: Path, capsys):
    """Its generator also leaves a grid beside the samples, which is no sample."""
    sheet = geneval_layout / "00001/metadata.jsonl"
    sheet.write_text(sheet.read_text().replace("single_object", "counting"))
    (geneval_layout / "00001/samples/0001.png").unlink()
    for i in range(2):
        Image.fromarray(IMAGES[5]).save(geneval_layout / f"{i:05d}/grid.png")
    assert cli.main(["score", str(geneval_layout), "--reward", here("graded")]) == 0
    rows = [line.replace("│", " ").split() for line in capsys.readouterr().out.splitlines()]
    shown = [
        (row[0], float(row[4] if row[0] == "mean" else row[1]))
        for row in rows
        if row and row[0] in ("single_object", "counting", "mean", "strict") and row[1] != "deviation"
    ]
    graded = [("single_object", 0.1), ("counting", 0.4), ("mean", 0.25)]
    strict = [("strict", 0.0), ("single_object", 0.0), ("counting", 0.0), ("mean", 0.0)]
    assert shown == [(name, pytest.approx(value)) for name, value in graded + strict]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["{}/gone"], "no such folder"),
        (["{}", "--prompts", "{}/two.txt"], "has 2 prompts for 6 pictures: give a line each"),
        (["{}", "--prompts", "{}/some.jsonl"], "has no row with file = '01.png'"),
        (["{}", "--reward", "far"], "reward = 'far' is not known"),
        (["{}", "--reward", "ocr"], "reward = 'ocr' looks at prompts: give --prompts"),
        (["{}", "--reward", "jpeg_compressibility + 0.1*pickscore"], "reward = 'pickscore' looks at prompts"),
        (["{}", "--reward", "ocr", "--prompts", "{}/six.txt"], "has no text to show"),
    ],
)
def test_score_errors_are_one_line(folder: Path, args: list[str], message: str, capsys):
    (folder / "two.txt").write_text("a\nb\n")
    (folder / "six.txt").write_text("a sign\n" * 6)
    (folder / "some.jsonl").write_text('{"file": "00.png", "prompt": "a"}\n')
    args = [a.format(folder) for a in args]
    rest = [] if "--reward" in args else ["--reward", here("brightness")]
    assert cli.main(["score", *args, *rest]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_rewards_are_listed_with_their_state(capsys, monkeypatch):
    monkeypatch.setitem(BUILT_IN, "far", Entry("x", BRIGHTNESS, None, extra="far", modules=("no_such_module",)))
    assert cli.main(["rewards"]) == 0
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert all(name in text for name in BUILT_IN)
    assert "tdm-r1[far]" in "".join(text.split())  # not taken for a style of the terminal's
    assert state_of(BUILT_IN["far"]) == "lacks no_such_module: pip install 'tdm-r1[far]'"
    assert state_of(BUILT_IN["mini"]) == "ready"
    assert state_of(Entry("x", BRIGHTNESS, None, weights=("nobody/nothing",))).startswith("installed; downloads")
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    assert state_of(Entry("x", BRIGHTNESS, None, environment=("NO_SUCH_KEY",))) == "installed; set NO_SUCH_KEY"


def test_weights_are_ready_when_the_very_file_is_there(tmp_path: Path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    snapshot = tmp_path / "models--xswu--HPSv2/snapshots/abc"
    snapshot.mkdir(parents=True)
    (snapshot / "README.md").touch()
    assert not is_cached("xswu/HPSv2")
    (snapshot / "HPS_v2_compressed.pt").touch()
    assert is_cached("xswu/HPSv2:HPS_v2_compressed.pt")
    assert not is_cached("xswu/HPSv2:HPS_v2.1_compressed.pt")
    assert not is_cached("xswu/HPSv2")  # which is no model in transformers' format
    (snapshot / "open_clip_model.safetensors").touch()
    assert not is_cached("xswu/HPSv2")
    (snapshot / "model.safetensors").touch()
    assert is_cached("xswu/HPSv2")


def test_a_broken_installation_is_not_called_ready(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "broken_engine.py").write_text("raise OSError('libGL.so.1: no such file')\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert "libGL.so.1" in state_of(Entry("x", BRIGHTNESS, None, extra="far", modules=("broken_engine",)))


LIGHT = """
import sys, threading, time, urllib.request
HEAVY = {"torch", "diffusers", "transformers", "peft", "accelerate", "scipy", "matplotlib", "safetensors"}
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in HEAVY:
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Absent())
from tdm_r1.cli import main
threading.Thread(target=main, args=(["serve-reward", sys.argv[1], "--port", sys.argv[2]],), daemon=True).start()
for _ in range(100):
    try:
        print(urllib.request.urlopen(f"http://127.0.0.1:{sys.argv[2]}/health").read().decode())
        break
    except OSError:
        time.sleep(0.1)
"""


def test_serving_a_reward_needs_no_torch(tmp_path: Path):
    """Environments of their own (scorers/) install this project without its dependencies."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    (tmp_path / "mine.py").write_text("def half(images, prompts, metadata):\n    return [0.5] * len(images)\n")
    args = [sys.executable, "-c", LIGHT, f"{tmp_path}/mine.py:half", port]
    done = subprocess.run(args, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == {"reward": f"{tmp_path}/mine.py:half"}


class Scorers:
    """Stands for the models of scorers/, which have an environment of their own; asks for pictures as they do."""

    @classmethod
    def from_pretrained(cls, name: str, **settings) -> Scorers:
        return cls()

    def __init__(self, device: str = "cuda") -> None: ...

    def reward(self, prompts: list[str], image_paths: list[Image.Image]) -> list[tuple[float, float]]:
        return [(float(image.size[0]), 0.5) for image in image_paths]

    def score(self, images: list[Image.Image]) -> list[float]:
        return [float(image.size[0]) for image in images]


@pytest.mark.parametrize("name", ["hpsv3", "deqa"])
def test_scorers_of_their_own_environment_load_their_model_with_the_file(name: str, monkeypatch: pytest.MonkeyPatch):
    """So a server serves once it can score, and says at once if it cannot."""
    reward = f"{Path(__file__).parent.parent}/scorers/{name}_reward.py:{name}"
    if name == "hpsv3":
        with pytest.raises(ValueError, match="No module named 'hpsv3'"):
            load_reward(reward)
        monkeypatch.setitem(sys.modules, "hpsv3", ModuleType("hpsv3"))
        sys.modules["hpsv3"].HPSv3RewardInferencer = Scorers
    else:
        monkeypatch.setattr("transformers.AutoModelForCausalLM", Scorers)
    assert load_reward(reward)(IMAGES, TEXTS, [{}] * len(IMAGES)) == [8.0] * len(IMAGES)
