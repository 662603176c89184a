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
import time
import urllib.error
import urllib.parse
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
MAX_ANSWER = 16 * 2**20  # bytes
MAX_PIXELS = 128 * 2**20  # of a request's pictures together: a PNG of one colour is a thousandth of its pixels
MAX_WAITING = 32  # requests that may wait for their turn


# ---------------------------------------------------------------------------------------------- pictures


def encode_image(image: np.ndarray) -> str:
    """A picture, uint8 [H, W, 3], as base64 of a PNG: without loss, so that scores do not change on the way."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG", compress_level=1)
    return base64.b64encode(buffer.getvalue()).decode()


def decode_image(item: Any, allowed: int = MAX_PIXELS) -> np.ndarray:
    """A picture as the protocol has it, uint8 [H, W, 3], of ``allowed`` pixels at most. Raises ValueError on anything
    else."""
    if isinstance(item, dict):
        shape = [int(n) for n in item["shape"]]
        if len(shape) != 3 or shape[2] != 3 or min(shape) < 1:
            raise ValueError(f"shape {shape}: an image is [H, W, 3]")
        _require_pixels(math.prod(shape[:2]), allowed)
        return np.frombuffer(base64.b64decode(item["data"], validate=True), np.uint8).reshape(shape)
    with Image.open(io.BytesIO(base64.b64decode(item, validate=True)), formats=["PNG"]) as image:
        _require_pixels(image.width * image.height, allowed)
        return np.asarray(image.convert("RGB"))


def _require_pixels(pixels: int, allowed: int) -> None:
    if pixels > allowed:
        raise ValueError(f"a request may hold {MAX_PIXELS} pixels: send fewer pictures at once, or smaller ones")


def _decode_images(items: Any) -> list[np.ndarray]:
    images: list[np.ndarray] = []
    left = MAX_PIXELS
    for item in items:
        images.append(decode_image(item, left))
        left -= images[-1].shape[0] * images[-1].shape[1]
    return images


def decode_request(body: bytes) -> tuple[list[np.ndarray], list[str], list[dict[str, Any]]]:
    """Pictures, prompts and metadata of a request. Raises ValueError saying what is wrong with it."""
    try:
        request = json.loads(body)
        images = _decode_images(request["images"])
        prompts = [str(p) for p in request["prompts"]]
        metadata = list(request.get("metadata") or [{} for _ in images])
    except KeyError as error:
        raise ValueError(f"the request has no {error}") from error
    except (TypeError, OSError, AttributeError, OverflowError, Image.DecompressionBombError) as error:
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
        host: loopback by default. Raises UserError if bound elsewhere without a token, or if it cannot be listened on.
        port: 0 takes a free one; see ``url``.
        token: what requests have to send as ``Authorization: Bearer TOKEN``.
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
        if not token and not is_loopback(host):
            raise UserError(f"--host {host} is open to others: set the environment variable {TOKEN} on both sides")
        try:
            super().__init__((host, port), _Handler)
        except OSError as error:
            raise UserError(f"cannot listen on {host}:{port}: {error.strerror}; give another --port") from error
        self.name, self.reward, self.token, self.max_request = name, reward, token, max_request
        self.turn = threading.Lock()
        self.places = threading.BoundedSemaphore(MAX_WAITING)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Prints errors, except those of clients that have disconnected."""
        if not isinstance(sys.exception(), ConnectionError | TimeoutError):
            super().handle_error(request, client_address)

    @property
    def url(self) -> str:
        host, port = self.server_address[:2]
        return f"http://{host!s}:{port}"


