"""A run: a folder, a loop around an algorithm's `step`, evaluation, checkpoints, export. The maths stands elsewhere."""

from __future__ import annotations

import json
import math
import platform
import signal
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from peft import LoraConfig
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor

from . import pictures
from .algorithms.tdm import TDM, fake_roles
from .algorithms.tdm_r1 import TDMR1
from .backbones import PipelineBackbone, load_backbone
from .checkpoint import DamagedError, load_state, save_state
from .config import CONFIG_FILE, ModelConfig, RunConfig, TaskConfig, differences, dump, load_recipe, require_same_run
from .errors import UserError
from .evaluation import Embedder, Evaluation, Evaluator, Sampling, mean_of
from .files import whole_folder, write_text
from .geneval_task import GenEvalTask
from .lora_files import load_lora
from .mini import bundle
from .randomness import numpy_rng, torch_rng
from .rewards import Reward, Scorer, Scores, Watch
from .rewards.registry import named
from .rewards.scores import joined
from .roles import PHI, Carried, Role, Roles, full_roles, lora_roles
from .tasks import Prompt, PromptFileTask, Task

KEPT_CHECKPOINTS = 3  # the last ones; the best evaluated one is kept beside them
LOG = "metrics.jsonl"


def own_roles(config: RunConfig) -> tuple[Role, ...]:
    """The roles that a run casts beside the teacher."""
    below = (Role.GENERATOR, Role.GENERATOR_EMA, *fake_roles(config.tdm))
    return below if config.algorithm == "tdm" else (*below, *PHI)


def resolve_device(name: str) -> str:
    """``auto`` is the first GPU if there is one. Raises UserError on a device that is not there."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.zeros(1, device=name)
    except (RuntimeError, AssertionError) as error:
        why = str(error).splitlines()[0]
        raise UserError(f"model.device = {name!r} cannot be used: {why}; set it to auto or cpu") from error
    return name


def resolve_model(config: ModelConfig) -> tuple[str, str | Path | None, str | Path | None, int]:
    """Path of the pipeline, the generator's and the fake score's LoRA, and T5's length; a mini model fills them in."""
    student: str | Path | None = config.student_lora
    fake: str | Path | None = config.fake_lora
    if config.path not in bundle.MODELS:
        return config.path, student, fake, config.max_sequence_length
    root = bundle.bundle_path(config.path)
    if config.student_lora == config.path:
        student, fake = root / bundle.STUDENT_LORA, fake or root / bundle.FAKE_LORA
    return str(root), student, fake, bundle.MAX_SEQUENCE_LENGTH


def load_task(config: TaskConfig) -> Task:
    if config.name == "prompts":
        assert config.prompts is not None  # checked by RunConfig
        return PromptFileTask(config.prompts, config.eval_prompts)
    if config.name == "geneval":
        return GenEvalTask(config.weights, config.prompts)
    from .mini.task import MiniTask, SignTask

    return SignTask() if config.name == "mini_signs" else MiniTask(config.weights)


def adapter_settings(config: ModelConfig) -> LoraConfig:
    """What peft makes the roles' adapters of."""
    return LoraConfig(
        r=config.lora.rank,
        lora_alpha=config.lora.alpha,
        init_lora_weights="gaussian",
        target_modules=list(config.lora.targets),
    )


def load_backbones(config: RunConfig) -> tuple[PipelineBackbone, PipelineBackbone | None]:
    """The student's backbone, and the teacher's where it is another one."""
    m = config.model
    path, _, _, length = resolve_model(m)
    device = resolve_device(m.device)
    load = partial(
        load_backbone,
        max_sequence_length=length,
        dtype=getattr(torch, m.dtype),
        device=device,
        resolution=m.resolution,
        decode_batch=m.decode_batch,
        tiling=m.vae_tiling,
        offload=m.offload,
        gradient_checkpointing=m.gradient_checkpointing,
        t5=m.t5,
    )
    student = load(path)
    return student, load(m.teacher, beside=student) if m.teacher else None


