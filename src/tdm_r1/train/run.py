"""A run: a loop around an algorithm's `step`, evaluation, checkpoints, export. The maths stands elsewhere."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor

from ..algorithms.protocol import Batch
from ..config.load import differences, require_same_run
from ..config.run import RunConfig
from ..core.randomness import numpy_rng, torch_rng
from ..errors import UserError
from ..evaluate import pictures
from ..evaluate.evaluation import Evaluation, Evaluator, Sampling, mean_of
from ..files import whole_folder
from ..models.embedder import Embedder
from ..models.export import exported
from ..models.load import adapter_settings, load_backbones
from ..models.specification import evaluated
from ..rewards.registry import named
from ..rewards.scorer import Scorer
from ..rewards.scores import Reward
from ..tasks.load import load_task
from ..tasks.settings import TaskConfig
from .build import algorithm_of, build_roles, load_starts
from .checkpoint import DamagedError, load_state, save_state
from .folder import RunFolder, listed
from .scoring import LatentScorer
from .trackers import Trackers


class Run:
    """Everything of one run, built from its configuration; `fit` trains.

    Args:
        config: the run's settings (`config.load.load_recipe`).
        reward: a function in place of ``config.reward``, for notebooks. The saved configuration cannot load it: give it
            again to go on with the run.
        console: where progress goes.

    Raises ValueError or UserError on settings that do not fit, before any weights are read.
    """

    def __init__(self, config: RunConfig, *, reward: Reward | None = None, console: Console | None = None) -> None:
        self.config = config = config if reward is None else config.override({"reward": named(reward)})
        self.console = console or Console()
        self.folder = config.folder
        self.files = RunFolder(config.folder)
        self.by_function = reward is not None
        self.task = load_task(config.task)
        self.scorer = Scorer(config.reward, config.scoring, reward=reward)
        self.scorer.check([*self.task.known, *self.task.eval_prompts(config.evaluation.prompts)])
        kind = algorithm_of(config)
        self.trackers = Trackers(config)
        self.backbone, teacher = load_backbones(config.model)
        self.roles = build_roles(config, self.backbone, teacher)
        load_starts(config, self.roles)
        self.embed = Embedder(self.backbone)
        self.algorithm = kind(self.roles, self.embed([""]), config)
        b = config.batch
        self.scoring = LatentScorer(
            self.backbone, self.scorer, micro_batch=b.micro_batch, group=b.group, console=self.console
        )
        self.iteration = 0
        self.seconds = 0.0

    # -------------------------------------------------------------------------------------- one iteration

    def step(self) -> dict[str, float]:
        """One iteration: prompts, noise, the algorithm. Depends on the seed and the iteration's number alone."""
        c, i = self.config, self.iteration
        prompts = self.task.train_prompts(c.batch.prompts, numpy_rng(c.seed, i, "prompts"))
        prompts = [p for p in prompts for _ in range(c.batch.group)]
        conditioning = self.embed([p.text for p in prompts])
        shape = (len(prompts), *self.backbone.latent_shape)
        x_1 = torch.randn(shape, generator=torch_rng(c.seed, i, "initial noise")).to(conditioning.device)
        parts: dict[str, float] = {}

        def score(latents: Tensor) -> Tensor:
            scores = self.scoring(latents, prompts)
            parts.update({f"reward_parts/{name}": mean_of(part) for name, part in scores.parts.items()})
            return torch.from_numpy(scores.values)

        noise = torch_rng(c.seed, i, "algorithm")
        with _peak_memory(x_1.device) as memory:
            metrics = self.algorithm.step(Batch(conditioning, x_1, c.batch.group, noise, score))
        self.iteration += 1
        return metrics | parts | memory

    # -------------------------------------------------------------------------------------- the loop

    def fit(
        self, *, resume: bool = False, start_from: int | None = None, first: Evaluation | None = None
    ) -> Evaluation | None:
        """Trains to the end, or to Ctrl-C, which finishes the iteration and saves. Returns the last evaluation.

        Args:
            resume, start_from: see `open`.
            first: the evaluation of the start, where it has been made already.
        """
        with self.files.alone():
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

    def _going_on(self) -> str:
        if self.by_function:
            return f"Go on with: Run(load_recipe({str(self.folder)!r}), reward=...).fit(resume=True)"
        return f"Go on with: tdm-r1 train {self.folder} --resume"

    def _due(self) -> bool:
        """Whether the model as it is needs an evaluation that the log does not have yet: at the start, every so often,
        at the end."""
        every, i = self.config.evaluation.every, self.iteration
        wanted = i in (0, self.config.iterations) or (every and i % every == 0)
        return bool(wanted) and not self.files.is_evaluated(i)

    def _train(self, evaluator: Evaluator, last: Evaluation | None) -> Evaluation | None:
        """The loop; returns the last evaluation, ``last`` if it makes none."""
        with self._progress() as show, _interrupts() as interrupted:
            while self.iteration < self.config.iterations and not interrupted():
                start = time.perf_counter()
                metrics = self.step()
                self.seconds += time.perf_counter() - start
                self._log(metrics)
                show(metrics)
                due = self._due()
                if due or self.iteration % self.config.save_every == 0:
                    self.save()  # before an evaluation, which may break
                if due:
                    last = None  # its images take gigabytes where the model is large
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
            if not self.checkpoints():
                raise
            raise UserError(
                f"{error}. {self._going_on()} --from ITERATION; there are checkpoints of {listed(self.checkpoints())}"
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
    def _progress(self) -> Iterator[Any]:
        """A progress bar with ETA; yields what shows an iteration's metrics."""
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
            bar = progress.add_task("", total=self.config.iterations, completed=self.iteration, shown="")

            def show(metrics: dict[str, float]) -> None:
                name = "reward/mean" if "reward/mean" in metrics else next(iter(metrics), None)
                shown = f"{name} {metrics[name]:.3f}" if name else ""  # one: more would cut the ETA off
                progress.update(bar, completed=self.iteration, shown=shown)

            yield show

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

    def few_step(self, role: str | None = None) -> Sampling:
        """How the run samples ``role``, by default the one that it evaluates and exports."""
        s = self.config.sampler
        return Sampling(role or evaluated(self.roles.specs), s.steps, s.shift, s.solver)

    def _report(self, result: Evaluation) -> Evaluation:
        """Logs, draws and prints an evaluation."""
        self.scoring.show_failures(result.scores)
        self.scoring.watch.require_any(result.scores)
        self._log({f"eval/{k}": v for k, v in result.metrics.items()})
        self._picture(result)
        pictures.curves(self.files.history(), self.folder / "curves.png")
        self.trackers.image(self.iteration, "curves", self.folder / "curves.png")
        line = "  ".join(f"{k} {v:.3f}" for k, v in result.metrics.items() if "/" not in k)
        self.console.print(f"iteration {self.iteration}: {line}", highlight=False)
        return result

    def _picture(self, result: Evaluation) -> None:
        n = self.config.evaluation.grid_prompts
        if n:
            rows = torch.arange(0, len(result.prompts), self.config.evaluation.images_per_prompt)[:n].numpy()
            captions = [result.prompts[i].text for i in rows]
            picture = pictures.grid([(f"iteration {self.iteration}", result.images[rows])], captions)
            path = self.folder / "grids" / f"iteration_{self.iteration:06d}.png"
            pictures.save_png(picture, path)
            self.trackers.image(self.iteration, "samples", path)

    def _log(self, metrics: dict[str, float]) -> None:
        counts = {"iteration": self.iteration, "seconds": round(self.seconds, 2), "scored": self.scored}
        self.files.log(counts | {k: round(v, 6) for k, v in metrics.items()})
        self.trackers.log(self.iteration, metrics)

    # -------------------------------------------------------------------------------------- the folder

    @property
    def scored(self) -> int:
        """Images scored so far."""
        return self.scoring.scored

    def open(self, *, resume: bool = False, start_from: int | None = None) -> None:
        """Starts the run's folder, or goes on from a checkpoint. Raises UserError where that cannot be.

        Args:
            resume: go on from the last checkpoint.
            start_from: the iteration of an earlier one to go on from instead; later ones are removed.
        """
        self.files.require_startable(resume=resume)
        if not resume:
            self.files.begin(self.config)
            return
        before = self.files.settings()
        if before is not None:
            require_same_run(before, self.config)
        if start_from is None:
            self._load_last()
        else:
            self._load_earlier(start_from)
        for name, old, new in differences(before, self.config) if before else ():
            self.console.print(f"{name} = {new!r} from here on ({old!r} before)", markup=False)
        self.files.file_settings(self.config)

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
        wanted, saved = self.files.checkpoint(iteration), self.checkpoints()
        if wanted not in saved:
            raise UserError(
                f"--from = {iteration}: {self.folder} has checkpoints of iterations {listed(saved)}; name one of them"
            )
        self.load(wanted)
        for later in saved[saved.index(wanted) + 1 :]:
            later.unlink()

    def checkpoints(self) -> list[Path]:
        """The run's checkpoints, oldest first."""
        return self.files.checkpoints()

    def save(self) -> None:
        """Writes a checkpoint that `load` goes on from exactly, and drops old ones."""
        state = {
            "iteration": self.iteration,
            "seconds": self.seconds,
            "scored": self.scored,
            "roles": {spec.name: self.roles.state(spec.name) for spec in self.roles.specs},
            "algorithm": self.algorithm.state(),
        }
        save_state(self.files.checkpoint(self.iteration), state)
        self.files.drop_old_checkpoints()

    def load(self, path: Path) -> None:
        """Goes back to a checkpoint, and drops what the log has from after it."""
        state = load_state(path)
        names = [str(spec.name) for spec in self.roles.specs]
        if wrong := set(names) ^ state["roles"].keys():
            raise UserError(
                f"{path} holds the weights of {', '.join(state['roles'])}; these settings differ in {min(wrong)}: "
                "go on with the settings that the run was started with"
            )
        self.iteration, self.seconds, self.scoring.scored = state["iteration"], state["seconds"], state["scored"]
        for name in names:
            self.roles.load(name, state["roles"][name])
        self.algorithm.load_state(state["algorithm"])
        self.files.forget_after(self.iteration)

    def export(self, folder: Path) -> None:
        """Writes for plain diffusers what the roles declare: LoRAs, or, where roles have weights of their own, the
        evaluated one as a whole transformer."""
        if self.config.model.roles == "full":
            with whole_folder(folder / "transformer") as partial:
                self.roles.transformer(evaluated(self.roles.specs)).save_pretrained(partial)
            return
        for spec in self.roles.specs:
            if spec.exported_as:
                with whole_folder(folder / spec.exported_as) as partial:
                    self.backbone.save_lora(
                        partial, *exported(self.roles, spec.name, adapter_settings(self.config.model))
                    )


@contextmanager
def _peak_memory(device: torch.device) -> Iterator[dict[str, float]]:
    """Yields a dict that holds the most memory of a GPU that tensors took inside, in GiB; nothing on a CPU."""
    found: dict[str, float] = {}
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    yield found
    if device.type == "cuda":
        found["memory/peak_gib"] = torch.cuda.max_memory_allocated(device) / 2**30


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
