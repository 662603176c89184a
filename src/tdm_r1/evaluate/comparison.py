"""Several models on the same prompts and noise: images, scores, a table as the paper's and a picture grid.

Every image is a PNG of its own, so an interrupted evaluation goes on where it stopped, and processes can share it; so
does every metric of every model.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.progress import track

from ..config.run import RunConfig
from ..core.randomness import torch_rng
from ..files import write_text
from ..models.create import create_roles
from ..models.embedder import Embedder
from ..models.load import load_backbones
from ..models.lora_files import adapter_for, load_lora, read_lora
from ..models.specification import Role, RoleSpec
from ..rewards.scorer import Scorer
from ..rewards.scores import family_means, joined
from ..tasks.load import load_task
from . import pictures
from .evaluation import generate, mean_of
from .folder import EvaluationFolder, Model
from .table import HELD_OUT, markdown

GRID_PROMPTS = 12


class Comparison:
    """Pictures and scores of several models in one folder.

    Args:
        config: a run's; its task, reward, sampler and evaluation are used.
        models: rows of the table. Raises UserError if two of them would share a folder.
        rewards: what pictures are scored with, by name, beside the task's held-out metrics.
        folder: where pictures, scores and the table go; what is there already is kept. Raises UserError if it holds
            the pictures of another evaluation, or a run.
        shard: (this one, of how many).
    """

    def __init__(
        self,
        config: RunConfig,
        models: Sequence[Model],
        rewards: Sequence[str],
        folder: Path,
        *,
        shard: tuple[int, int] = (0, 1),
        console: Console | None = None,
    ) -> None:
        self.config, self.models, self.folder, self.shard = config, list(models), folder, shard
        self.rewards = list(dict.fromkeys(rewards))
        self.console = console or Console()
        self.task = load_task(config.task)
        e = config.evaluation
        self.prompts = [p for p in self.task.eval_prompts(e.prompts) for _ in range(e.images_per_prompt)]
        self.files = EvaluationFolder(folder, config, self.models, self.prompts)

    # -------------------------------------------------------------------------------------- pictures

    def missing(self, model: Model, shard: tuple[int, int] = (0, 1)) -> list[int]:
        """Indices of the pictures that are not there, of a share of them."""
        return [i for i in range(shard[0], len(self.prompts), shard[1]) if not self.files.picture(model, i).exists()]

    def sample(self) -> None:
        """Makes this shard's pictures that are not there yet."""
        wanted = [m for m in self.models if self.missing(m, self.shard)]
        if not wanted:
            return
        student, teacher = load_backbones(self.config.model)
        own = adapter_for([read_lora(m.lora, strength=m.strength) for m in wanted if m.lora])
        roles = create_roles([RoleSpec(Role.GENERATOR)], student, own, teacher=teacher)
        start, embed = roles.state(Role.GENERATOR), Embedder(student)
        embed.learn(["", *(self.prompts[i].text for m in wanted for i in self.missing(m, self.shard))])
        noise = torch_rng(self.config.evaluation.seed, 0, "evaluation noise")
        x_1 = torch.randn((len(self.prompts), *student.latent_shape), generator=noise)
        for model in wanted:
            roles.load(Role.GENERATOR, start)
            if model.lora:
                load_lora(roles, (Role.GENERATOR,), model.lora, own, strength=model.strength)
            for rows in self._batches(model):
                texts = [self.prompts[i].text for i in rows]
                images = generate(
                    student,
                    roles,
                    model.sampling,
                    embed,
                    texts,
                    x_1[rows],
                    batch=len(rows),
                    seed=self.config.evaluation.seed,
                    numbers=rows,
                )
                self.files.require_unchanged(model)
                for i, image in zip(rows, images, strict=True):
                    pictures.save_png(Image.fromarray(image), self.files.picture(model, i))

    def _batches(self, model: Model) -> Iterator[list[int]]:
        rows, size = self.missing(model, self.shard), self.config.batch.micro_batch
        parts = [rows[start : start + size] for start in range(0, len(rows), size)]
        yield from track(parts, f"sampling {model.name}", console=self.console, transient=True)

    def images(self, model: Model) -> np.ndarray:
        """All pictures of a model, uint8 [B, H, W, 3]."""
        return self._read(model, range(len(self.prompts)))

    def _read(self, model: Model, rows: Sequence[int]) -> np.ndarray:
        return np.stack([np.asarray(Image.open(self.files.picture(model, i)).convert("RGB")) for i in rows])

    # -------------------------------------------------------------------------------------- scores

    def score(self) -> dict[str, dict[str, dict[str, float]]]:
        """model -> metric -> its numbers; what was scored before is read back. Every picture has to be there.

        One reward after the other: each may fill a GPU.
        """
        columns = {metric: self._column(metric) for metric in (*self.rewards, HELD_OUT)}
        return {m.name: {metric: column[m.name] for metric, column in columns.items()} for m in self.models}

    def _column(self, metric: str) -> dict[str, dict[str, float]]:
        """model -> its numbers of one metric. Those with missing scores are not filed: the next evaluation scores
        them again."""
        files = {m.name: self.files.scores(m, metric) for m in self.models}
        found = {model: json.loads(file.read_text()) for model, file in files.items() if file.exists()}
        waiting = [m for m in self.models if m.name not in found]
        scorer = Scorer(metric, self.config.scoring) if waiting and metric != HELD_OUT else None
        try:
            for model in waiting:
                numbers = self._reward(model, metric, scorer) if scorer else self._held_out(model)
                found[model.name] = numbers
                if not numbers.get("missing"):
                    write_text(files[model.name], json.dumps(numbers, indent=1))
        finally:
            if scorer:
                scorer.close()
        return found

    def _held_out(self, model: Model) -> dict[str, float]:
        found = self.task.metrics(self.images(model), self.prompts, self.config.evaluation.images_per_prompt)
        return {name: value for name, value in found.items() if not np.isnan(value)}

    def _reward(self, model: Model, metric: str, scorer: Scorer) -> dict[str, float]:
        """Mean, missing scores, and the mean of each family of prompts (GenEval's tags) with their mean."""
        starts = range(0, len(self.prompts), self.config.batch.micro_batch)
        chunks = []
        for start in track(starts, f"{metric} of {model.name}", console=self.console, transient=True):
            rows = range(start, min(start + self.config.batch.micro_batch, len(self.prompts)))
            images = self._read(model, rows)
            chunks.append(scorer(images, [self.prompts[i] for i in rows]))
        scores = joined(chunks)
        for why in dict.fromkeys(scores.failures):
            self.console.print(f"{metric}: {why}", style="yellow", markup=False)
        found = {"missing": float(np.isnan(scores.values).sum())} | self._means(scores.values)
        for part, values in scores.parts.items():
            found |= {f"{part} {number}": value for number, value in self._means(values).items()}
        return found

    def _means(self, values: np.ndarray) -> dict[str, float]:
        """The mean, and where prompts come in families each one's and the mean of these; what is all missing is left
        out."""
        by_tag = family_means(values, [str(p.metadata.get("tag", "")) for p in self.prompts])
        found = {"mean": mean_of(values)} | by_tag
        if by_tag:
            found["overall"] = float(np.mean(list(by_tag.values())))
        return {name: value for name, value in found.items() if not np.isnan(value)}

    # -------------------------------------------------------------------------------------- telling

    def result(self) -> dict:
        """Scores everything; JSON-ready."""
        scores = self.score()
        rows = [{"model": m.name, "network_evaluations": m.sampling.network_evaluations} for m in self.models]
        return {
            "prompts": len(self.prompts) // self.config.evaluation.images_per_prompt,
            "images_per_prompt": self.config.evaluation.images_per_prompt,
            "models": [row | {"scores": scores[str(row["model"])]} for row in rows],
        }

    def write(self, result: dict) -> Path:
        """Writes results.json, table.md and grid.png; returns the table's path."""
        write_text(self.folder / "results.json", json.dumps(result, indent=1))
        write_text(self.folder / "table.md", markdown(result))
        pictures.save_png(self._grid(), self.folder / "grid.png")
        return self.folder / "table.md"

    def _grid(self) -> Image.Image:
        step = self.config.evaluation.images_per_prompt
        n = len(self.prompts) // step
        rows = [step * i for i in np.linspace(0, n, min(n, GRID_PROMPTS), endpoint=False).astype(int)]
        shown = [(m.name, self._read(m, rows)) for m in self.models]
        return pictures.grid(shown, [self.prompts[i].text for i in rows])
