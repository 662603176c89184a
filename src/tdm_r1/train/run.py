"""A run: a loop around an algorithm's `step`, evaluation, checkpoints, export. The maths stands elsewhere."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console

from ..config.load import differences, require_same_run
from ..config.run import RunConfig
from ..core import processes
from ..errors import RAISED_ELSEWHERE, UserError
from ..evaluate.evaluation import Evaluation, Evaluator, Sampling
from ..models.embedder import Embedder
from ..models.load import load_backbones
from ..models.specification import evaluated
from ..rewards.registry import named
from ..rewards.scores import Reward
from ..tasks.load import load_kl_task, load_task
from ..tasks.settings import TaskConfig
from .alarms import Alarms
from .build import algorithm_of, build_roles, load_starts, task_and_scorer
from .checkpoint import DamagedError, gather_spread, load_state, remove_checkpoint, save_state
from .export import export_roles
from .folder import RunFolder, listed
from .iteration import Begun, Iterations
from .launch import require_alike, require_share
from .loop import interrupts, peak_memory, progress
from .memory import fitted
from .report import Reporter
from .scoring import LatentScorer


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
        self.console = Console(quiet=True) if processes.rank() else console or Console()
        self.folder = config.folder
        self.files = RunFolder(config.folder)
        self.by_function = reward is not None
        require_share(config)
        kl_task = load_kl_task(config.task) if config.batch.kl_prompts else None
        self.task, self.scorer = task_and_scorer(config, reward)
        self.reporter = Reporter(config, self.files, self.console)
        self.backbone, teacher = load_backbones(fitted(config, self.console).model)
        self.roles = build_roles(config, self.backbone, teacher)
        load_starts(config, self.roles)
        self.embed = Embedder(self.backbone)
        self.algorithm = algorithm_of(config)(self.roles, self.embed([""]), config)
        b = config.batch
        self.scoring = LatentScorer(
            self.backbone, self.scorer, micro_batch=b.micro_batch, group=b.group, console=self.console
        )
        if config.scoring.staleness and not self.scorer.apart:
            self.roles.tf32 = False  # it is set for the whole process, where rewards are then computed at the same time
        self.iterations = Iterations(
            config, self.task, kl_task, self.embed, self.backbone.latent_shape, self.algorithm, self.scoring
        )
        self.ahead: Begun | None = None  # the next iteration, where it has been begun before this one's end
        self.alarms = Alarms({}, {}, {}, at=config.evaluation.alarm_at)  # those of the run come with its start
        self.best_is_low = False  # of `evaluation.best`; known when the run starts
        self.alarmed, self.sound = False, 0  # whether any was raised; the last evaluated iteration before that
        self.iteration = 0
        self.seconds = 0.0

    def step(self) -> dict[str, float]:
        """One iteration. With `scoring.staleness` the samples of the next are made first, so that they are scored
        while this one is learned from."""
        i = self.iteration
        with peak_memory(self.backbone.device) as memory:
            begun, self.ahead = self.ahead or self.iterations.begin(i), None
            if self.config.scoring.staleness and begun.pending is not None and not self._stands_still(i + 1):
                with begun.dropped_on_error():
                    self.ahead = self.iterations.begin(i + 1)
            metrics = self.iterations.finish(begun)
        self.iteration += 1
        return metrics | memory

    def _stands_still(self, i: int) -> bool:
        """Whether the run saves, evaluates or ends after ``i`` iterations, when nothing may be under way."""
        return i % self.config.save_every == 0 or self._evaluated_after(i)

    def close(self) -> None:
        """Gives up an iteration that was begun, and ends the reward's processes."""
        self._drop_ahead()
        self.scorer.close()

    def _drop_ahead(self) -> None:
        if self.ahead is not None:
            self.ahead.drop()
        self.ahead = None

    # -------------------------------------------------------------------------------------- the loop

    def fit(
        self, *, resume: bool = False, start_from: int | None = None, first: Evaluation | None = None
    ) -> Evaluation | None:
        """Trains to the end, or to Ctrl-C, which finishes the iteration and saves. Returns the last evaluation.

        Args:
            resume, start_from: see `open`.
            first: the evaluation of the start, where it has been made already.
        """
        with ExitStack() as held:
            processes.by_first(lambda: held.enter_context(self.files.alone()))
            self.open(resume=resume, start_from=start_from)
            processes.by_first(lambda: self.files.require_metric(self.config.evaluation.best))
            evaluator = self.evaluator()
            self.best_is_low = evaluator.directions.get(self.config.evaluation.best) == "down"
            self.alarms = processes.by_first(lambda: Alarms.load(self.folder, self.config, evaluator.directions))
            with self._nothing_lost():
                last = self._train(evaluator, self._start(evaluator, first) if self._due() else None)
            self.save()
            if self.iteration < self.config.iterations:
                self.console.print(f"Stopped after iteration {self.iteration}, saved. {self._going_on()}", markup=False)
            exported = self._back_at_alarm()
            whole = self.roles.whole(evaluated(self.roles.specs))
            processes.by_first(lambda: self._export(exported, whole))
        return last

    def _start(self, evaluator: Evaluator, first: Evaluation | None) -> Evaluation:
        """Evaluates the run as it stands, before an iteration; what the start shows is what alarms go by."""
        result, at = first or evaluator(self.few_step()), self.config.evaluation.alarm_at
        if self.iteration == 0:
            if self.config.algorithm != "tdm":  # the start of a distillation is not what is to be kept
                self.alarms = Alarms(evaluator.directions, result.metrics, evaluator.noise(result), at=at)
                processes.by_first(lambda: self.alarms.save(self.folder, self.config))
            if self.config.evaluation.on_alarm == "back":
                self.save()  # there may be nothing else to go back to
        self._report(result)
        processes.by_first(lambda: self.files.require_metric(self.config.evaluation.best))
        return result

    def _back_at_alarm(self) -> int:
        """The iteration whose weights are to be exported: after an alarm, where the settings say so, those of the last
        evaluated checkpoint before it, which it loads."""
        if not self.alarmed or self.config.evaluation.on_alarm != "back":
            return self.iteration
        path = self.files.checkpoint(self.sound)
        if not processes.by_first(path.exists):  # of a run that was started with another setting
            self.console.print(f"There is no checkpoint of iteration {self.sound} to go back to", style="yellow")
            return self.iteration
        self._load_state(path, processes.by_first(lambda: load_state(path)))
        self.console.print(f"What is exported is iteration {self.sound}, the last evaluated one without an alarm")
        return self.sound

    def _export(self, iteration: int, whole: Any) -> None:
        with self.files.exporting(iteration):
            export_roles(self.folder, self.config.model, self.backbone, self.roles, whole)

    def _going_on(self, *, earlier: bool = False) -> str:
        """How to resume; ``earlier``: from a checkpoint that one chooses."""
        if self.by_function:
            more = ", start_from=ITERATION" if earlier else ""
            return f"Go on with: Run(load_recipe({str(self.folder)!r}), reward=...).fit(resume=True{more})"
        return f"Go on with: tdm-r1 train {self.folder} --resume" + (" --from ITERATION" if earlier else "")

    def _due(self) -> bool:
        """Whether the model as it is needs an evaluation that the log does not have yet: at the start, every so often,
        at the end."""
        i = self.iteration
        return self._evaluated_after(i) and not processes.by_first(lambda: self.files.is_evaluated(i))

    def _evaluated_after(self, i: int) -> bool:
        every = self.config.evaluation.every
        return i in (0, self.config.iterations) or bool(every and i % every == 0)

    def _train(self, evaluator: Evaluator, last: Evaluation | None) -> Evaluation | None:
        """The loop; returns the last evaluation, ``last`` if it makes none."""
        c = self.config
        bar = progress(c.name, total=c.iterations, done=self.iteration, console=self.console)
        with bar as show, interrupts() as interrupted:
            while self.iteration < self.config.iterations and not processes.any_of(interrupted()):
                if self.alarmed and c.evaluation.on_alarm != "warn":
                    self.console.print("An alarm ends the run; to go on all the same: --evaluation.on-alarm warn")
                    break
                start = time.perf_counter()
                metrics = self.step()
                self.seconds += time.perf_counter() - start
                self._log(metrics)
                show(self.iteration, metrics)
                due = self._due()
                if due or self.iteration % self.config.save_every == 0:
                    self.save()  # before an evaluation, which may break
                if due:
                    last = None  # its images take gigabytes where the model is large
                    last = self._report(evaluator(self.few_step()))
        return last

    @contextmanager
    def _nothing_lost(self) -> Iterator[None]:
        """Saves before an error for users ends the run; closes it in any case."""
        try:
            yield
        except (UserError, OSError) as error:
            if not self.iteration or (self.roles.spread and not self.files.checkpoints()):
                raise  # nothing to go on from
            raise _noted(UserError(f"{error}. {self._saved()} {self._going_on()}"), error) from error
        except FloatingPointError as error:  # what has diverged is not saved
            if processes.rank():
                error.add_note(RAISED_ELSEWHERE)  # all raise it
            else:
                error.args = (f"{error}{self._batch_saved()}",)
            if not self.files.checkpoints():
                raise
            known = f"there are checkpoints of {listed(self.files.checkpoints())}"
            raise _noted(UserError(f"{error}. {self._going_on(earlier=True)}; {known}"), error) from error
        finally:
            self.close()

    def _batch_saved(self) -> str:
        """Writes the last batch: prompts, final latents [B, C, H, W] and scores (`checkpoint.load_state` reads it)."""
        if not self.iterations.last:  # a distillation scores none
            return ""
        try:
            save_state(self.files.diverged, self.iterations.last)
        except OSError as error:
            return f". The last batch could not be saved ({error})"
        return f". The last batch is in {self.files.diverged}"

    def _saved(self) -> str:
        """Saves once more, and says what there is to go on from."""
        if self.roles.spread:  # takes all processes, and one of them may be lost
            return f"There are checkpoints of {listed(self.files.checkpoints())}. Fix the error above first."
        try:
            if not processes.rank():
                self._save()
        except OSError as error:
            last = self.files.checkpoints()[-1:]
            kept = f"the last whole one is {last[0]}" if last else "there is none yet"
            return f"No checkpoint could be written ({error}); {kept}. Free some space first."
        return f"Checkpoint saved after iteration {self.iteration}. Fix the error above first."

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
        return Sampling(role or evaluated(self.roles.specs), s.steps, s.shift, s.solver, s.guidance)

    def _report(self, result: Evaluation) -> Evaluation:
        self.scoring.show_failures(result.scores)
        processes.together(lambda: self.scoring.watch.require_any(result.scores))
        self._look_for_alarms(result)
        processes.by_first(lambda: self.reporter.evaluation(self._counts(), result))
        return result

    def _look_for_alarms(self, result: Evaluation) -> None:
        found = self.alarms(result.metrics)
        result.metrics["alarms"] = float(len(found))
        for alarm in found:
            self.console.print(f"alarm: {alarm}", style="bold red", markup=False, highlight=False)
        self.alarmed = self.alarmed or bool(found)
        if not self.alarmed:
            self.sound = self.iteration

    def _log(self, metrics: dict[str, float]) -> None:
        processes.by_first(lambda: self.reporter.log(self._counts(), metrics))

    def _counts(self) -> dict[str, float]:
        return {"iteration": self.iteration, "seconds": round(self.seconds, 2), "scored": self.scored}

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
        before = processes.by_first(lambda: self._open_files(resume=resume))
        if not resume:
            return
        if start_from is None:
            self._load_last()
        else:
            self._load_earlier(start_from)
        for name, old, new in differences(before, self.config) if before else ():
            self.console.print(f"{name} = {new!r} from here on ({old!r} before)", markup=False)
        processes.by_first(lambda: self.files.file_settings(self.config))

    def _open_files(self, *, resume: bool) -> RunConfig | None:
        """Begins the folder of a new run; or the settings of the run that is there, if they can be read."""
        self.files.require_startable(resume=resume)
        if not resume:
            self.files.begin(self.config)
            return None
        before = self.files.settings()
        if before is not None:
            require_same_run(before, self.config)
        return before

    def _load_last(self) -> None:
        """Goes on from the last checkpoint that can be read."""

        def readable() -> tuple[Path, Any]:
            why = ""
            for path in reversed(self.files.checkpoints()):
                try:
                    return path, load_state(path)
                except DamagedError as error:
                    self.console.print(f"{error}: trying the one before", style="yellow", markup=False)
                    why = str(error)
            raise UserError(
                f"--resume: none of the checkpoints in {self.folder / 'checkpoints'} can be read; start a new run. "
                f"Of the oldest: {why}"
            )

        self._go_on_from(*processes.by_first(readable))

    def _load_earlier(self, iteration: int) -> None:
        """Goes back to the checkpoint of an iteration and removes the later ones."""
        wanted, saved = self.files.checkpoint(iteration), self.checkpoints()
        if wanted not in saved:
            raise UserError(
                f"--from = {iteration}: {self.folder} has checkpoints of iterations {listed(saved)}; name one of them"
            )
        self.load(wanted)
        if not processes.rank():
            for later in saved[saved.index(wanted) + 1 :]:
                remove_checkpoint(later)

    def checkpoints(self) -> list[Path]:
        """The run's checkpoints, oldest first."""
        return processes.by_first(self.files.checkpoints)

    def save(self) -> None:
        """Writes a checkpoint that `load` goes on from exactly, and drops old ones.

        An iteration that has been begun is dropped, and begun anew by this run as by one that resumes.
        """
        self._drop_ahead()
        require_alike(self.roles)
        if self.roles.spread:
            self._save()
        else:
            processes.by_first(self._save)
        best, low = self.config.evaluation.best, self.best_is_low
        processes.by_first(lambda: self.files.drop_old_checkpoints(best=best, lower=low, keep=self.sound))

    def _save(self) -> None:
        """Writes it: in the first process, or in all of them where weights are spread."""
        state = {
            "iteration": self.iteration,
            "seconds": self.seconds,
            "scored": self.scored,
            "roles": {spec.name: self.roles.weights(spec.name) for spec in self.roles.specs},
            "algorithm": self.algorithm.state(),
        }
        save_state(self.files.checkpoint(self.iteration), state)

    def load(self, path: Path) -> None:
        """Goes back to a checkpoint, and drops what the log has from after it."""
        self._go_on_from(path, processes.by_first(lambda: load_state(path)))

    def _go_on_from(self, path: Path, state: Mapping[str, Any]) -> None:
        self._load_state(path, state)
        processes.by_first(lambda: self.files.forget_after(self.iteration))
        self.alarmed, self.sound = processes.by_first(self.files.alarmed)

    def _load_state(self, path: Path, state: Mapping[str, Any]) -> None:
        names = [str(spec.name) for spec in self.roles.specs]
        if wrong := set(names) ^ state["roles"].keys():
            raise UserError(
                f"{path}: its roles ({', '.join(state['roles'])}) do not match these settings (first difference: "
                f"{min(wrong)}); resume with the settings that the run was started with"
            )
        state = gather_spread(path, state, self.backbone.device.type)
        self.iteration, self.seconds, self.scoring.scored = state["iteration"], state["seconds"], state["scored"]
        for name in names:
            self.roles.load(name, state["roles"][name])
        self.algorithm.load_state(state["algorithm"])
        self._drop_ahead()

    def export(self, folder: Path) -> None:
        """Writes the evaluated weights, and others that the roles declare, for plain diffusers. Of one process."""
        whole = self.roles.whole(evaluated(self.roles.specs))
        export_roles(folder, self.config.model, self.backbone, self.roles, whole)


def _noted(error: UserError, cause: Exception) -> UserError:
    """With the notes of its cause: who of several processes tells of it."""
    for note in getattr(cause, "__notes__", ()):
        error.add_note(note)
    return error
