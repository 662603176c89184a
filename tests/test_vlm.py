"""A vision-language judge, through the real client and a local server with OpenAI's chat interface."""

from __future__ import annotations

import base64
import http.server
import io
import json
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import tiny_models
from tdm_r1.config.load import load_recipe
from tdm_r1.errors import UserError
from tdm_r1.rewards.vlm import VLMJudge, final_score
from tdm_r1.train.run import Run


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


def test_the_judges_recipe_runs(url: str, monkeypatch, tmp_path: Path):
    """On a small random model of the recipe's class; the judge grades by how bright a picture is."""
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    monkeypatch.setenv("OPENAI_BASE_URL", url)
    (tmp_path / "prompts.txt").write_text("a cat\na red dog\n")
    small = {
        "model.path": str(tiny_models.sd3(tmp_path / "sd3", dual=True)),
        "model.student_lora": None,
        "model.max_sequence_length": 48,
        "model.resolution": 32,
        "distill_with": None,
        "task.prompts": tmp_path / "prompts.txt",
        "task.eval_prompts": None,
        "batch.prompts": 2,
        "batch.group": 3,
        "batch.trained": None,
        "batch.micro_batch": 3,
        "evaluation.prompts": 2,
        "iterations": 1,
        "output": tmp_path,
    }
    run = Run(load_recipe("sd35m_judge").override(small))
    run.fit()
    assert len(Judge.asked) == run.scored + 2 * 2  # and the evaluations of the start and the end
    rows = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    given = [row for row in rows if "reward/mean" in row]
    assert 1 <= given[0]["reward/mean"] <= 5


def test_a_judge_without_a_key_says_what_to_set(monkeypatch):
    for name in ("OPENAI_API_KEY", "OPENAI_ADMIN_KEY"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(UserError, match="OPENAI_API_KEY"):
        VLMJudge()