def cast_roles(config: RunConfig, student: PipelineBackbone, teacher: PipelineBackbone | None) -> Roles:
    """The roles of a run on its backbones; ``teacher`` where it is not the student's."""
    torch.manual_seed(config.seed)  # peft initialises adapters from the global generator
    own = own_roles(config)
    if config.model.roles == "full":
        return full_roles(student, own, teacher=teacher)
    full = PHI if config.algorithm == "tdm_r1" and config.surrogate.weights == "full" else ()
    return lora_roles(
        student,
        adapter_settings(config.model),
        own,
        teacher=teacher,
        full=full,
        merge=config.model.merge,
        carried=carried_by(config),
    )


def carried_by(config: RunConfig) -> dict[Role, Carried]:
    """What each role carries, as the settings of the surrogate say."""
    c = config.surrogate
    if config.algorithm == "tdm" or not c.carried:
        return {}
    weights = {role: c.carried for role in own_roles(config) if role not in PHI}
    weights[Role.GENERATOR_EMA] = c.carried_exported or c.carried
    return {role: Carried(Role.SURROGATE_EMA, weight) for role, weight in weights.items()}


class Run:
    """Everything of one run, built from its configuration; `fit` trains.

    Args:
        config: the run's settings (`config.load_recipe`).
        reward: a function in place of ``config.reward``, for notebooks. The saved configuration cannot load it: who
            goes on with the run has to give it again.
        console: where progress goes.

    Raises ValueError or UserError on settings that do not fit, before any weights are read.
    """

    def __init__(self, config: RunConfig, *, reward: Reward | None = None, console: Console | None = None) -> None:
        self.config = config = config if reward is None else config.override({"reward": named(reward)})
        self.console = console or Console()
        self.folder = config.folder
        self.by_function = reward is not None
        self.task = load_task(config.task)
        self.scorer = Scorer(config.reward, config.scoring, reward=reward)
        self.scorer.check([*getattr(self.task, "prompts", ()), *self.task.eval_prompts(config.evaluation.prompts)])
        self.watch = Watch()
        self.told: set[str] = set()  # failures of the reward that were shown
        _, student, fake, _ = resolve_model(config.model)
        self.backbone, teacher = load_backbones(config)
        self.lora = adapter_settings(config.model)
        self.roles = cast_roles(config, self.backbone, teacher)
        if student:
            strength = config.model.student_lora_scale
            load_lora(self.roles, (Role.GENERATOR, Role.GENERATOR_EMA), student, self.lora, strength=strength)
        if fake:
            load_lora(self.roles, fake_roles(config.tdm), fake, self.lora)
        self.embed = Embedder(self.backbone)
        self.algorithm = self._algorithm()
        self.iteration = 0
        self.seconds = 0.0
        self.scored = 0

    def _algorithm(self) -> TDM | TDMR1:
        c, empty = self.config, self.embed([""])
        if c.algorithm == "tdm":
            return TDM(self.roles, empty, c.sampler, c.tdm, iterations=c.iterations, micro_batch=c.batch.micro_batch)
        return TDMR1(
            self.roles,
            empty,
            c.sampler,
            c.tdm,
            c.surrogate,
            c.balance,
            iterations=c.iterations,
            group_size=c.batch.group,
            trained=c.batch.trained or c.batch.group,
            micro_batch=c.batch.micro_batch,
        )

    # -------------------------------------------------------------------------------------- one iteration

    def step(self) -> dict[str, float]:
        """One iteration: prompts, noise, the algorithm. Depends on the seed and the iteration's number alone."""
        c, i = self.config, self.iteration
        prompts = self.task.train_prompts(c.batch.prompts, numpy_rng(c.seed, i, "prompts"))
        prompts = [p for p in prompts for _ in range(c.batch.group)]
        conditioning = self.embed([p.text for p in prompts])
        shape = (len(prompts), *self.backbone.latent_shape)
        device = conditioning.embeds.device
        x_1 = torch.randn(shape, generator=torch_rng(c.seed, i, "initial noise")).to(device)
        noise = torch_rng(c.seed, i, "algorithm")
        parts: dict[str, float] = {}
        if isinstance(self.algorithm, TDM):
            metrics = self.algorithm.step(conditioning, x_1, noise)
        else:

            def score_latents(latents: Tensor) -> Tensor:
                scores = self._score(latents, prompts)
                parts.update({f"reward_parts/{name}": mean_of(part) for name, part in scores.parts.items()})
                return torch.tensor(scores.values, dtype=torch.float32, device=latents.device)

            metrics = self.algorithm.step(conditioning, x_1, score_latents, noise)
        self.iteration += 1
        return metrics | parts

    def _score(self, latents: Tensor, prompts: Sequence[Prompt]) -> Scores:
        """Decodes and scores final latents [P * G, C, H, W] in micro-batches, scoring some while the next is decoded.

        Raises UserError if the reward teaches nothing.
        """
        c = self.config.batch
        with ThreadPoolExecutor(self.scorer.parallel) as background:
            pending = [
                background.submit(self.scorer.each, self.backbone.decode(part), prompts[start : start + c.micro_batch])
                for start, part in zip(range(0, len(latents), c.micro_batch), latents.split(c.micro_batch), strict=True)
            ]
            chunks = [future.result() for future in pending]
        scores = self.scorer.total([joined(term) for term in zip(*chunks, strict=True)], group_size=c.group)
        self.scored += len(prompts)
        self._tell(scores)
        self.watch(scores, c.group)
        return scores

    def _tell(self, scores: Scores) -> None:
        """Shows each thing that went wrong in scoring once."""
        for why in scores.failures:
            if why not in self.told:
                self.console.print(f"reward: {why}", style="yellow", markup=False)
                self.told.add(why)

    # -------------------------------------------------------------------------------------- the loop

    def fit(
        self, *, resume: bool = False, start_from: int | None = None, first: Evaluation | None = None
    ) -> Evaluation | None:
        """Trains to the end, or to Ctrl-C, which finishes the iteration and saves. Returns the last evaluation.

        Args:
            resume, start_from: see `open`.
            first: the evaluation of the start, where it has been made already.
        """
        with self._alone():
            self.open(resume=resume, start_from=start_from)
            evaluator = self.evaluator()
            with self._nothing_lost():
                start = self._report(first or evaluator(self.few_step())) if self._due() else None
                last = self._train(evaluator, start)
            self.save()
            if self.iteration < self.config.iterations:
                self.console.print(f"Stopped after iteration {self.iteration}, saved. {self._going_on()}", markup=False)
            self.export(self.folder)
        return last

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Keeps other processes out of the run's folder. Raises UserError if one is there."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with ExitStack() as held:
            try:
                held.enter_context(FileLock(self.folder / ".lock").acquire(timeout=0))
            except Timeout as error:
                raise UserError(f"{self.folder} is in use by another process: wait, or give another --name") from error
            except (OSError, NotImplementedError):
                pass  # some network file systems know no locks
            yield

    def _going_on(self) -> str:
        if self.by_function:
            return f"Go on with: Run(load_recipe({str(self.folder)!r}), reward=...).fit(resume=True)"
        return f"Go on with: tdm-r1 train {self.folder} --resume"

    def _due(self) -> bool:
        """Whether the model as it is wants an evaluation that the log does not hold yet: at the start, every so often,
        at the end."""
        every, i = self.config.evaluation.every, self.iteration
        wanted = i in (0, self.config.iterations) or (every and i % every == 0)
        return bool(wanted) and not any("eval/reward_missing" in r and r["iteration"] == i for r in self._history())

    def _train(self, evaluator: Evaluator, last: Evaluation | None) -> Evaluation | None:
        """The loop; returns the last evaluation, ``last`` if it makes none."""
        with self._progress() as (progress, bar), _interrupts() as interrupted:
            while self.iteration < self.config.iterations and not interrupted():
                start = time.perf_counter()
                metrics = self.step()
                self.seconds += time.perf_counter() - start
                self._log(metrics)
                shown = "reward/mean" if "reward/mean" in metrics else "fake/loss"  # both would cut the ETA off
                progress.update(bar, completed=self.iteration, shown=f"{shown} {metrics[shown]:.3f}")
                due = self._due()
                if due or self.iteration % self.config.save_every == 0:
                    self.save()  # before an evaluation, which may break
                if due:
                    last = None  # its pictures take gigabytes where the model is large
                    last = self._report(evaluator(self.few_step()))
        return last

    @contextmanager
    def _nothing_lost(self) -> Iterator[None]:
        """Saves before an error for users ends the run; ends the reward's processes in any case."""
        try:
            yield
        except (UserError, OSError) as error:
            if not self.iteration:
                raise  # nothing to save
            raise UserError(f"{error}. {self._saved()} {self._going_on()}") from error
        except FloatingPointError as error:  # what has diverged is not saved
            saved = [iteration_of(path) for path in self.checkpoints()]
            if not saved:
                raise
            raise UserError(
                f"{error}. {self._going_on()} --from ITERATION; there are checkpoints of {_listed(saved)}"
            ) from error
        finally:
            self.scorer.close()

    def _saved(self) -> str:
        """Saves once more, and says what there is to go on from."""
        try:
            self.save()
        except OSError as error:
            last = self.checkpoints()[-1:]
            kept = f"the last whole one is {last[0]}" if last else "there is none yet"
            return f"No checkpoint could be written ({error}); {kept}. Free some space first."
        return f"Saved after iteration {self.iteration}; mend it first."

    @contextmanager
    def _progress(self) -> Iterator[tuple[Progress, Any]]:
        columns = (
            TextColumn(self.config.name),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("ETA"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[shown]}"),
        )
        with Progress(*columns, console=self.console) as progress:
            yield progress, progress.add_task("", total=self.config.iterations, completed=self.iteration, shown="")

    # -------------------------------------------------------------------------------------- measuring

    def evaluator(self) -> Evaluator:
        e = self.config.evaluation
        return Evaluator(
            self.backbone,
            self.roles,
            self.embed,
            self.task,
            self.scorer,
            prompts=e.prompts,
            images_per_prompt=e.images_per_prompt,
            seed=e.seed,
            batch=self.config.batch.micro_batch,
            also={name: load_task(TaskConfig(name=name)) for name in e.also},
        )

    def few_step(self, role: Role = Role.GENERATOR_EMA) -> Sampling:
        s = self.config.sampler
        return Sampling(role, s.steps, s.shift, s.solver)

    def _report(self, result: Evaluation) -> Evaluation:
        """Logs, draws and prints an evaluation."""
        self._tell(result.scores)
        self.watch.require_any(result.scores)
        self._log({f"eval/{k}": v for k, v in result.metrics.items()})
        self._picture(result)
        pictures.curves(self._history(), self.folder / "curves.png")
        line = "  ".join(f"{k} {v:.3f}" for k, v in result.metrics.items() if "/" not in k)
        self.console.print(f"iteration {self.iteration}: {line}", highlight=False)
        return result

    def _picture(self, result: Evaluation) -> None:
        n = self.config.evaluation.grid_prompts
        if n:
            rows = torch.arange(0, len(result.prompts), self.config.evaluation.images_per_prompt)[:n].numpy()
            captions = [result.prompts[i].text for i in rows]
            picture = pictures.grid([(f"iteration {self.iteration}", result.images[rows])], captions)
            pictures.save_png(picture, self.folder / "grids" / f"iteration_{self.iteration:06d}.png")

    # -------------------------------------------------------------------------------------- the folder

    def open(self, *, resume: bool = False, start_from: int | None = None) -> None:
        """Starts the run's folder, or goes on from a checkpoint. Raises UserError where that cannot be.

        Args:
            resume: go on from the last checkpoint.
            start_from: the iteration of an earlier one to go on from instead; later ones are removed.
        """
        require_startable(self.folder, resume=resume)
        if resume:
            _require_same_run(self.config)
            if start_from is None:
                self._load_last()
            else:
                self._load_earlier(start_from)
            self._tell_changes()
        else:
            (self.folder / LOG).unlink(missing_ok=True)  # of a run that ended before anything was saved
            names = ("tdm-r1", "torch", "diffusers", "transformers", "peft", "accelerate", "numpy")
            versions = {"python": platform.python_version()} | {n: metadata.version(n) for n in names}
            write_text(self.folder / "versions.json", json.dumps(versions, indent=2))
        write_text(self.folder / CONFIG_FILE, dump(self.config))

    def _load_last(self) -> None:
        """Goes on from the last checkpoint that can be read."""
        for path in reversed(self.checkpoints()):
            try:
                self.load(path)
                return
            except DamagedError as error:
                self.console.print(f"{error}: trying the one before", style="yellow", markup=False)
        raise UserError(f"--resume: no checkpoint in {self.folder / 'checkpoints'} can be read; start another run")

    def _load_earlier(self, iteration: int) -> None:
        """Goes back to the checkpoint of an iteration and removes the later ones."""
        saved = {iteration_of(path): path for path in self.checkpoints()}
        if iteration not in saved:
            raise UserError(
                f"--from = {iteration}: {self.folder} has checkpoints of iterations {_listed(saved)}; name one of them"
            )
        self.load(saved[iteration])
        for later in [path for i, path in saved.items() if i > iteration]:
            later.unlink()

    def _tell_changes(self) -> None:
        """Shows what is not as it was when the run was started."""
        if (before := _as_started(self.folder)) is not None:
            for name, old, new in differences(before, self.config):
                self.console.print(f"{name} = {new!r} from here on ({old!r} before)", markup=False)

    def _log(self, metrics: dict[str, float]) -> None:
        row = {"iteration": self.iteration, "seconds": round(self.seconds, 2), "scored": self.scored} | {
            k: round(v, 6)
            for k, v in metrics.items()
            if math.isfinite(v)  # NaN is no JSON
        }
        with (self.folder / LOG).open("a") as file:
            file.write(json.dumps(row, allow_nan=False) + "\n")

    def _history(self) -> list[dict[str, float]]:
        return history_of(self.folder)

    def checkpoints(self) -> list[Path]:
        """The run's checkpoints, oldest first."""
        return checkpoints_of(self.folder)

    def save(self) -> None:
        """Writes a checkpoint that `load` goes on from exactly, and drops old ones."""
        path = self.folder / "checkpoints" / f"iteration_{self.iteration:06d}.safetensors"
        state = {
            "iteration": self.iteration,
            "seconds": self.seconds,
            "scored": self.scored,
            "roles": {str(role): self.roles.state(role) for role in own_roles(self.config)},
            "algorithm": self.algorithm.state(),
        }
        save_state(path, state)
        best = max(self._history(), key=lambda row: row.get("eval/reward", -math.inf), default={}).get("iteration")
        for old in self.checkpoints()[:-KEPT_CHECKPOINTS]:
            if iteration_of(old) != best:
                old.unlink()

    def load(self, path: Path) -> None:
        """Goes back to a checkpoint, and drops what the log holds from after it."""
        state = load_state(path)
        self.iteration, self.seconds, self.scored = state["iteration"], state["seconds"], state["scored"]
        if wrong := set(map(str, own_roles(self.config))) ^ state["roles"].keys():
            raise UserError(
                f"{path} holds the weights of {', '.join(state['roles'])}; these settings differ in {min(wrong)}: "
                "go on with the settings that the run was started with"
            )
        for role in own_roles(self.config):
            self.roles.load(role, state["roles"][str(role)])
        self.algorithm.load_state(state["algorithm"])
        rows = [json.dumps(row) for row in self._history() if row["iteration"] <= self.iteration]
        write_text(self.folder / LOG, "".join(row + "\n" for row in rows))

    def export(self, folder: Path) -> None:
        """Writes the generator for plain diffusers: as a LoRA, with the fake score's for a later run beside it (of two,
        the earlier points'), or, where roles have weights of their own, as a whole transformer."""
        if self.config.model.roles == "full":
            with whole_folder(folder / "transformer") as partial:
                self.roles.transformer(Role.GENERATOR_EMA).save_pretrained(partial)
            return
        for role, name in ((Role.GENERATOR_EMA, "lora"), (Role.FAKE, "lora_fake")):
            with whole_folder(folder / name) as partial:
                self.backbone.save_lora(partial, *self.roles.exported(role, self.lora))


