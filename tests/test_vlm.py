"""A vision-language judge, through the real client and a local server with OpenAI's chat interface."""

from __future__ import annotations

import base64
import http.server
import io
import json
import threading
from collections.abc import Iterator

import numpy as np
import pytest
from PIL import Image

from tdm_r1.errors import UserError
from tdm_r1.rewards.vlm import VLMJudge, final_score


@pytest.mark.parametrize(
    ("answer", "score"),
    [
        ("Alignment fine.\nFinal Score: 4", 4.0),
        ("Final score: 3.5 of 5", 3.5),
        ("Final Score: **2**", 2.0),
        ("Final Score: 1\nOn reflection.\nFinal Score: 5", 5.0),
        ("Final Score: 4/5", 4.0),
        ("Final Score: 4/10", None),
        ("**Final Score**: 4", 4.0),
        ("**Final Score:** 4", 4.0),
        ("*Final Score*: **4**/5", 4.0),
        ("Final Score: 4 out of 5", 4.0),
        ("Final Score: 4 out of 10", None),
        ("Final Score: **4** / 10", None),
        ("Final Score: 3.5 of 10", None),
        ("Final Score: 7", None),
        ("Final Score: 0", None),
        ("Final Score: -3", None),
        ("Final Score: good", None),
        ("4", None),
        ("", None),
    ],
)
def test_answers_are_parsed_or_missing(answer: str, score: float | None):
    assert final_score(answer) == score


class Judge(http.server.BaseHTTPRequestHandler):
    """Scores a picture by its grey level; has no opinion on black, breaks down on white."""

    asked: list[str] = []  # noqa: RUF012

    def do_GET(self) -> None:
        self.answer(200, {"object": "list", "data": [{"id": "judge-7b", "object": "model", "created": 0}]})

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        picture, question = request["messages"][0]["content"]
        self.asked.append(question["text"])
        kind, data = picture["image_url"]["url"].split(";base64,")
        grey = int(np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))[0, 0, 0])
        if grey == 255 or kind != "data:image/png" or request["model"] != "judge-7b":
            self.answer(500, {"error": {"message": "out of memory"}})
            return
        if grey == 102:  # nothing to choose from
            self.answer(200, {"id": "x", "object": "chat.completion", "created": 0, "model": "m", "choices": []})
            return
        text = "I cannot tell." if grey == 0 else f"Fine.\nFinal Score: {grey / 51:g}"
        message = {"role": "assistant", "content": text}
        choice = {"index": 0, "finish_reason": "stop", "message": message}
        self.answer(200, {"id": "x", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice]})

    def answer(self, status: int, content: dict) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None: ...


@pytest.fixture
def url() -> Iterator[str]:
    Judge.asked.clear()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Judge)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v1"
    server.shutdown()
    server.server_close()


def test_a_judge_scores_pictures(url: str, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # which has no business with this machine
    images = np.stack([np.full((8, 8, 3), v, np.uint8) for v in (51, 0, 204, 255, 102)])
    judge = VLMJudge(base_url=url)
    judge.client = judge.client.with_options(max_retries=0)
    scores = judge(images, ["a cat", "{curly} braces", "a dog", "a cow", "a hen"], [{}] * 5)
    judge.client.close()
    np.testing.assert_array_equal(scores.values, [1.0, np.nan, 4.0, np.nan, np.nan])
    assert "no score in the judge's answer: 'I cannot tell.'" in scores.failures
    assert any("out of memory" in why for why in scores.failures)
    assert any(why.startswith("IndexError") for why in scores.failures)
    assert sorted(t.split('"')[1] for t in Judge.asked) == ["a cat", "a cow", "a dog", "a hen", "{curly} braces"]


def test_a_judge_without_a_key_says_what_to_set(monkeypatch):
    for name in ("OPENAI_API_KEY", "OPENAI_ADMIN_KEY"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(UserError, match="OPENAI_API_KEY"):
        VLMJudge()
