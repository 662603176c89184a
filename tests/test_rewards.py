"""The reward layer: contracts, sums, what stops a run, worker processes, HTTP."""

from __future__ import annotations

import base64
import http.server
import json
import math
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tdm_r1 import cli
from tdm_r1.errors import UserError
from tdm_r1.rewards import BUILT_IN, Scorer, Scores, ScoringConfig, Watch, load_reward
from tdm_r1.rewards.commands import picture_files, prompts_of, state_of
from tdm_r1.rewards.http import RemoteReward, RewardServer, decode_image, encode_image
from tdm_r1.rewards.registry import Entry
from tdm_r1.rewards.scorer import Term, parse, standardised
from tdm_r1.rewards.scores import attempt, checked, joined
from tdm_r1.rewards.workers import Workers
from tdm_r1.tasks import Prompt

GREYS = (0, 51, 102, 153, 204, 255)
IMAGES = np.stack([np.full((8, 8, 3), v, np.uint8) for v in GREYS])
TEXTS = [f"prompt {i}" for i in range(len(GREYS))]
METADATA: list[dict] = [{"i": i} for i in range(len(GREYS))]
PROMPTS = [Prompt(t, m) for t, m in zip(TEXTS, METADATA, strict=True)]
SCORES = [v / 255 for v in GREYS]


def brightness(images, prompts, metadata):
    return images.mean((1, 2, 3)) / 255


def raises(images, prompts, metadata):
    raise RuntimeError("out of memory")


def dies_on_two(images, prompts, metadata):
    if any(m["i"] == 2 for m in metadata):
        os.kill(os.getpid(), 9)
    return brightness(images, prompts, metadata)


def hangs_on_three(images, prompts, metadata):
    if any(m["i"] == 3 for m in metadata):
        time.sleep(600)
    return brightness(images, prompts, metadata)


def refuses(images, prompts, metadata):
    raise UserError("prompt 0 has no target")


def here(name: str) -> str:
    return f"{__file__}:{name}"


# ------------------------------------------------------------------------------------------ contract


def test_users_own_reward(tmp_path: Path):
    path = tmp_path / "mine.py"
    path.write_text("def brightness(images, prompts, metadata):\n    return images.mean((1, 2, 3)) / 255\n")
    assert load_reward(f"{path}:brightness")(IMAGES, TEXTS, METADATA).tolist() == pytest.approx(SCORES)
    with pytest.raises(ValueError, match="has no function 'darkness'; it has: brightness"):
        load_reward(f"{path}:darkness")


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ([None, 0.5, 1], [math.nan, 0.5, 1.0]),
        (np.array([math.inf, -math.inf, 2.0]), [math.nan, math.nan, 2.0]),
        (Scores(np.array([1.0, math.nan, 3.0]), {"a": np.array([0.0, 1.0, 2.0])}), [1.0, math.nan, 3.0]),
    ],
)
def test_missing_scores_are_nan(given, expected: list[float]):
    np.testing.assert_array_equal(checked(given, 3).values, expected)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([0.0, 1.0], r"scores of shape \(2,\) for 3 pictures"),
        (0.5, r"scores of shape \(\) for 3 pictures"),
        (Scores(np.zeros(3), {"a": np.zeros(2)}), r"values of the part 'a' of shape \(2,\) for 3 pictures"),
    ],
)
def test_broken_contracts_say_how(given, message: str):
    with pytest.raises(ValueError, match=message):
        checked(given, 3)


def test_what_goes_wrong_costs_its_scores_and_is_told():
    scores = attempt(raises, IMAGES, TEXTS, METADATA)
    assert np.isnan(scores.values).all()
    assert len(scores.failures) == 1
    assert scores.failures[0].startswith("RuntimeError: out of memory (test_rewards.py:")
    with pytest.raises(UserError, match="no target"):  # wrong input is not a failure that passes
        attempt(refuses, IMAGES, TEXTS, METADATA)


def test_chunks_are_joined_in_order():
    a = Scores(np.array([1.0]), {"p": np.array([5.0])}, ("slow",))
    b = Scores(np.array([2.0, math.nan]), {}, ("slow", "dead"))
    both = joined([a, b])
    np.testing.assert_array_equal(both.values, [1.0, 2.0, math.nan])
    np.testing.assert_array_equal(both.parts["p"], [5.0, math.nan, math.nan])
    assert both.failures == ("slow", "dead")


# ------------------------------------------------------------------------------------------ sums