def history_of(folder: Path) -> list[dict[str, float]]:
    """The rows of a run's log."""
    path = folder / LOG
    lines = path.read_text().splitlines() if path.exists() else []
    rows = [json.loads(line) for line in lines[:-1]]
    try:
        return rows + [json.loads(line) for line in lines[-1:]]
    except json.JSONDecodeError:
        return rows  # its last line was being written when the disk was full or the machine went down


def is_finished(folder: Path) -> bool:
    """Whether the run in a folder has come to its end and exported its weights. Half a run exports its weights too."""
    exported = any((folder / made).is_dir() for made in ("lora", "transformer"))
    if not exported or not (folder / CONFIG_FILE).is_file():
        return False
    done = max((int(row["iteration"]) for row in history_of(folder)), default=0)
    return done >= load_recipe(str(folder.resolve())).iterations


def checkpoints_of(folder: Path) -> list[Path]:
    """A run's checkpoints, oldest first."""
    return sorted((folder / "checkpoints").glob("iteration_*.safetensors"))


def _as_started(folder: Path) -> RunConfig | None:
    """The settings in a run's folder; None if they are gone or of another version."""
    try:
        return load_recipe(str(folder.resolve()))
    except UserError:
        return None


def _require_same_run(config: RunConfig) -> None:
    """Raises UserError if a resumed run changes what it cannot."""
    if (before := _as_started(config.folder)) is not None:
        require_same_run(before, config)


