"""A reward behind HTTP: a scoring server of the standard library, and the reward that asks one.

The protocol is JSON, never pickle. ``POST /score`` takes ``{"images": [...], "prompts": [...], "metadata": [...]}``,
each image as base64 of a PNG or as ``{"shape": [H, W, 3], "data": base64 of uint8}``; it answers
``{"scores": [number or null], "parts": {name: [...]}, "failures": [...]}``, or ``{"error": ...}`` with status 4xx.
``GET /health`` answers ``{"reward": name}``.
"""

from __future__ import annotations

import base64
import hmac
import io
import ipaddress
import json
import math
import os
import sys
import threading
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
from PIL import Image

from ..errors import UserError
from .scores import Reward, Scores, attempt, checked, joined, missing, same_size

TOKEN = "TDM_R1_TOKEN"  # environment variable: what server and client have to agree on
MAX_REQUEST = 256 * 2**20  # bytes
MAX_PIXELS = 64 * 2**20  # of one picture


# ---------------------------------------------------------------------------------------------- pictures


def encode_image(image: np.ndarray) -> str:
    """A picture, uint8 [H, W, 3], as base64 of a PNG: without loss, so that scores do not change on the way."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG", compress_level=1)
    return base64.b64encode(buffer.getvalue()).decode()


def decode_image(item: Any) -> np.ndarray:
    """A picture as the protocol has it, uint8 [H, W, 3]. Raises ValueError on anything else."""
    if isinstance(item, dict):
        shape = [int(n) for n in item["shape"]]
        if len(shape) != 3 or shape[2] != 3 or min(shape) < 1 or math.prod(shape[:2]) > MAX_PIXELS:
            raise ValueError(f"shape {shape}: an image is [H, W, 3], of at most {MAX_PIXELS} pixels")
        return np.frombuffer(base64.b64decode(item["data"], validate=True), np.uint8).reshape(shape)
    with Image.open(io.BytesIO(base64.b64decode(item, validate=True)), formats=["PNG"]) as image:
        if image.width * image.height > MAX_PIXELS:
            raise ValueError(f"an image of {image.width} x {image.height} pixels: {MAX_PIXELS} are allowed")
        return np.asarray(image.convert("RGB"))


def decode_request(body: bytes) -> tuple[list[np.ndarray], list[str], list[dict[str, Any]]]:
    """Pictures, prompts and metadata of a request. Raises ValueError saying what is wrong with it."""
    try:
        request = json.loads(body)
        images = [decode_image(item) for item in request["images"]]
        prompts = [str(p) for p in request["prompts"]]
        metadata = list(request.get("metadata") or [{} for _ in images])
    except KeyError as error:
        raise ValueError(f"the request has no {error}") from error
    except (TypeError, OSError, AttributeError, Image.DecompressionBombError) as error:
        raise ValueError(f"the request cannot be read: {error}") from error
    if not images or not len(images) == len(prompts) == len(metadata):
        raise ValueError(
            f"{len(images)} images, {len(prompts)} prompts, {len(metadata)} metadata: give as many of each"
        )
    if not all(isinstance(m, dict) for m in metadata):
        raise ValueError("metadata: give one JSON object a picture")
    return images, prompts, metadata


def _numbers(column: np.ndarray) -> list[float | None]:
    return [None if math.isnan(v) else float(v) for v in column]


# ---------------------------------------------------------------------------------------------- server


class RewardServer(ThreadingHTTPServer):
    """Serves ``reward``. One batch is scored at a time: rewards need not be thread-safe.

    Args:
        name: what `GET /health` answers.
        host: loopback by default. Raises UserError if bound elsewhere without a token.
        port: 0 takes a free one; see ``url``.
        token: what requests have to carry as ``Authorization: Bearer TOKEN``.
        max_request: bytes.
    """

    daemon_threads = True

    def __init__(
        self,
        name: str,
        reward: Reward,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        token: str | None = None,
        max_request: int = MAX_REQUEST,
    ) -> None:
        if not token and not _is_loopback(host):
            raise UserError(f"--host {host} is open to others: set the environment variable {TOKEN} on both sides")
        super().__init__((host, port), _Handler)
        self.name, self.reward, self.token, self.max_request = name, reward, token, max_request
        self.turn = threading.Lock()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Tells of errors, but for clients that have gone: that is their own affair."""
        if not isinstance(sys.exception(), ConnectionError | TimeoutError):
            super().handle_error(request, client_address)

    @property
    def url(self) -> str:
        host, port = self.server_address[:2]
        return f"http://{host!s}:{port}"


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class _Handler(BaseHTTPRequestHandler):
    server: RewardServer
    timeout = 60  # seconds without a byte from a client

    def do_GET(self) -> None:
        if not self._allowed():
            return
        if self.path == "/health":
            self._answer(200, {"reward": self.server.name})
        else:
            self._answer(404, {"error": f"no {self.path}: there are POST /score and GET /health"})

    def do_POST(self) -> None:
        if not self._allowed():
            return
        length = self.headers.get("Content-Length", "")
        if self.path != "/score":
            self._answer(404, {"error": f"no {self.path}: there are POST /score and GET /health"})
        elif not length.isdigit():
            self._answer(411, {"error": "give a Content-Length"})
        elif int(length) > self.server.max_request:
            limit = self.server.max_request
            self._answer(413, {"error": f"{length} bytes are over the limit of {limit}: send fewer pictures at once"})
        else:
            self._score(self.rfile.read(int(length)))

    def _score(self, body: bytes) -> None:
        try:
            images, prompts, metadata = decode_request(body)
            with self.server.turn:
                scores = joined(
                    [
                        attempt(self.server.reward, np.stack(images[s]), prompts[s], metadata[s])
                        for s in same_size(images)
                    ]
                )
        except (ValueError, UserError) as error:
            self._answer(422, {"error": str(error)})
            return
        parts = {name: _numbers(column) for name, column in scores.parts.items()}
        self._answer(200, {"scores": _numbers(scores.values), "parts": parts, "failures": scores.failures})

    def _allowed(self) -> bool:
        token, given = self.server.token, self.headers.get("Authorization", "")
        if not token or hmac.compare_digest(given.encode(), f"Bearer {token}".encode()):
            return True
        self._answer(401, {"error": f"wrong or no token: set {TOKEN} to the server's"})
        return False

    def _answer(self, status: int, content: dict[str, Any]) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        if status != 200:
            self.close_connection = True  # the rest of a refused request is not read
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: a line a request says nothing that the trainer does not."""


# ---------------------------------------------------------------------------------------------- client


class RemoteReward:
    """The reward that a server (`RewardServer`, or anything with its protocol) scores with.

    Args:
        url: such as ``http://127.0.0.1:8000``.
        timeout: seconds that the server may be silent in answering a chunk; past it its samples are missing.
        chunk: samples a request.
        connections: requests at once.
    """

    def __init__(self, url: str, *, timeout: float, chunk: int, connections: int = 2) -> None:
        self.url, self.timeout, self.chunk, self.connections = url.rstrip("/"), timeout, chunk, connections

    def __call__(self, images: np.ndarray, prompts: list[str], metadata: list[dict[str, Any]]) -> Scores:
        spans = [slice(start, start + self.chunk) for start in range(0, len(images), self.chunk)]
        requests = [partial(self._chunk, images[s], prompts[s], metadata[s]) for s in spans]
        with ThreadPoolExecutor(self.connections) as pool:
            return joined(list(pool.map(lambda request: request(), requests)))

    def _chunk(self, images: np.ndarray, prompts: list[str], metadata: list[dict[str, Any]]) -> Scores:
        content = {"images": [encode_image(i) for i in images], "prompts": prompts, "metadata": metadata}
        body = json.dumps(content).encode()
        headers = {"Content-Type": "application/json"}
        if token := os.environ.get(TOKEN):
            headers["Authorization"] = f"Bearer {token}"
        try:
            request = urllib.request.Request(f"{self.url}/score", body, headers)
            with urllib.request.urlopen(request, timeout=self.timeout) as response:
                return _scores_of(json.loads(response.read(MAX_REQUEST)), len(images))
        except urllib.error.HTTPError as error:
            why = _reason(error)
            if error.code in (401, 404, 413, 422):
                raise UserError(f"the reward server {self.url} refuses: {why}") from error
            return missing(len(images), f"the server answered {error.code}: {why}")
        except Exception as error:  # slow, gone, garbage: a server may do anything
            return missing(len(images), f"{type(error).__name__}: {error}")


def _scores_of(answer: dict[str, Any], n: int) -> Scores:
    parts = {str(k): np.array(v, dtype=np.float64) for k, v in (answer.get("parts") or {}).items()}
    failures = tuple(str(why) for why in answer.get("failures") or ())
    return checked(Scores(answer["scores"], parts, failures), n)


def _reason(error: urllib.error.HTTPError) -> str:
    try:
        return str(json.loads(error.read(4096))["error"])
    except Exception:  # not our server's answer
        return str(error.reason)
