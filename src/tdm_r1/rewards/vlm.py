"""A vision-language model as judge, behind any server with OpenAI's chat interface (vLLM, SGLang, a provider)."""

from __future__ import annotations

import os
import re
import urllib.parse
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from openai import DefaultHttpxClient, OpenAI, OpenAIError

from ..errors import UserError
from .http import encode_image, is_loopback
from .scores import Scores

# Our words, in the form of UnifiedReward's point-wise scoring (arXiv 2503.05236): criteria, then one final score.
TEMPLATE = """You are shown a picture that was generated from this text: "{prompt}"

Judge how well the picture shows what the text asks for (objects, their number, colours, positions, written words) and
how good it looks. Give a few words on each, then end with one line:
Final Score: x
where x is a number from 1 (poor) to 5 (excellent)."""
SCORE = re.compile(
    r"Final Score[\s*_]*:[\s*_]*([-+]?\d+(?:\.\d+)?)[*_]*(?:\s*(?:/|(?:out\s+)?of\b)[\s*_]*(\d+))?", re.IGNORECASE
)


def final_score(answer: str) -> float | None:
    """The last ``Final Score: x`` (or ``x/5``) with x in 1 to 5; None, a missing score, for anything else."""
    if not (found := SCORE.findall(answer)):
        return None
    value, scale = found[-1]
    return float(value) if 1.0 <= float(value) <= 5.0 and scale in ("", "5") else None


class VLMJudge:
    """Asks a judge about each picture. An answer that cannot be parsed is a missing score, never 0.

    Args:
        model: its name at the server; the first that the server lists if None.
        base_url: of the server; ``OPENAI_BASE_URL`` if None. The key is ``OPENAI_API_KEY``.
        template: what is asked, with ``{prompt}``.
        parse: from the answer to a score or None.
        connections: questions at once.
        timeout: seconds for an answer; an error that may pass is asked about twice more.

    Raises UserError where there is no key.
    """

    def __init__(
        self,
        model: str | None = None,
        *,
        base_url: str | None = None,
        template: str = TEMPLATE,
        parse: Callable[[str], float | None] = final_score,
        connections: int = 16,
        timeout: float = 60.0,
    ) -> None:
        host = urllib.parse.urlsplit(base_url or os.environ.get("OPENAI_BASE_URL", "")).hostname
        http = DefaultHttpxClient(trust_env=False) if is_loopback(host or "") else None  # no proxy to this machine
        try:
            self.client = OpenAI(base_url=base_url, timeout=timeout, max_retries=2, http_client=http)
        except OpenAIError as error:
            raise UserError(
                "the judge needs a key: set the environment variable OPENAI_API_KEY (any word, for a server of your "
                "own), and OPENAI_BASE_URL to where it listens"
            ) from error
        self._model = model
        self.template, self.parse, self.connections = template, parse, connections

    @property
    def model(self) -> str:
        if self._model is None:
            self._model = self.client.models.list().data[0].id
        return self._model

    def __call__(self, images: np.ndarray, prompts: list[str], metadata: list[dict[str, Any]]) -> Scores:
        _ = self.model  # asked once, before the threads
        with ThreadPoolExecutor(self.connections) as pool:
            answers = list(pool.map(self._ask, images, prompts))
        values = np.array([np.nan if score is None else score for score, _ in answers], dtype=np.float64)
        return Scores(values, {}, tuple(dict.fromkeys(why for _, why in answers if why)))

    def _ask(self, image: np.ndarray, prompt: str) -> tuple[float | None, str]:
        """The score, or None and why there is none."""
        picture = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{encode_image(image)}"}}
        question = {"type": "text", "text": self.template.replace("{prompt}", prompt)}
        messages: Any = [{"role": "user", "content": [picture, question]}]
        try:
            answer = self.client.chat.completions.create(model=self.model, messages=messages, temperature=0.0)
            text = answer.choices[0].message.content or ""
            score = self.parse(text)
        except Exception as error:  # a server may answer anything; it costs this picture alone
            return None, f"{type(error).__name__}: {error}"
        return score, "" if score is not None else f"no score in the judge's answer: {text[-80:]!r}"