def test_sums_are_parsed():
    assert parse("ocr") == [Term("ocr", 1.0)]
    assert parse("ocr + 0.5*a.py:f + -2e-1 * http://x:1/+y") == [
        Term("ocr", 1.0),
        Term("a.py:f", 0.5),
        Term("http://x:1/+y", -0.2),
    ]
    for wrong, message in (("ocr + ", "is not a reward"), ("ocr + 2*ocr", "names 'ocr' twice")):
        with pytest.raises(UserError, match=message):
            parse(wrong)


def test_a_weighted_sum_and_its_breakdown():
    scorer = Scorer(f"{here('brightness')} + -0.5*jpeg_incompressibility", ScoringConfig())
    scores = scorer(IMAGES, PROMPTS)
    jpeg = np.array(load_reward("jpeg_incompressibility")(IMAGES, TEXTS, METADATA))
    np.testing.assert_allclose(scores.values, np.array(SCORES) - 0.5 * jpeg)
    np.testing.assert_allclose(scores.parts["jpeg_incompressibility"], jpeg)
    assert list(scores.parts) == [here("brightness"), "jpeg_incompressibility"]


def test_a_sample_that_lacks_a_term_lacks_the_sum():
    scorer = Scorer(f"{here('brightness')} + {here('raises')}", ScoringConfig())
    scores = scorer(IMAGES, PROMPTS)
    assert np.isnan(scores.values).all()
    np.testing.assert_allclose(scores.parts[here("brightness")], SCORES)
    assert scores.failures[0].startswith(here("raises"))


def test_normalised_sums_ignore_each_rewards_unit():
    """Scale and offset of a term play no part; a group without spread adds nothing; missing stays missing."""
    a, b = np.array([1.0, 2.0, 3.0, 7.0, 7.0, 7.0]), np.array([0.3, 0.1, math.nan, 4.0, 5.0, 6.0])
    scorer = Scorer(f"{here('brightness')} + 2*{here('raises')}", ScoringConfig(normalize="group"))
    total = scorer.total([Scores(a), Scores(b)], group_size=3).values
    np.testing.assert_allclose(total, scorer.total([Scores(1000 * a - 3), Scores(b / 7)], group_size=3).values)
    z = math.sqrt(1.5)
    np.testing.assert_allclose(total, [-z + 2, 0 - 2, math.nan, -2 * z, 0, 2 * z], atol=1e-12)
    np.testing.assert_allclose(scorer.total([Scores(a), Scores(b)]).values, a + 2 * b)  # no groups: raw
    np.testing.assert_array_equal(standardised(np.array([math.nan] * 2), 2), [math.nan] * 2)


# ------------------------------------------------------------------------------------------ watching


def nothing(n: int = 4) -> Scores:
    return Scores(np.full(n, math.nan), {}, ("the server is gone",))


def test_a_reward_that_never_scores_stops_the_run_at_once():
    with pytest.raises(UserError, match=r"no score at all for 1 batch.*the server is gone"):
        Watch()(nothing(), 2)


def test_outages_are_survived_unless_they_last():
    watch = Watch()
    watch(Scores(np.arange(4.0)), 2)
    for _ in range(5):
        watch(nothing(), 2)
        watch(nothing(), 2)
        watch(Scores(np.array([math.nan, 1.0, 2.0, 3.0])), 2)
    watch(nothing(), 2)
    watch.require_any(nothing())
    with pytest.raises(UserError, match="for 3 batch"):
        watch.require_any(nothing())


def test_a_reward_without_differences_stops_the_run():
    watch = Watch()
    flat = Scores(np.array([1.0, 1.0, 0.0, math.nan]))  # groups differ, samples of a group do not
    for _ in range(9):
        watch(flat, 2)
    with pytest.raises(UserError, match=r"apart in 10 batches \(it lay between 0 and 1"):
        watch(flat, 2)
    watch = Watch()
    watch(Scores(np.arange(4.0)), 2)
    for _ in range(20):  # once it told something, saturation is no mistake
        watch(flat, 2)


# ------------------------------------------------------------------------------------------ worker processes


@pytest.mark.parametrize(
    ("name", "lost", "why"),
    [
        ("brightness", [], None),
        ("dies_on_two", [2, 3], "the worker process died"),
        ("hangs_on_three", [2, 3], "no score within 2 seconds"),
    ],
)
def test_workers_keep_order_and_lose_only_the_chunk(name: str, lost: list[int], why: str | None):
    workers = Workers(here(name), load_reward, processes=2, timeout=2.0, chunk=2)
    try:
        scores = workers(IMAGES, TEXTS, METADATA)
        again = workers(IMAGES[:2], TEXTS[:2], METADATA[:2])
    finally:
        workers.close()
    expected = np.array([math.nan if i in lost else s for i, s in enumerate(SCORES)])
    np.testing.assert_allclose(scores.values, expected)
    assert [why in f for f in scores.failures] == ([True] if why else []) if why else scores.failures == ()
    np.testing.assert_allclose(again.values, SCORES[:2])  # the pool goes on


