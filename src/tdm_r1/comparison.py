"""`tdm-r1 eval`: several models on the same prompts and noise, with a table as the paper's and a picture grid.

Every picture is a PNG of its own, so an interrupted evaluation goes on where it stopped, and processes can share it; so
does every metric of every model.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.progress import track
from rich.table import Table

from . import pictures
from .config import CONFIG_FILE, ModelConfig, RunConfig, dump, load_recipe, run_of
from .errors import UserError
from .evaluation import Embedder, Sampling, generate, mean_of
from .files import write_text
from .lora_files import adapter_for, load_lora, lora_digest, read_lora, with_strength
from .mini import bundle
from .randomness import torch_rng
from .rewards import Scorer
from .rewards.registry import GIVEN
from .rewards.scorer import parse
from .rewards.scores import family_means, joined
from .roles import Role, lora_roles
from .tasks import read_prompts
from .trainer import LOG, load_backbones, load_task, resolve_model

if TYPE_CHECKING:
    from .cli import Eval

GRID_PROMPTS = 12
SETTINGS = "settings.json"  # how the pictures beside it were made
HELD_OUT = "held_out"  # the task's own metrics, among the rewards
TOTALS = ("mean", "overall")  # of a reward's numbers


@dataclass(frozen=True)
class Model:
    """One row of the table: how it is sampled, and the LoRA on the student, if it has one."""

    name: str
    sampling: Sampling
    lora: Path | None = None
    strength: float | None = None  # at which its publisher loads it

    @property
    def folder(self) -> str:
        return re.sub(r"[^A-Za-z0-9]+", "_", self.name).strip("_")


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
        folders = [m.folder for m in models]
        if twice := {f for f in folders if folders.count(f) > 1}:
            raise UserError(f"two models would share the folder {min(twice)!r}: name their LoRA folders differently")
        self.task = load_task(config.task)
        e = config.evaluation
        self.prompts = [p for p in self.task.eval_prompts(e.prompts) for _ in range(e.images_per_prompt)]
        self._same_evaluation()

    def _same_evaluation(self) -> None:
        """Refuses a folder whose pictures were made otherwise: they would be taken for these."""
        if (self.folder / LOG).exists():
            raise UserError(f"--out = {str(self.folder)!r} is a run's folder: name another, or one in it")
        settings = {"prompts": [p.text for p in self.prompts], "seed": self.config.evaluation.seed}
        self._drawn_with = json.dumps(settings | _what_draws(self.config.model), indent=1)
        self._made_with = {m.name: json.dumps(_how_made(m), indent=1) for m in self.models}
        everything = self.folder / "pictures"
        self._same(self.folder / SETTINGS, everything, self._drawn_with, "other prompts, noise or model")
        for model in self.models:
            own = everything / model.folder
            self._same(own / SETTINGS, own, self._made_with[model.name], f"another version of {model.name!r}")
        write_text(self.folder / CONFIG_FILE, dump(self.config))

    def _same(self, file: Path, made: Path, text: str, otherwise: str) -> None:
        if file.exists() and file.read_text() == text:
            return
        if file.exists() and any(made.rglob("*.png")):
            raise UserError(
                f"--out = {str(self.folder)!r} holds pictures of {otherwise} (or of an earlier version of tdm-r1): "
                "name another folder"
            )
        write_text(file, text)

    def _still_mine(self, model: Model) -> None:
        """Raises UserError if another evaluation has begun in the folder meanwhile."""
        files = {self.folder / SETTINGS: self._drawn_with}
        files[self.folder / "pictures" / model.folder / SETTINGS] = self._made_with[model.name]
        if any(file.read_text() != text for file, text in files.items()):
            raise UserError(f"another evaluation has begun in --out = {str(self.folder)!r}: name a folder for each")

    # -------------------------------------------------------------------------------------- pictures

    def file(self, model: Model, index: int) -> Path:
        """The picture of prompt ``index``."""
        return self.folder / "pictures" / model.folder / f"{index:06d}.png"

    def missing(self, model: Model, shard: tuple[int, int] = (0, 1)) -> list[int]:
        """Indices of the pictures that are not there, of a share of them."""
        return [i for i in range(shard[0], len(self.prompts), shard[1]) if not self.file(model, i).exists()]

    def sample(self) -> None:
        """Makes this shard's pictures that are not there yet."""
        wanted = [m for m in self.models if self.missing(m, self.shard)]
        if not wanted:
            return
        student, teacher = load_backbones(self.config)
        own = adapter_for([read_lora(m.lora, strength=m.strength) for m in wanted if m.lora])
        roles = lora_roles(student, own, (Role.GENERATOR,), teacher=teacher)
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
                self._still_mine(model)
                for i, image in zip(rows, images, strict=True):
                    pictures.save_png(Image.fromarray(image), self.file(model, i))

    def _batches(self, model: Model) -> Iterator[list[int]]:
        rows, size = self.missing(model, self.shard), self.config.batch.micro_batch
        parts = [rows[start : start + size] for start in range(0, len(rows), size)]
        yield from track(parts, f"sampling {model.name}", console=self.console, transient=True)

    def images(self, model: Model) -> np.ndarray:
        """All pictures of a model, uint8 [B, H, W, 3]."""
        return np.stack([np.asarray(Image.open(self.file(model, i)).convert("RGB")) for i in range(len(self.prompts))])

    # -------------------------------------------------------------------------------------- scores

    def score(self) -> dict[str, dict[str, dict[str, float]]]:
        """model -> metric -> its numbers; what was scored before is read back. Every picture has to be there.

        One reward after the other: each may fill a GPU.
        """
        columns = {metric: self._column(metric) for metric in (*self.rewards, HELD_OUT)}
        return {m.name: {metric: column[m.name] for metric, column in columns.items()} for m in self.models}

    def _column(self, metric: str) -> dict[str, dict[str, float]]:
        """model -> its numbers of one metric. Those with missing scores are not filed: the next evaluation asks for
        them again."""
        files = {m.name: self._scores_file(m, metric) for m in self.models}
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

    def _scores_file(self, model: Model, metric: str) -> Path:
        """Where a model's numbers of a metric are kept: by the metric, a user's own file of it, the prompts, and how
        the pictures were made."""
        terms = [] if metric == HELD_OUT else [Path(term.name.rpartition(":")[0]) for term in parse(metric)]
        own = [file.read_bytes().hex() for file in terms if file.suffix == ".py" and file.is_file()]
        made = [self._drawn_with, self._made_with[model.name]]
        prompts = [(p.text, p.metadata) for p in self.prompts]
        text = json.dumps([metric, own, made, self.config.task.name, prompts], sort_keys=True, default=str)
        name = f"{re.sub(r'[^A-Za-z0-9.]+', '_', metric)[-80:]}_{hashlib.sha256(text.encode()).hexdigest()[:8]}.json"
        return self.folder / "scores" / model.folder / name

    def _held_out(self, model: Model) -> dict[str, float]:
        found = self.task.metrics(self.images(model), self.prompts, self.config.evaluation.images_per_prompt)
        return {name: value for name, value in found.items() if not np.isnan(value)}

    def _reward(self, model: Model, metric: str, scorer: Scorer) -> dict[str, float]:
        """Mean, missing scores, and the mean of each family of prompts (GenEval's tags) with their mean."""
        starts = range(0, len(self.prompts), self.config.batch.micro_batch)
        chunks = []
        for start in track(starts, f"{metric} of {model.name}", console=self.console, transient=True):
            rows = range(start, min(start + self.config.batch.micro_batch, len(self.prompts)))
            images = np.stack([np.asarray(Image.open(self.file(model, i)).convert("RGB")) for i in rows])
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
        shown = [
            (m.name, np.stack([np.asarray(Image.open(self.file(m, i)).convert("RGB")) for i in rows]))
            for m in self.models
        ]
        return pictures.grid(shown, [self.prompts[i].text for i in rows])