def is_loopback(host: str) -> bool:
    """Whether the host is this machine."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class _Handler(BaseHTTPRequestHandler):
    server: RewardServer
    timeout = 60  # seconds without a byte from a client

    def do_GET(self) -> None:
        if not self._allowed(0):
            return
        if self.path == "/health":
            self._answer(200, {"reward": self.server.name})
        else:
            self._refuse(404, f"no {self.path}: there are POST /score and GET /health", 0)

    def do_POST(self) -> None:
        given = self.headers.get("Content-Length", "")
        length, limit = int(given) if given.isdigit() else 0, self.server.max_request
        if not self._allowed(length):
            return
        if self.path != "/score":
            self._refuse(404, f"no {self.path}: there are POST /score and GET /health", length)
        elif not given.isdigit():
            self._refuse(411, "give a Content-Length", 0)
        elif length > limit:
            self._refuse(413, f"{length} bytes are over the limit of {limit}: send fewer pictures at once", length)
        elif not self.server.places.acquire(blocking=False):
            self._refuse(503, f"{MAX_WAITING} requests are waiting already: the reward is too slow for them", length)
        else:
            try:
                self._score(self.rfile.read(length))
            finally:
                self.server.places.release()

    def _score(self, body: bytes) -> None:
        try:
            with self.server.turn:
                images, prompts, metadata = decode_request(body)
                scores = joined(
                    [
                        attempt(self.server.reward, np.stack(images[s]), prompts[s], metadata[s])
                        for s in same_size(images)
                    ]
                )
        except (ValueError, UserError) as error:
            self._refuse(422, str(error), 0)
            return
        parts = {name: _numbers(column) for name, column in scores.parts.items()}
        self._answer(200, {"scores": _numbers(scores.values), "parts": parts, "failures": scores.failures})

    def _allowed(self, length: int) -> bool:
        token, given = self.server.token, self.headers.get("Authorization", "")
        if not token or hmac.compare_digest(given.encode(), f"Bearer {token}".encode()):
            return True
        self._refuse(401, f"wrong or no token: set {TOKEN} to the server's", length)
        return False

    def _refuse(self, status: int, why: str, unread: int) -> None:
        """Answers with an error, after a body of ``unread`` bytes: a client that still sends would not hear it."""
        left = min(unread, 4 * self.server.max_request)
        while left > 0 and (block := self.rfile.read(min(left, 2**16))):
            left -= len(block)
        self._answer(status, {"error": why})

    def _answer(self, status: int, content: dict[str, Any]) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        if status != 200:
            self.close_connection = True
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
        timeout: seconds that the server may take for a chunk; past it its samples are missing. A server scores one
            request at a time, so each of several at once is given as many times that.
        chunk: samples a request.
        connections: requests at once.
    """

    def __init__(self, url: str, *, timeout: float, chunk: int, connections: int = 2) -> None:
        self.url = url.rstrip("/").removesuffix("/score")
        self.timeout, self.chunk, self.connections = timeout, chunk, connections
        loopback = is_loopback(urllib.parse.urlsplit(self.url).hostname or "")
        proxies = urllib.request.ProxyHandler({} if loopback else None)  # a proxy has no business with this machine
        self._opener = urllib.request.build_opener(proxies, _Redirects)
        self._pool = ThreadPoolExecutor(connections)

    def __call__(self, images: np.ndarray, prompts: list[str], metadata: list[dict[str, Any]]) -> Scores:
        spans = [slice(start, start + self.chunk) for start in range(0, len(images), self.chunk)]
        requests = [partial(self._chunk, images[s], prompts[s], metadata[s]) for s in spans]
        return joined(list(self._pool.map(lambda request: request(), requests)))

    def _chunk(self, images: np.ndarray, prompts: list[str], metadata: list[dict[str, Any]]) -> Scores:
        content = {"images": [encode_image(i) for i in images], "prompts": prompts, "metadata": metadata}
        body = json.dumps(content).encode()
        headers = {"Content-Type": "application/json"}
        if token := os.environ.get(TOKEN):
            headers["Authorization"] = f"Bearer {token}"
        try:
            request = urllib.request.Request(f"{self.url}/score", body, headers)
            return _scores_of(json.loads(self._answer(request)), len(images))
        except urllib.error.HTTPError as error:
            why = _reason(error)
            if error.code in (401, 404, 413, 422):
                raise UserError(f"the reward server {self.url} refuses: {why}") from error
            return missing(len(images), f"the server answered {error.code}: {why}")
        except Exception as error:  # slow, gone, garbage: a server may do anything
            return missing(len(images), f"{type(error).__name__}: {error}")

    def _answer(self, request: urllib.request.Request) -> bytes:
        """The body of the answer. Raises TimeoutError when its time is over, however busily it dribbles."""
        patience = self.timeout * self.connections
        end = time.monotonic() + patience
        parts = []
        with self._opener.open(request, timeout=patience) as response:
            while part := response.read1(2**16):
                parts.append(part)
                if time.monotonic() > end:
                    raise TimeoutError(f"no whole answer within {patience:g} seconds")
                if sum(map(len, parts)) > MAX_ANSWER:
                    raise ValueError(f"an answer of more than {MAX_ANSWER} bytes")
        return b"".join(parts)


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows 307 and 308 with the same body, to the same host alone: the request carries a token."""

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        old, new = urllib.parse.urlsplit(req.full_url), urllib.parse.urlsplit(newurl)
        if code not in (307, 308) or (old.scheme, old.netloc) != (new.scheme, new.netloc):
            return None
        return urllib.request.Request(newurl, req.data, dict(req.header_items()))


def _scores_of(answer: Any, n: int) -> Scores:
    """Raises ValueError with the server's own reason, where it gives one, if the answer holds no scores."""
    if not isinstance(answer, dict) or "scores" not in answer:
        if reason := _own_reason(answer):
            raise ValueError(reason)
        have = f"an object with {', '.join(answer) or 'nothing'}" if isinstance(answer, dict) else type(answer).__name__
        raise ValueError(f"the answer is {have}; expected an object with 'scores', a list of {n} numbers")
    if not isinstance(answer["scores"], list):
        raise ValueError(f"the answer's scores are {str(answer['scores'])[:60]}; expected a list of {n} numbers")
    failures = [str(why) for why in answer.get("failures") or ()]
    parts = {}
    for name, values in (answer.get("parts") or {}).items():
        if isinstance(values, list) and len(values) == n:
            parts[str(name)] = np.array(values, dtype=np.float64)
        else:
            failures.append(f"the part {name!r} was left out: it is no list of {n} numbers")
    return checked(Scores(np.array(answer["scores"], dtype=object), parts, tuple(failures)), n)


def _reason(error: urllib.error.HTTPError) -> str:
    try:
        return _own_reason(json.loads(error.read(4096))) or str(error.reason)
    except Exception:  # not JSON
        return str(error.reason)


def _own_reason(answer: Any) -> str:
    """What a server says went wrong: ``error``, or ``detail`` as FastAPI has it; empty if it says nothing."""
    said = answer.get("error") or answer.get("detail") if isinstance(answer, dict) else None
    if isinstance(said, list):  # FastAPI's complaints about fields
        return "; ".join(f"{'.'.join(map(str, d['loc']))}: {d['msg']}" if "msg" in d else str(d) for d in said)
    return str(said) if said else ""