def test_workers_say_why_a_reward_cannot_be_loaded():
    workers = Workers(here("nobody"), load_reward, processes=1, timeout=5.0, chunk=6)
    try:
        with pytest.raises(UserError, match=r"could not be loaded: .*has no function 'nobody'"):
            workers(IMAGES, TEXTS, METADATA)
    finally:
        workers.close()


# ------------------------------------------------------------------------------------------ HTTP


@pytest.fixture
def serve() -> Iterator:
    servers = []

    def start(reward, **options) -> RewardServer:
        server = RewardServer("test", reward, **options)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return server

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def post(url: str, body: bytes, headers: dict[str, str] | None = None) -> tuple[int, dict]:
    request = urllib.request.Request(f"{url}/score", body, headers or {})
    try:
        with urllib.request.urlopen(request, timeout=10) as response:
            return response.status, json.loads(response.read())
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.loads(error.read())


def test_pictures_pass_without_loss():
    image = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    np.testing.assert_array_equal(decode_image(encode_image(image)), image)
    raw = {"shape": [5, 7, 3], "data": base64.b64encode(image.tobytes()).decode()}
    np.testing.assert_array_equal(decode_image(raw), image)


def test_a_remote_reward_scores_as_the_reward_itself(serve):
    def both(images, prompts, metadata):
        values = [None if m["i"] == 4 else float(v) for m, v in zip(metadata, brightness(images, 0, 0), strict=True)]
        return Scores(np.array(values, dtype=float), {"red": images[..., 0].mean((1, 2))})

    remote = RemoteReward(serve(both).url, timeout=10, chunk=4)
    scores = checked(remote(IMAGES, TEXTS, METADATA), len(IMAGES))
    np.testing.assert_allclose(scores.values, [*SCORES[:4], math.nan, SCORES[5]])
    np.testing.assert_allclose(scores.parts["red"], GREYS)


def test_a_scorer_takes_a_url(serve):
    scorer = Scorer(f"2*{serve(brightness).url}", ScoringConfig())
    np.testing.assert_allclose(scorer(IMAGES, PROMPTS).values, 2 * np.array(SCORES))


def test_failures_and_refusals_of_the_served_reward_reach_the_client(serve):
    remote = RemoteReward(serve(raises).url, timeout=10, chunk=6)
    scores = remote(IMAGES, TEXTS, METADATA)
    assert np.isnan(scores.values).all()
    assert "RuntimeError: out of memory" in scores.failures[0]
    with pytest.raises(UserError, match="refuses: prompt 0 has no target"):
        RemoteReward(serve(refuses).url, timeout=10, chunk=6)(IMAGES, TEXTS, METADATA)


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        (b"not json", 422, "Expecting value"),
        (b"[]", 422, "cannot be read"),
        (b"{}", 422, "no 'images'"),
        (json.dumps({"images": ["AAAA"], "prompts": ["a"]}).encode(), 422, "cannot be read"),
        (json.dumps({"images": [encode_image(IMAGES[0])], "prompts": []}).encode(), 422, "1 images, 0 prompts"),
        (json.dumps({"images": [{"shape": [9999999, 9, 3], "data": ""}], "prompts": [""]}).encode(), 422, "at most"),
        (b"x" * 3000, 413, "over the limit of 2000"),
    ],
)
def test_the_server_refuses_what_it_cannot_read(serve, body: bytes, status: int, message: str):
    url = serve(brightness, max_request=2000).url
    code, answer = post(url, body)
    assert code == status
    assert message in answer["error"]


def test_the_token(serve, monkeypatch):
    server = serve(brightness, token="secret")
    body = json.dumps({"images": [encode_image(IMAGES[5])], "prompts": ["a"]}).encode()
    assert post(server.url, body)[0] == 401
    assert post(server.url, body, {"Authorization": "Bearer wrong"})[0] == 401
    assert post(server.url, body, {"Authorization": "Bearer secret"}) == (
        200,
        {"scores": [1.0], "parts": {}, "failures": []},
    )
    remote = RemoteReward(server.url, timeout=5, chunk=6)
    with pytest.raises(UserError, match="TDM_R1_TOKEN"):
        remote(IMAGES, TEXTS, METADATA)
    monkeypatch.setenv("TDM_R1_TOKEN", "secret")
    np.testing.assert_allclose(remote(IMAGES, TEXTS, METADATA).values, SCORES)
    with pytest.raises(UserError, match=r"--host 0\.0\.0\.0 is open to others"):
        RewardServer("test", brightness, host="0.0.0.0")