def _how_made(model: Model) -> dict[str, Any]:
    lora = lora_digest(model.lora) if model.lora else None
    return asdict(model.sampling) | {"lora": lora, "strength": model.strength}


def _what_draws(model: ModelConfig) -> dict[str, Any]:
    """All of a model's settings that its pictures depend on, with a fingerprint of weights that lie on this machine."""
    kept = ("path", "teacher", "resolution", "dtype", "t5", "max_sequence_length", "vae_tiling")
    paths = [resolve_model(model)[0], *([model.teacher] if model.teacher else [])]
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


def columns_of(result: dict) -> dict[tuple[str, str], str]:
    """(metric, number) -> title: the trained reward first, by family where prompts have one, and what it is made of;
    then the others."""
    return {
        (metric, number): number if metric == HELD_OUT else metric if number in TOTALS else f"{metric}: {number}"
        for model in result["models"]
        for metric, numbers in model["scores"].items()
        for number in numbers
        if number != "missing" and not (number.endswith("mean") and f"{number[:-4]}overall" in numbers)
    }


def with_other_prompts(result: dict, other: dict, path: str) -> dict:
    """The result with the metrics of the same models on other prompts, those of ``path``, each by the name of both."""
    name = Path(path).stem
    models = [
        m | {"scores": m["scores"] | {f"{k} ({name})": v for k, v in o["scores"].items() if k != HELD_OUT}}
        for m, o in zip(result["models"], other["models"], strict=True)
    ]
    asked = {"name": name, "path": path, "prompts": other["prompts"], "images_per_prompt": other["images_per_prompt"]}
    return result | {"models": models, "other_prompts": asked}


