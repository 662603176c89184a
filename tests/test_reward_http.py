"""Rewards over HTTP: pictures without loss, the contract, tokens, and servers that misbehave."""

from __future__ import annotations

import base64
import http.server
import json
import math
import threading
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np
import pytest

from reward_examples import GREYS, IMAGES, METADATA, PROMPTS, SCORES, TEXTS, brightness, here, raises, refuses
from tdm_r1.errors import UserError
from tdm_r1.rewards.http import RemoteReward, RewardServer, decode_image, encode_image
from tdm_r1.rewards.registry import load_reward
from tdm_r1.rewards.scorer import Scorer
from tdm_r1.rewards.scores import Scores, checked
from tdm_r1.rewards.settings import ScoringConfig
from tdm_r1.rewards.workers import Workers

pytestmark = pytest.mark.slow


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
        (json.dumps({"images": [{"shape": [99999999, 9, 3], "data": ""}], "prompts": [""]}).encode(), 422, "may hold"),
        (b'{"images": [{"shape": [Infinity, 9, 3], "data": ""}], "prompts": [""]}', 422, "cannot be read"),
        (b"x" * 3000, 413, "over the limit of 2000"),
    ],
)
def test_the_server_refuses_what_it_cannot_read(serve, body: bytes, status: int, message: str):
    url = serve(brightness, max_request=2000).url
    code, answer = post(url, body)
    assert code == status
    assert message in answer["error"]


def test_pictures_of_a_request_are_limited_together(serve, monkeypatch):
    """A PNG of one colour is small however large it is."""
    monkeypatch.setattr("tdm_r1.rewards.http.MAX_PIXELS", 5 * 64)
    url = serve(brightness).url
    for n, status in ((5, 200), (6, 422)):
        images = [encode_image(IMAGES[5])] * n
        body = json.dumps({"images": images, "prompts": [""] * n}).encode()
        code, answer = post(url, body)
        assert code == status, answer


def test_only_so_many_requests_wait(serve):
    go = threading.Event()
    server = serve(lambda images, prompts, metadata: (go.wait(10), brightness(images, prompts, metadata))[1])
    server.places = threading.BoundedSemaphore(1)
    first = RemoteReward(server.url, timeout=20, chunk=6)
    with ThreadPoolExecutor(1) as pool:
        scored = pool.submit(first, IMAGES, TEXTS, METADATA)
        while server.places._value:
            time.sleep(0.01)
        late = RemoteReward(server.url, timeout=20, chunk=6)(IMAGES, TEXTS, METADATA)
        go.set()
        np.testing.assert_allclose(scored.result().values, SCORES)
    assert "answered 503: 32 requests are waiting" in late.failures[0]


def test_requests_at_once_may_wait_for_each_other(serve):
    """A server scores one request at a time: three of half a second need more than one second."""

    def slow(images, prompts, metadata):
        time.sleep(0.5)
        return brightness(images, prompts, metadata)

    scores = RemoteReward(serve(slow).url, timeout=1, chunk=2, connections=3)(IMAGES, TEXTS, METADATA)
    np.testing.assert_allclose(scores.values, SCORES)


def test_a_served_reward_that_hangs_is_started_again(serve):
    workers = Workers(here("hangs_on_three"), load_reward, processes=1, timeout=2.0, chunk=100)
    try:
        workers.start()
        remote = RemoteReward(serve(workers).url, timeout=30, chunk=3)
        scores = remote(IMAGES, TEXTS, METADATA)
        np.testing.assert_allclose(scores.values, [*SCORES[:3], *[math.nan] * 3])
        np.testing.assert_allclose(remote(IMAGES[:3], TEXTS[:3], METADATA[:3]).values, SCORES[:3])
    finally:
        workers.close()


