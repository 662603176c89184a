"""The cases of `bad_inputs.py`: what is put in place, the command, and what its message has to hold."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tdm_r1 import cli
from tdm_r1.mini.bundle import bundle_path
from tdm_r1.models.load import lora_path
from tdm_r1.train.folder import RunFolder

Setup = Callable[[Path], Any]
SMALL = [
    "--batch.prompts=2",
    "--batch.group=3",
    "--batch.micro-batch=6",
    "--evaluation.prompts=4",
    "--evaluation.images-per-prompt=1",
    "--evaluation.every=100",
]
TRAIN = ["train", "mini", *SMALL, "--iterations=1"]
OWN_PROMPTS = ["--task.name=prompts", "--task.weights=None", "--reward=jpeg_compressibility"]


@dataclass(frozen=True)
class Case:
    """A command in a folder, and what its message has to hold."""

    kind: str
    what: str
    args: list[str]
    says: str
    setup: Setup | None = None
    within: Callable[[Path], Any] | None = None  # a context: a server, a lock, a disk


def written(name: str, content: str | bytes) -> Setup:
    """Puts a file into the folder."""
    return lambda folder: (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())


def recipe(what: str, text: str | bytes, says: str) -> Case:
    return Case("recipe", what, ["train", "mine.yaml", "--dry-run"], says, written("mine.yaml", text))


def setting(what: str, flags: list[str], says: str) -> Case:
    return Case("setting", what, [*TRAIN, *flags], says)


def prompts(what: str, name: str, text: str | bytes, says: str, *more: str) -> Case:
    args = [*TRAIN, *(more or OWN_PROMPTS), f"--task.prompts={name}"]
    return Case("prompts", what, args, says, written(name, text))


def lora(what: str, says: str, setup: Setup | None = None) -> Case:
    return Case("LoRA", what, [*TRAIN, "--model.student-lora=lora"], says, setup)


def reward(what: str, text: str, says: str, name: str = "score") -> Case:
    return Case("reward", what, [*TRAIN, f"--reward=mine.py:{name}"], says, written("mine.py", text))


# ---------------------------------------------------------------------------------------------- what is put in place


def lora_file(change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Setup:
    """The bundled student with its tensors changed, its settings as they were."""

    def setup(folder: Path) -> None:
        place = Path(lora_path("mini"))
        shutil.copytree(place, folder / "lora")
        file = next((folder / "lora").glob("*.safetensors"))
        with safe_open(file, framework="pt") as opened:
            metadata = opened.metadata()
        save_file({k: v.contiguous() for k, v in change(load_file(file)).items()}, file, metadata)

    return setup


def damaged_lora(change: Callable[[bytes], bytes]) -> Setup:
    def setup(folder: Path) -> None:
        shutil.copytree(lora_path("mini"), folder / "lora")
        file = next((folder / "lora").glob("*.safetensors"))
        file.write_bytes(change(file.read_bytes()))

    return setup


def peft_folder(config: str) -> Setup:
    """The bundled student's tensors as peft names them, with a configuration."""

    def setup(folder: Path) -> None:
        in_lora("adapter_config.json", config)(folder)
        weights = load_file(next(Path(lora_path("mini")).glob("*.safetensors")))
        named = {k.replace("transformer.", "base_model.model.", 1): v for k, v in weights.items()}
        save_file(named, folder / "lora" / "adapter_model.safetensors")

    return setup


def in_lora(name: str, content: str | bytes) -> Setup:
    def setup(folder: Path) -> None:
        (folder / "lora").mkdir()
        written(f"lora/{name}", content)(folder)

    return setup


def run_with(change: Callable[[Path], Any]) -> Setup:
    """A run of two iterations, made once and copied, with something done to it."""

    def setup(folder: Path) -> None:
        shutil.copytree(finished_run(), folder / "runs" / "mini")
        change(folder / "runs" / "mini")

    return setup


_kept = tempfile.TemporaryDirectory()


def finished_run() -> Path:
    folder = Path(_kept.name) / "runs" / "mini"
    if not folder.exists():
        args = ["train", "mini", *SMALL, "--iterations=2", "--save-every=1", f"--output={folder.parent}"]
        if code := cli.main(args):
            raise SystemExit(f"the run that is to be damaged ended with code {code}")
    return folder


