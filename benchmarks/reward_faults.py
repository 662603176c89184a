"""What a run does when its reward fails: raises, hangs, dies, returns nonsense, or sits behind a bad server.

Each fault strikes some pictures of one group in every second iteration of a short real run on the bundled mini
model. A second run is told to miss the same scores and nothing else; its weights have to be the same bit for bit.

Run: ``python benchmarks/reward_faults.py`` (writes docs/results/rewards.json and .md).
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import threading
import time
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np

from tdm_r1.errors import UserError
from tdm_r1.rewards.http import decode_request
from tdm_r1.rewards.scores import Scores
from tdm_r1.tasks.protocol import Prompt

if TYPE_CHECKING:  # imported where they are used: worker processes read this file for its rewards alone
    import torch

    from tdm_r1 import Run, RunConfig

PROMPTS, GROUP, ITERATIONS, CHUNK, TIMEOUT = 3, 8, 4, 4, 3.0
PLACES: dict[str, dict[str, Any]] = {
    "2 worker processes": {"workers": 2},
    "2 Ray actors": {"workers": 2, "backend": "ray"},
}


# ---------------------------------------------------------------------------------------------- rewards that fail


def healthy(images: np.ndarray, prompts: list[str], metadata: list[dict[str, Any]]) -> np.ndarray:
    return images[:, :, :32].mean((1, 2, 3)) / 255


def struck(images: np.ndarray, metadata: list[dict[str, Any]]) -> bool:
    """Whether a fault strikes: on about a third of the pictures of the first prompt, in every second iteration."""
    return any(
        m["number"][0] % 2 == 1 and m["number"][1] == 0 and zlib.crc32(image.tobytes()) % 3 == 0
        for image, m in zip(images, metadata, strict=True)
    )


def raises(images, prompts, metadata):
    if struck(images, metadata):
        raise RuntimeError("this picture cannot be scored")
    return healthy(images, prompts, metadata)


def hangs(images, prompts, metadata):
    if struck(images, metadata):
        time.sleep(3600)
    return healthy(images, prompts, metadata)


def dies(images, prompts, metadata):
    if struck(images, metadata):
        os.kill(os.getpid(), 11)
    return healthy(images, prompts, metadata)


def dies_later(images, prompts, metadata):
    if struck(images, metadata):
        threading.Timer(0.05, os._exit, (9,)).start()
    return healthy(images, prompts, metadata)


def exits(images, prompts, metadata):
    if struck(images, metadata):
        sys.exit(1)
    return healthy(images, prompts, metadata)


def nan(images, prompts, metadata):
    scores = healthy(images, prompts, metadata)
    lost = [struck(images[i : i + 1], metadata[i : i + 1]) for i in range(len(images))]
    return np.where(lost, np.nan, scores)


def wrong_length(images, prompts, metadata):
    return healthy(images, prompts, metadata)[: -1 if struck(images, metadata) else None]


def always_raises(images, prompts, metadata):
    raise ValueError("weights not found")


def constant(images, prompts, metadata):
    return np.full(len(images), 0.5)


class BadServer(BaseHTTPRequestHandler):
    """Scores as it should until a fault strikes; then it does what its ``manner`` says."""

    manner = ""

    def do_POST(self) -> None:
        images, prompts, metadata = decode_request(self.rfile.read(int(self.headers["Content-Length"])))
        stacked = np.stack(images)
        body = json.dumps({"scores": healthy(stacked, prompts, metadata).tolist()}).encode()
        if struck(stacked, metadata):
            if self.manner == "is slow":
                time.sleep(2 * TIMEOUT)
            if self.manner == "drops the connection":
                return
            body = b"<html>Bad gateway</html>"
            if self.manner == "dribbles its answer":
                body = b" " * 100_000
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        for start in range(0, len(body), 1000):
            self.wfile.write(body[start : start + 1000])
            if len(body) == 100_000:
                time.sleep(0.2)

    def log_message(self, format: str, *args: Any) -> None: ...


# ---------------------------------------------------------------------------------------------- runs


class Numbered:
    """A task whose prompts carry ``number`` = (iteration, prompt), so that faults strike at the same place."""

    def __init__(self, run: Run) -> None:
        self.run, self.task = run, run.task

    def train_prompts(self, n: int, rng: np.random.Generator) -> list[Prompt]:
        prompts = self.task.train_prompts(n, rng)
        return [Prompt(p.text, p.metadata | {"number": [self.run.iteration, j]}) for j, p in enumerate(prompts)]


class Masked:
    """The healthy reward, without the scores that another run lost (bool [B] for each iteration)."""

    def __init__(self, masks: Sequence[np.ndarray]) -> None:
        self.masks = list(masks)

    def __call__(self, images: np.ndarray, prompts: list[str], metadata: list[dict[str, Any]]) -> np.ndarray:
        return np.where(self.masks[metadata[0]["number"][0]], np.nan, healthy(images, prompts, metadata))


@dataclass
class Outcome:
    masks: list[np.ndarray]
    seconds: float
    stopped: str
    told: list[str]
    weights: dict[str, torch.Tensor]


def train(config: RunConfig, reward: Masked | None = None) -> Outcome:
    from tdm_r1 import Run
    from tdm_r1.models.specification import Role

    run = Run(config, reward=reward)
    run.task = Numbered(run)  # type: ignore[assignment]
    masks: list[np.ndarray] = []
    total = run.scorer.total

    def noted(*args: Any, **options: Any) -> Scores:
        scores = total(*args, **options)
        masks.append(np.isnan(scores.values))
        return scores

    run.scorer.total = noted  # type: ignore[method-assign]
    stopped, start = "", time.perf_counter()
    try:
        while run.iteration < config.iterations:
            run.step()
    except UserError as error:
        stopped = str(error)
    seconds = time.perf_counter() - start
    run.scorer.close()
    roles = (Role.GENERATOR, Role.FAKE, Role.SURROGATE, Role.SURROGATE_EMA)
    weights = {f"{r}/{n}": p for r in roles for n, p in run.roles.state(r).items()}
    return Outcome(masks, seconds, stopped, sorted(run.scoring.told), weights)


def measure(fault: str, place: str, reward: str, output: Path) -> dict[str, Any]:
    import torch

    from tdm_r1 import load_recipe

    changes = {
        "name": "fault",
        "output": output,
        "iterations": 12 if reward.endswith(":constant") else ITERATIONS,
        "reward": reward,
        "scoring": PLACES.get(place, {}) | {"timeout": TIMEOUT, "chunk": CHUNK},
        "batch": {"prompts": PROMPTS, "group": GROUP},
    }
    config = load_recipe("mini").override(changes)
    got = train(config)
    lost = int(sum(m.sum() for m in got.masks))
    row = {
        "fault": fault,
        "place": place,
        "stopped": _short(got.stopped),
        "told": [_short(why) for why in got.told],
        "lost": lost,
        "scored": int(sum(m.size for m in got.masks)),
    }
    if not got.stopped:
        healthy_run = train(config.override({"reward": f"{__file__}:healthy"}))
        masked = train(config.override({"scoring": {"timeout": TIMEOUT}}), Masked(got.masks))
        row["seconds_lost"] = round(got.seconds - healthy_run.seconds, 1)
        row["same_weights"] = all(torch.equal(p, masked.weights[n]) for n, p in got.weights.items())
        row["differs_from_healthy"] = any(not torch.equal(p, healthy_run.weights[n]) for n, p in got.weights.items())
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("docs/results/rewards.json"))
    args = parser.parse_args()
    cases = [
        ("returns NaN for some pictures", "this process", nan),
        ("raises for some batches", "this process", raises),
        ("raises for some batches", "2 worker processes", raises),
        ("returns the wrong length for some batches", "2 worker processes", wrong_length),
        ("hangs", "2 worker processes", hangs),
        ("dies by signal 11", "2 worker processes", dies),
        ("dies after answering", "2 worker processes", dies_later),
        ("raises for some batches", "2 Ray actors", raises),
        ("returns the wrong length for some batches", "2 Ray actors", wrong_length),
        ("hangs", "2 Ray actors", hangs),
        ("dies by signal 11", "2 Ray actors", dies),
        ("dies after answering", "2 Ray actors", dies_later),
        ("calls sys.exit", "2 Ray actors", exits),
        ("raises always", "2 Ray actors", always_raises),
        ("calls sys.exit", "this process", exits),
        ("raises always", "this process", always_raises),
        ("is constant", "this process", constant),
    ]
    rows = []
    with TemporaryDirectory() as folder:
        for fault, place, function in cases:
            rows.append(measure(fault, place, f"{__file__}:{function.__name__}", Path(folder)))
            print(rows[-1], flush=True)
        for manner in ("is slow", "dribbles its answer", "drops the connection", "answers garbage"):
            server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bad", (BadServer,), {"manner": manner}))
            server.handle_error = lambda *_: None  # type: ignore[method-assign]  # the client left: as planned
            threading.Thread(target=server.serve_forever, daemon=True).start()
            rows.append(measure(manner, "an HTTP server", f"http://127.0.0.1:{server.server_port}", Path(folder)))
            print(rows[-1], flush=True)
            server.shutdown()
            server.server_close()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(rows, indent=2) + "\n")
    args.out.with_suffix(".md").write_text(page(rows))
    print(f"Wrote {args.out.with_suffix('.md')}")


def page(rows: list[dict[str, Any]]) -> str:
    lines = [
        "# When a reward fails",
        "",
        f"Written by `python benchmarks/reward_faults.py`; not edited by hand. {ITERATIONS} iterations of TDM-R1 on",
        f"the bundled mini model, {PROMPTS} prompts x {GROUP} pictures, chunks of {CHUNK} in workers and to the",
        f"server, timeout {TIMEOUT:g} s. The fault strikes in every second iteration, on about a third of one",
        "group's pictures. *Time lost* is against the same run with a healthy reward in the same place (for a server:",
        "in the training process). *Same weights*: whether a run that is told to miss the same scores, and fails in",
        "nothing, ends with the same weights, bit for bit, in generator, fake score, surrogate and its average.",
        "",
        "| the reward | in | the run | scores lost | time lost | same weights |",
        "|---|---|---|---|---|---|",
    ]
    for r in rows:
        fate = f"stopped: {r['stopped']}" if r["stopped"] else "went on"
        if not r["stopped"] and r["told"]:
            fate += f": {r['told'][0]}"
        lost = f"{r['lost']} of {r['scored']}"
        time_lost = f"{r['seconds_lost']:.1f} s" if "seconds_lost" in r else ""
        same = {True: "yes", False: "NO", None: ""}[r.get("same_weights")]
        lines.append(f"| {r['fault']} | {r['place']} | {fate} | {lost} | {time_lost} | {same} |")
    return "\n".join(lines) + "\n"


def _short(text: str) -> str:
    """A message without the folder or the port of this one run."""
    words = (w.rsplit("/", 1)[-1] if "/" in w else w for w in text.split())
    return re.sub(r"127\.0\.0\.1:\d+", "the server", " ".join(words))


if __name__ == "__main__":
    main()