def test_a_proxy_has_no_business_with_this_machine(serve, monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    remote = RemoteReward(serve(brightness).url, timeout=10, chunk=6)
    np.testing.assert_allclose(remote(IMAGES, TEXTS, METADATA).values, SCORES)


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


def test_a_refusal_is_heard_behind_megabytes(serve):
    """A client that is still sending when it is refused would take it for a broken connection."""
    noise = np.random.default_rng(0).integers(0, 256, (3, 512, 512, 3), dtype=np.uint8)
    small = serve(brightness, max_request=2**20)
    for server, why in ((serve(brightness, token="secret"), "wrong or no token"), (small, "over the limit")):
        with pytest.raises(UserError, match=why):
            RemoteReward(server.url, timeout=20, chunk=3)(noise, TEXTS[:3], METADATA[:3])


def test_a_port_that_is_taken_is_told(serve):
    port = serve(brightness).server_address[1]
    with pytest.raises(UserError, match=rf"cannot listen on 127\.0\.0\.1:{port}: .*give another --port"):
        RewardServer("test", brightness, port=port)


class Misbehaving(http.server.BaseHTTPRequestHandler):
    """A server that is slow, drops the connection or answers garbage, by its class attribute."""

    manner = "garbage"

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        if self.manner == "slow":
            time.sleep(3)
        body = b'{"scores": [1.0]}' if self.manner == "short" else b"<html>it works</html>"
        if self.manner == "dribble":
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            for _ in range(100):
                self.wfile.write(b" ")
                time.sleep(0.1)
        elif self.manner != "drop":
            self.send_response(500 if self.manner == "error" else 200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None: ...


@pytest.mark.parametrize(
    ("manner", "why"),
    [
        ("garbage", "JSONDecodeError"),
        ("short", "scores of shape (1,) for 6 images"),
        ("slow", "timed out"),
        ("dribble", "no whole answer within 2 seconds"),
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


class Foreign(http.server.BaseHTTPRequestHandler):
    """A server of somebody else's: it answers 307 to a path without a slash, or with its class attribute."""

    answer: tuple[int, object] = (200, {})

    def do_POST(self) -> None:
        n = len(json.loads(self.rfile.read(int(self.headers["Content-Length"])))["images"])
        status, content = self.answer
        if content == "redirects":
            status, content = (200, {"scores": list(range(n))}) if self.path == "/score/" else (307, {})
        body = json.dumps(content).encode()
        self.send_response(status)
        if status == 307:
            self.send_header("Location", "/score/")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None: ...


@contextmanager
def foreign(status: int, content: object) -> Iterator[str]:
    handler = type("Handler", (Foreign,), {"answer": (status, content)})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ({"error": "CUDA out of memory"}, "CUDA out of memory"),
        ({"detail": "busy"}, "busy"),
        ({"rewards": [1.0]}, "an object with rewards; expected an object with 'scores', a list of 6 numbers"),
        ([1.0] * 6, "the answer is list; expected"),
        ({"scores": 0.5}, "scores are 0.5; expected a list of 6 numbers"),
        ({"scores": {"0": 1.0}}, "expected a list of 6 numbers"),
    ],
)
def test_an_answer_without_scores_is_told_in_the_servers_words(content: object, why: str):
    with foreign(200, content) as url:
        scores = RemoteReward(url, timeout=5, chunk=6)(IMAGES, TEXTS, METADATA)
    assert np.isnan(scores.values).all()
    assert why in scores.failures[0]


def test_a_refusal_is_told_with_its_detail():
    detail = [{"loc": ["body", "images"], "msg": "field required", "type": "missing"}]
    with foreign(422, {"detail": detail}) as url, pytest.raises(UserError, match=r"body\.images: field required"):
        RemoteReward(url, timeout=5, chunk=6)(IMAGES, TEXTS, METADATA)


@pytest.mark.parametrize("path", ["", "/", "/score", "/score/"])
def test_urls_are_taken_as_servers_document_them(path: str):
    with foreign(200, "redirects") as url:
        scores = RemoteReward(url + path, timeout=5, chunk=3)(IMAGES, TEXTS, METADATA)
    assert scores.values.tolist() == [0, 1, 2, 0, 1, 2]


def test_scores_in_a_column_and_parts_of_the_batch():
    content = {"scores": [[0.5]] * 6, "parts": {"mean": 0.3, "a": [1.0] * 6}}
    with foreign(200, content) as url:
        scores = RemoteReward(url, timeout=5, chunk=6)(IMAGES, TEXTS, METADATA)
    assert scores.values.tolist() == [0.5] * 6
    assert scores.parts.keys() == {"a"}
    assert "'mean' was left out" in scores.failures[0]