class Misbehaving(http.server.BaseHTTPRequestHandler):
    """A server that is slow, drops the connection or answers garbage, by its class attribute."""

    manner = "garbage"

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        if self.manner == "slow":
            time.sleep(3)
        body = b'{"scores": [1.0]}' if self.manner == "short" else b"<html>it works</html>"
        if self.manner != "drop":
            self.send_response(500 if self.manner == "error" else 200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None: ...


@pytest.mark.parametrize(
    ("manner", "why"),
    [
        ("garbage", "JSONDecodeError"),
        ("short", "scores of shape (1,) for 6 pictures"),
        ("slow", "timed out"),
        ("drop", "closed connection"),
        ("error", "answered 500"),
        ("gone", "refused"),
    ],
)
def test_a_bad_server_costs_samples_not_the_run(manner: str, why: str):
    handler = type("Handler", (Misbehaving,), {"manner": manner})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.handle_error = lambda *_: None  # type: ignore[method-assign]  # the client has gone when it answers
    threading.Thread(target=server.serve_forever, daemon=True).start()
    remote = RemoteReward(f"http://127.0.0.1:{server.server_port}", timeout=1, chunk=6)
    if manner == "gone":
        server.shutdown()
        server.server_close()
    scores = remote(IMAGES, TEXTS, METADATA)
    server.shutdown()
    server.server_close()
    assert np.isnan(scores.values).all()
    assert why in scores.failures[0]


# ------------------------------------------------------------------------------------------ registry


def test_an_extra_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setitem(BUILT_IN, "far", Entry("x", lambda: brightness, "far", ("no_such_module",)))
    with pytest.raises(ValueError, match=r"needs no_such_module, which is not installed: pip install 'tdm-r1\[far\]'"):
        load_reward("far")


def test_jpeg_rewards_are_the_file_size():
    flat, noise = IMAGES[0], np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    up = load_reward("jpeg_incompressibility")(np.stack([flat, noise]), ["", ""], [{}, {}])
    down = load_reward("jpeg_compressibility")(np.stack([flat, noise]), ["", ""], [{}, {}])
    assert up[0] < up[1]
    np.testing.assert_array_equal(up, -np.array(down))
    assert (up * 1000 == np.round(up * 1000)).all()  # kB


# ------------------------------------------------------------------------------------------ commands


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


def test_prompts_go_with_pictures_by_name(folder: Path, tmp_path: Path):
    rows = [{"file": f"{i:02d}.png", "prompt": TEXTS[i], "i": 10 * i} for i in reversed(range(6))]
    (tmp_path / "p.jsonl").write_text("\n".join(json.dumps(r) for r in rows))
    found = prompts_of(picture_files(folder), tmp_path / "p.jsonl")
    assert [(p.text, p.metadata["i"]) for p in found] == [(t, 10 * i) for i, t in enumerate(TEXTS)]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["{}/gone"], "no such folder"),
        (["{}", "--prompts", "{}/two.txt"], "has 2 prompts for 6 pictures: give a line each"),
        (["{}", "--prompts", "{}/some.jsonl"], "has no row with file = '01.png'"),
        (["{}", "--reward", "far"], "reward = 'far' is not known"),
        (["{}", "--reward", "ocr"], "has no text to show"),
    ],
)
def test_score_errors_are_one_line(folder: Path, args: list[str], message: str, capsys):
    (folder / "two.txt").write_text("a\nb\n")
    (folder / "some.jsonl").write_text('{"file": "00.png", "prompt": "a"}\n')
    args = [a.format(folder) for a in args]
    rest = [] if "--reward" in args else ["--reward", here("brightness")]
    assert cli.main(["score", *args, *rest]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_rewards_are_listed_with_their_state(capsys, monkeypatch):
    monkeypatch.setitem(BUILT_IN, "far", Entry("x", lambda: brightness, "far", ("no_such_module",)))
    assert cli.main(["rewards"]) == 0
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert all(name in text for name in BUILT_IN)
    assert state_of(BUILT_IN["far"]) == "lacks no_such_module: pip install 'tdm-r1[far]'"
    assert state_of(BUILT_IN["mini"]) == "ready"
    assert state_of(Entry("x", lambda: brightness, weights=("nobody/nothing",))).startswith("installed; downloads")


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


@pytest.mark.parametrize("name", ["hpsv3", "deqa"])
def test_scorers_of_their_own_environment_can_be_loaded(name: str):
    """Their libraries are imported when the first picture comes; loading alone checks the file and the name."""
    assert callable(load_reward(f"{Path(__file__).parent.parent}/scorers/{name}.py:{name}"))