def iteration_of(checkpoint: Path) -> int:
    """The iteration after which a checkpoint was written."""
    return int(checkpoint.stem.removeprefix("iteration_"))


def _listed(iterations: Iterable[int]) -> str:
    return ", ".join(map(str, sorted(iterations)))


def require_startable(folder: Path, *, resume: bool) -> None:
    """Raises UserError if a run cannot be started in the folder or, with ``resume``, cannot be gone on with."""
    saved = checkpoints_of(folder)
    if resume and not saved:
        raise UserError(f"--resume: {folder} holds no checkpoint; start it without --resume")
    if not resume and (saved or any((folder / made).exists() for made in ("lora", "transformer"))):
        raise UserError(f"{folder} already holds a run: go on with --resume, or give another --name or --output")


def train(
    config: RunConfig, *, resume: bool = False, start_from: int | None = None, console: Console | None = None
) -> Evaluation | None:
    """`Run.fit`, after the distillation that makes the run's start, where the configuration names one."""
    require_startable(config.folder, resume=resume)  # before weights are read or anything is distilled
    if resume:
        _require_same_run(config)
    return Run(with_student(config, console), console=console).fit(resume=resume, start_from=start_from)


def distillation(config: RunConfig) -> RunConfig:
    """The settings of the distillation that ``config.distill_with`` names, with the run's model, sampler, micro-batch.

    Raises UserError if that recipe distils nothing.
    """
    settings = {"output": config.folder, "name": "distill", "seed": config.seed}
    settings |= {"model": config.model.model_dump() | {"teacher": None, "student_lora_scale": None, "fake_lora": None}}
    settings |= {"sampler": config.sampler.model_dump(), "batch.micro_batch": config.batch.micro_batch}
    recipe = load_recipe(str(config.distill_with)).override(settings)
    if recipe.algorithm != "tdm":
        raise UserError(f"distill_with = {config.distill_with!r}: its algorithm is {recipe.algorithm}; name one of tdm")
    return recipe