def newest(run: Path) -> Path:
    return RunFolder(run).checkpoints()[-1]


def cut_all(run: Path) -> None:
    for path in RunFolder(run).checkpoints():
        path.write_bytes(path.read_bytes()[:1000])


def flip_all(run: Path) -> None:
    for path in RunFolder(run).checkpoints():
        data = bytearray(path.read_bytes())
        data[-1000] ^= 1
        path.write_bytes(data)


def pictures(folder: Path, n: int = 2) -> None:
    (folder / "pics").mkdir()
    for i in range(n):
        Image.new("RGB", (8, 8), (40 * i, 0, 0)).save(folder / "pics" / f"{i}.png")


def two_pictures_three_prompts(folder: Path) -> None:
    pictures(folder)
    written("p.txt", "a\nb\nc\n")(folder)


def pipeline_without(part: str) -> Setup:
    def setup(folder: Path) -> None:
        shutil.copytree(bundle_path(), folder / "model")
        shutil.rmtree(folder / "model" / part)

    return setup


@contextmanager
def server(status: int, body: bytes, folder: Path) -> Iterator[None]:
    """On port 8765 of this machine, whatever the folder."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_GET = do_POST

        def log_message(self, format: str, *args: Any) -> None: ...

    ThreadingHTTPServer.allow_reuse_address = True
    found = ThreadingHTTPServer(("127.0.0.1", 8765), Handler)
    threading.Thread(target=found.serve_forever, daemon=True).start()
    try:
        yield
    finally:
        found.shutdown()
        found.server_close()


@contextmanager
def disk(folder: Path, options: str) -> Iterator[None]:
    """A disk in memory at ``folder/disk``, for root on Linux."""
    place = folder / "disk"
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", str(place)], check=True)


def may_mount() -> bool:
    if not hasattr(os, "geteuid") or os.geteuid() or not shutil.which("mount"):
        return False
    with tempfile.TemporaryDirectory() as folder:
        try:
            with disk(Path(folder), "size=1m"):
                return True
        except (subprocess.CalledProcessError, OSError):
            return False


# ---------------------------------------------------------------------------------------------- the cases


MILLION = "".join(f'{{"prompt": "a circle {i}"}}\n' for i in range(1_000_000))
BAD_AT_70123 = "\n".join('{"prompt": "a circle"}' if i != 70_122 else '{"prompt": "a cir' for i in range(100_000))
GENEVAL_ROW = '{"prompt": "two dogs", "tag": "counting", "include": %s}\n'
GENEVAL = ["--task.name=geneval", "--task.weights=None", "--reward=jpeg_compressibility"]
RESUME = ["train", "runs/mini", "--resume", "--iterations=3"]

CASES = [
    recipe("that is empty", "", "mine.yaml"),
    recipe("with a tab", "batch:\n\tprompts: 2\n", "mine.yaml"),
    recipe("that is a list", "- mini\n", "mine.yaml"),
    recipe("that is a picture", b"\x89PNG\r\n\x1a\n\x00\xff", "mine.yaml"),
    recipe("with a key that is not known", "extends: mini\nbatch: {promts: 2}\n", "promts"),
    recipe("with a word for a number", "extends: mini\nbatch: {prompts: many}\n", "batch.prompts"),
    recipe("with a Python object", "a: !!python/object/apply:os.system ['true']\n", "mine.yaml"),
    recipe("that extends itself", "extends: mine.yaml\n", "extends itself"),
    recipe("that extends nothing", "extends: nobody\n", "nobody"),
    recipe("with the same key twice", "extends: mini\nname: a\nname: b\n", "name"),
    Case("recipe", "that does not exist", ["train", "nobody"], "nobody"),
    Case("recipe", "a folder without a run", ["train", "empty"], "empty", lambda f: (f / "empty").mkdir()),
    setting("no samples", ["--batch.group=0"], "config.batch: 1 validation error for BatchConfig group"),
    setting("a single sample of a prompt", ["--batch.group=1"], "batch.group"),
    setting("more trained than drawn", ["--batch.trained=9"], "batch.trained"),
    setting("no steps", ["--sampler.steps=0"], "config.sampler: 1 validation error for SamplerConfig steps"),
    setting("a learning rate below zero", ["--tdm.fake.learning-rate=-1"], "learning_rate"),
    setting("a share above one", ["--tdm.fake.decay-share=2"], "decay_share"),
    setting("an algorithm that is not known", ["--algorithm=ppo"], "ppo"),
    setting("an algorithm of a module that is not there", ["--algorithm=nowhere.at_all:PPO"], "nowhere"),
    setting("a task that is not known", ["--task.name=cats"], "cats"),
    setting("a tracker that is not known", ["--trackers", "paper"], "paper"),
    setting("a GPU that is not there", ["--model.device=cuda:17"], "model.device"),
    setting("two rewards of one name", ["--reward=mini + mini"], "twice"),
    setting("a sum that is cut off", ["--reward=mini + "], "is not a reward"),
    setting("Ray without actors", ["--scoring.backend=ray"], "scoring.workers"),
    setting("GPUs for processes", ["--scoring.gpus=1"], "scoring.gpus"),
    setting("a KL task without prompts", ["--task.kl=mini"], "batch.kl_prompts"),
    setting("an average that is added at full weights", ["--model.roles=full", "--model.student-lora=None"],
            "added_delta"),
    setting("--from without --resume", ["--from=3"], "--resume"),
    prompts("a file that is empty", "a.txt", "\n\n", "a.txt"),
    prompts("rows without a prompt", "a.jsonl", '{"text": "a cat"}\n', "a.jsonl:1"),
    prompts("a million rows, for rewards that need a quoted text", "a.jsonl", MILLION, "prompt 1", *OWN_PROMPTS[:2],
            "--reward=ocr_line"),
    prompts("row 70,123 cut off", "a.jsonl", BAD_AT_70123, "a.jsonl:70123"),
    prompts("a table without a column of prompts", "a.csv", "n,words\n1,a cat\n", "a.csv"),
    prompts("text that is not UTF-8", "a.txt", "caf\xe9".encode("latin-1"), "a.txt"),
    prompts("a list of numbers", "a.json", "[1, 2]", "a.json"),
    prompts("a picture", "a.txt", b"\x89PNG\r\n\x1a\n\x00\xff\xfe", "a.txt"),
    prompts("GenEval rows without a family", "a.jsonl", '{"prompt": "two dogs"}\n', "a.jsonl:1: tag", *GENEVAL),
    prompts("GenEval rows with words for objects", "a.jsonl", GENEVAL_ROW % '["dog"]', "a.jsonl", *GENEVAL),
    Case("prompts", "a file that is not there", [*TRAIN, *OWN_PROMPTS, "--task.prompts=a.txt"], "a.txt"),
    Case("prompts", "a folder", [*TRAIN, *OWN_PROMPTS, "--task.prompts=a"], "'a'", lambda f: (f / "a").mkdir()),
    lora("a folder that is not there", "no LoRA at 'lora'"),
    lora("an empty folder", "no LoRA at 'lora'", lambda f: (f / "lora").mkdir()),
    lora("a file that is cut off", "no whole safetensors file", damaged_lora(lambda data: data[: len(data) // 2])),
    lora("a pointer of Git LFS", "LFS", in_lora("pytorch_lora_weights.safetensors",
         "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n")),
    lora("a pickle", "pytorch_lora_weights.safetensors, or a hub id", in_lora("pytorch_lora_weights.bin",
         b"\x80\x04K\x01.")),
    lora("of a wider model", "has width 256, here it is 128", lora_file(
        lambda w: {k: torch.cat([v, v], 1) if "lora_A" in k else v for k, v in w.items()})),
    lora("of a narrower model", "has width 64, here it is 128", lora_file(
        lambda w: {k: v[:, :64] if "lora_A" in k else v for k, v in w.items()})),
    lora("of a model with other blocks", "single_blocks", lora_file(
        lambda w: {k.replace("transformer_blocks", "single_blocks"): v for k, v in w.items()})),
    lora("with half of its matrices", "lacks one of the two matrices", lora_file(
        lambda w: {k: v for k, v in w.items() if "lora_A" not in k})),
    lora("that is no LoRA", "a LoRA of a transformer is expected", lora_file(
        lambda w: {"weight": next(iter(w.values()))})),
    lora("with a configuration that is cut off", "adapter_config.json", peft_folder('{"r": ')),
    Case("run", "resumed where there is none", ["train", "mini", "--resume"], "--resume"),
    Case("run", "a folder with another run", TRAIN, "runs/mini", run_with(lambda run: None)),
    Case("run", "every checkpoint cut off", RESUME, "damaged", run_with(cut_all)),
    Case("run", "every checkpoint with a flipped bit", RESUME, "checksum", run_with(flip_all)),
    Case("run", "a checkpoint that is a LoRA", RESUME, "not a tdm-r1 checkpoint",
         run_with(lambda run: [shutil.copy(next(Path(lora_path("mini")).glob("*.safetensors")), p)
                               for p in RunFolder(run).checkpoints()])),
    Case("run", "from an iteration that was not saved", [*RESUME, "--from=7"], "--from", run_with(lambda run: None)),
    Case("run", "resumed with another rank", [*RESUME, "--model.lora.rank=4"], "model.lora.rank",
         run_with(lambda run: None)),
    Case("run", "resumed with another algorithm", [*RESUME, "--algorithm=nft"], "algorithm",
         run_with(lambda run: None)),
    Case("run", "settings that are cut off", RESUME, "config.yaml",
         run_with(lambda run: (run / "config.yaml").write_text("batch: {"))),
    Case("run", "in use", RESUME, "in use", run_with(lambda run: None),
         within=lambda folder: RunFolder(folder / "runs" / "mini").alone()),
    Case("run", "where a file is", [*TRAIN, "--output=place"], "place", written("place", "mine")),
    reward("a file that is not there", "", "nobody", name="nobody"),
    reward("with a mistake in its syntax", "def score(:\n", "mine.py"),
    reward("that needs a package that is not there", "import nowhere_at_all\n", "nowhere_at_all"),
    reward("that raises", "def score(*a):\n    raise RuntimeError('no weights')\n", "no weights"),
    reward("with too few scores", "def score(i, p, m):\n    return [1.0]\n", "shape"),
    reward("with NaN alone", "def score(i, p, m):\n    return [float('nan')] * len(i)\n", "no score"),
    reward("that is asynchronous", "async def score(i, p, m):\n    return [1.0]\n", "async"),
    Case("reward", "a server that is not there", [*TRAIN, "--reward=http://127.0.0.1:9"], "127.0.0.1:9"),
    *(
        Case("reward", f"a server that {what}", [*TRAIN, "--reward=http://127.0.0.1:8765"], says,
             within=partial(server, status, body))
        for what, status, body, says in (
            ("answers 500", 500, b'{"error": "out of memory"}', "out of memory"),
            ("answers a page", 200, b"<html>", "8765: JSONDecodeError"),
            ("answers too few scores", 200, b'{"scores": [1.0]}', "one each is needed"),
            ("wants another token", 401, b'{"error": "wrong token"}', "token"),
        )
    ),
    Case("model", "a folder without a model", [*TRAIN, "--model.path=model"], "no whole pipeline",
         lambda f: (f / "model").mkdir()),
    Case("model", "without its transformer", [*TRAIN, "--model.path=model"], "no whole pipeline",
         pipeline_without("transformer")),
    Case("model", "an id that the hub does not have", [*TRAIN, "--model.path=nobody/nothing"], "nobody/nothing"),
    Case("score", "a folder without pictures", ["score", "pics", "--reward=mini"], "pics", lambda f: pictures(f, 0)),
    Case("score", "more prompts than pictures", ["score", "pics", "--reward=mini", "--prompts=p.txt"], "2 pictures",
         two_pictures_three_prompts),
    Case("score", "a reward that needs prompts, without", ["score", "pics", "--reward=ocr"], "prompts", pictures),
    Case("sample", "no images", ["sample", "--prompt=a circle", "--images=0"], "images"),
    Case("sample", "no steps", ["sample", "--prompt=a circle", "--steps=0"], "steps"),
    Case("sample", "a LoRA that is not there", ["sample", "--prompt=a circle", "--lora=gone"], "gone"),
    Case("sample", "a device as precision", ["sample", "--prompt=a circle", "--dtype=cuda"], "dtype"),
]  # fmt: skip
DISKS = [
    Case("disk", "full", [*TRAIN, "--output=disk"], "No space", within=lambda folder: disk(folder, "size=200k")),
    Case("disk", "that cannot be written", [*TRAIN, "--output=disk"], "disk", within=lambda folder: disk(folder, "ro")),
]
