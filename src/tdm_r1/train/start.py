"""Starts a run, after the distillation that makes its few-step start, where the settings name one."""

from __future__ import annotations

from rich.console import Console

from ..config.load import distillation, require_same_run
from ..config.run import RunConfig
from ..core import processes
from ..errors import UserError
from ..evaluate.evaluation import Evaluation
from .build import task_and_scorer
from .folder import RunFolder
from .launch import joined, require_same_settings, restarted
from .run import Run


def train(
    config: RunConfig, *, resume: bool = False, start_from: int | None = None, console: Console | None = None
) -> Evaluation | None:
    """`Run.fit`, after the distillation that makes the run's start, where the configuration names one.

    Under `accelerate launch` or `torchrun` all processes make one run; one that torchrun has started again goes on from
    the last checkpoint.
    """
    with joined():
        files = RunFolder(config.folder)
        require_same_settings(config)
        again = processes.any_of(restarted())  # machines count their restarts apart
        resume = resume or (again and bool(processes.by_first(files.checkpoints)))
        processes.by_first(lambda: _require_startable(files, config, resume=resume))
        config = with_student(config, console)
        return built(config, console).fit(resume=resume, start_from=start_from)


def built(config: RunConfig, console: Console | None) -> Run:
    """A run. Raises what any process raises."""
    return processes.together(lambda: Run(config, console=console))


def _require_startable(files: RunFolder, config: RunConfig, *, resume: bool) -> None:
    """Before weights are read or anything is distilled."""
    files.require_startable(resume=resume)
    if resume and (before := files.settings()) is not None:
        require_same_run(before, config)


def with_student(config: RunConfig, console: Console | None = None) -> RunConfig:
    """The configuration with a few-step start: distils one into the run's folder first, if `distill_with` says so.

    A finished one is used, an unfinished one gone on with. Raises UserError if it was interrupted again.
    """
    if config.distill_with is None or config.model.student_lora:
        return config
    recipe = distillation(config)
    folder = recipe.folder
    if not processes.by_first(RunFolder(folder).is_finished):
        task_and_scorer(config)[1].close()  # faults of the run itself are reported now, not after a distillation
        run = built(recipe, console)
        run.fit(resume=bool(run.checkpoints()))
        if run.iteration < recipe.iterations:
            raise UserError("the distillation was interrupted; the same command goes on with it")
    return config.override({"model.student_lora": str(folder / "lora"), "model.fake_lora": str(folder / "lora_fake")})