def with_student(config: RunConfig, console: Console | None = None) -> RunConfig:
    """The configuration with a few-step start: distils one into the run's folder first, if `distill_with` says so.

    What is there already is used, an unfinished one gone on with. Raises UserError if it was interrupted again.
    """
    if config.distill_with is None or config.model.student_lora:
        return config
    recipe = distillation(config)
    folder = recipe.folder
    if not is_finished(folder):
        load_task(config.task)  # what is wrong with the run itself is better said now than after a distillation
        Scorer(config.reward, config.scoring).close()
        run = Run(recipe, console=console)
        run.fit(resume=bool(run.checkpoints()))
        if run.iteration < recipe.iterations:
            raise UserError("the distillation was interrupted; the same command goes on with it")
    return config.override({"model.student_lora": str(folder / "lora"), "model.fake_lora": str(folder / "lora_fake")})


@contextmanager
def _interrupts() -> Iterator[Any]:
    """Turns the first Ctrl-C (or SIGTERM) into a flag; a second one interrupts at once."""
    seen: list[int] = []

    def handle(number: int, frame: Any) -> None:
        if seen:
            raise KeyboardInterrupt
        seen.append(number)

    try:
        before = {s: signal.signal(s, handle) for s in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not in the main thread (a notebook's worker, a test): nothing to catch there
        before = {}
    try:
        yield lambda: bool(seen)
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)
