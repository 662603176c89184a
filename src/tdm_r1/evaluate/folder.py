"""The folder of an evaluation: what is in it, and with which settings it was made."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..config.run import CONFIG_FILE, LOG, RunConfig, dump
from ..errors import UserError
from ..files import write_text
from ..models.load import resolve_model
from ..models.lora_files import lora_digest
from ..models.settings import ModelConfig
from ..rewards.scorer import parse
from ..tasks.protocol import Prompt
from .evaluation import Sampling
from .table import HELD_OUT

SETTINGS = "settings.json"  # how the images beside it were made


@dataclass(frozen=True)
class Model:
    """One row of the table: how it is sampled, and the LoRA on the student, if it has one."""

    name: str
    sampling: Sampling
    lora: str | Path | None = None
    strength: float | None = None  # at which its publisher loads it

    @property
    def folder(self) -> str:
        return re.sub(r"[^A-Za-z0-9]+", "_", self.name).strip("_")


class EvaluationFolder:
    """Keeps images and scores of different evaluations apart.

    Args:
        folder: what is there already is kept. Raises UserError if it holds images of another evaluation, or a run.
        config, models, prompts: of the evaluation.
    """

    def __init__(self, folder: Path, config: RunConfig, models: Sequence[Model], prompts: Sequence[Prompt]) -> None:
        self.folder, self.config, self.prompts = folder, config, prompts
        folders = [m.folder for m in models]
        if twice := {f for f in folders if folders.count(f) > 1}:
            raise UserError(f"two models would share the folder {min(twice)!r}: name their LoRA folders differently")
        if (folder / LOG).exists():
            raise UserError(f"--out = {str(folder)!r} is a run's folder: name another, or one in it")
        settings = {"prompts": [p.text for p in prompts], "seed": config.evaluation.seed}
        self._drawn_with = json.dumps(settings | _what_draws(config.model), indent=1)
        self._made_with = {m.name: json.dumps(_how_made(m), indent=1) for m in models}
        everything = folder / "pictures"
        self._same(folder / SETTINGS, everything, self._drawn_with, "other prompts, noise or model")
        for model in models:
            own = everything / model.folder
            self._same(own / SETTINGS, own, self._made_with[model.name], f"another version of {model.name!r}")
        write_text(folder / CONFIG_FILE, dump(config))

    def _same(self, file: Path, made: Path, text: str, otherwise: str) -> None:
        if file.exists() and file.read_text() == text:
            return
        if file.exists() and any(made.rglob("*.png")):
            raise UserError(
                f"--out = {str(self.folder)!r} holds pictures of {otherwise} (or of an earlier version of tdm-r1): "
                "name another folder"
            )
        write_text(file, text)

    def require_unchanged(self, model: Model) -> None:
        """Raises UserError if another evaluation has begun in the folder meanwhile."""
        files = {self.folder / SETTINGS: self._drawn_with}
        files[self.folder / "pictures" / model.folder / SETTINGS] = self._made_with[model.name]
        if any(file.read_text() != text for file, text in files.items()):
            raise UserError(f"another evaluation has begun in --out = {str(self.folder)!r}: name a folder for each")

    def picture(self, model: Model, index: int) -> Path:
        """The image of prompt ``index``."""
        return self.folder / "pictures" / model.folder / f"{index:06d}.png"

    def scores(self, model: Model, metric: str) -> Path:
        """Where a model's numbers of a metric are kept: by the metric, a user's own file of it, the prompts, and how
        the images were made."""
        terms = [] if metric == HELD_OUT else [Path(term.name.rpartition(":")[0]) for term in parse(metric)]
        own = [file.read_bytes().hex() for file in terms if file.suffix == ".py" and file.is_file()]
        made = [self._drawn_with, self._made_with[model.name]]
        prompts = [(p.text, p.metadata) for p in self.prompts]
        text = json.dumps([metric, own, made, self.config.task.name, prompts], sort_keys=True, default=str)
        name = f"{re.sub(r'[^A-Za-z0-9.]+', '_', metric)[-80:]}_{hashlib.sha256(text.encode()).hexdigest()[:8]}.json"
        return self.folder / "scores" / model.folder / name


def _how_made(model: Model) -> dict[str, Any]:
    lora = lora_digest(model.lora) if model.lora else None
    return asdict(model.sampling) | {"lora": lora, "strength": model.strength}


def _what_draws(model: ModelConfig) -> dict[str, Any]:
    """All of a model's settings that its images depend on, with a fingerprint of weights that lie on this machine."""
    kept = ("path", "family", "teacher", "resolution", "dtype", "t5", "max_sequence_length", "vae_tiling")
    paths = [resolve_model(model).path, *([model.teacher] if model.teacher else [])]
    return model.model_dump(mode="json", include=set(kept)) | {"weights": [_fingerprint(Path(p)) for p in paths]}


def _fingerprint(folder: Path) -> str | None:
    """Of a pipeline's folder: of its files' sizes and of blocks all over them, since to read all of a large model takes
    minutes."""
    if not folder.is_dir():
        return None
    digest, block = hashlib.sha256(), 2**16
    for path in sorted(f for f in folder.rglob("*") if f.suffix in (".json", ".safetensors", ".txt", ".model")):
        size = path.stat().st_size
        digest.update(f"{path.relative_to(folder).as_posix()} {size} ".encode())
        with path.open("rb") as file:
            for start in (*range(0, size, max(size // 256, block)), max(size - block, 0)):
                file.seek(start)
                digest.update(file.read(block))
    return digest.hexdigest()