def markdown(result: dict) -> str:
    """Models down, metrics across, as in the paper's tables."""
    o = result.get("other_prompts")
    elsewhere = f" ({o['name']}): {o['prompts']} prompts of {o['path']}, {o['images_per_prompt']} each." if o else ""
    columns = columns_of(result)
    lines = [
        f"{result['prompts']} prompts, {result['images_per_prompt']} pictures each, the same noise for every model."
        f"{elsewhere} Missing scores are left out and counted in results.json.",
        "",
        "| model | NFE | " + " | ".join(columns.values()) + " |",
        "|---|---|" + "---|" * len(columns),
    ]
    for m in result["models"]:
        cells = [f"{m['scores'][metric].get(number, float('nan')):.3f}" for metric, number in columns]
        lines.append(f"| {m['model']} | {m['network_evaluations']} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def eval_command(command: Eval) -> None:
    """`tdm-r1 eval`."""
    console = Console()
    config = load_recipe(command.recipe)
    asked = {"evaluation.prompts": command.prompts, "evaluation.images_per_prompt": command.images_per_prompt}
    config = config.override({name: value for name, value in asked.items() if value is not None})
    models = models_of(config, command.lora, command.base_steps, command.guidance)
    if not models:
        raise UserError("nothing to evaluate: give --lora, or --base-steps above 0")
    for model in models:
        trained = run_of(model.lora) if model.lora else None
        if trained and trained.model.path != config.model.path:
            console.print(
                f"{model.name} was trained on {trained.model.path}, but is evaluated on {config.model.path}",
                style="yellow",
                markup=False,
            )
    comparisons = _comparisons(command, config, models, console)
    for comparison in comparisons:
        comparison.sample()
    if waiting := sum(len(c.missing(m)) for c in comparisons for m in models):
        console.print(
            f"This share is done. {waiting} pictures of other shares are missing; the last one writes the table."
        )
        return
    main, *elsewhere = comparisons
    result = main.result()
    for comparison in elsewhere:
        other = comparison.result()
        comparison.write(other)
        result = with_other_prompts(result, other, str(comparison.config.task.prompts))
    table = main.write(result)
    console.print(_shown(result))
    console.print(f"Wrote {table}, results.json and grid.png beside it")


def _comparisons(command: Eval, config: RunConfig, models: list[Model], console: Console) -> list[Comparison]:
    """The recipe's prompts, and those that the metrics have to themselves."""
    out, path = command.out or Path("evaluations") / config.name, command.metrics_prompts
    shard = parse_shard(command.shard)
    own = [config.reward]
    if config.reward.startswith(GIVEN):
        console.print(
            f"{config.reward} was given to the run in Python: it is left out here", style="yellow", markup=False
        )
        own = []
    if not path:
        return [Comparison(config, models, [*own, *command.metrics], out, shard=shard, console=console)]
    if not command.metrics:
        raise UserError(f"--metrics-prompts = {str(path)!r}: say with --metrics what is measured on them")
    other = _on_prompts(config, path)
    return [
        Comparison(config, models, own, out, shard=shard, console=console),
        Comparison(other, models, command.metrics, out / "metrics", shard=shard, console=console),
    ]


def _on_prompts(config: RunConfig, path: Path) -> RunConfig:
    """The run's settings for an evaluation on every prompt of ``path``, one picture each."""
    n = len(read_prompts(path, "--metrics-prompts"))
    task = {"task.name": "prompts", "task.prompts": path, "task.eval_prompts": None, "task.weights": None}
    return config.override(task | {"evaluation.prompts": n, "evaluation.images_per_prompt": 1})


def parse_shard(text: str) -> tuple[int, int]:
    """``2/4`` as (1, 4). Raises UserError on anything else."""
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        raise UserError(f"--shard = {text!r}: write NUMBER/OF, such as 1/4")
    return int(match[1]) - 1, int(match[2])


def _shown(result: dict) -> Table:
    """The table for a terminal: metrics down, since they are many."""
    table = Table("metric", *(m["model"] for m in result["models"]))
    table.add_row("NFE", *(str(m["network_evaluations"]) for m in result["models"]))
    for (metric, number), title in columns_of(result).items():
        table.add_row(title, *(f"{m['scores'][metric].get(number, float('nan')):.3f}" for m in result["models"]))
    return table


def models_of(config: RunConfig, loras: Sequence[str], base_steps: int, guidance: Sequence[float]) -> list[Model]:
    """The many-step base at each guidance, then each LoRA; "none" is the student as it is (a Turbo model)."""
    s = config.sampler
    few = Sampling(Role.GENERATOR, s.steps, s.shift, s.solver)
    base = [Model(f"base, guidance {g:g}", Sampling(Role.TEACHER, base_steps, s.shift, guidance=g)) for g in guidance]
    students = [_student(name, few) for name in loras]
    return [*(base if base_steps else []), *students]


def _student(name: str, few: Sampling) -> Model:
    if name == "none":
        return Model(name, few)
    lora, strength = with_strength(name)
    return Model(name, few, bundle.student_path(lora), strength)
