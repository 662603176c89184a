"""A run's folder: settings, log, checkpoints, and who may write there."""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from ..config.load import load_recipe
from ..config.run import CONFIG_FILE, LOG, RunConfig, dump
from ..errors import UserError
from ..files import remove_partial, write_text
from .checkpoint import remove_checkpoint, remove_orphans

KEPT_CHECKPOINTS = 3  # the last ones; the best evaluated one is kept beside them
EXPORTS = ("lora", "transformer")  # what a run writes at its end, or when it is interrupted
EXPORTED = "exported.json"  # after which iteration


class RunFolder:
    """Everything that is read from and written to a run's folder, but for the contents of checkpoints."""

    def __init__(self, path: Path) -> None:
        self.path = path

    # -------------------------------------------------------------------------------------- beginning

    def require_startable(self, *, resume: bool) -> None:
        """Raises UserError if a run cannot be started here or, with ``resume``, cannot be gone on with."""
        saved = self.checkpoints()
        if resume and not saved:
            raise UserError(f"--resume: {self.path} holds no checkpoint; start it without --resume")
        if not resume and (saved or any((self.path / made).exists() for made in EXPORTS)):
            raise UserError(f"{self.path} already holds a run: go on with --resume, or give another --name or --output")

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Keeps other processes out. Raises UserError if one is there."""
        self.path.mkdir(parents=True, exist_ok=True)
        with ExitStack() as held:
            try:
                held.enter_context(FileLock(self.path / ".lock").acquire(timeout=0))
            except Timeout as error:
                raise UserError(f"{self.path} is in use by another process: wait, or give another --name") from error
            except (OSError, NotImplementedError):
                pass  # some network file systems have no locks
            else:
                remove_partial(self.path)
                remove_orphans(self.path / "checkpoints")
            yield

    def begin(self, config: RunConfig) -> None:
        """Files the settings and versions of a new run."""
        (self.path / LOG).unlink(missing_ok=True)  # of a run that ended before anything was saved
        names = ("tdm-r1", "torch", "diffusers", "transformers", "peft", "accelerate", "numpy")
        versions = {"python": platform.python_version()} | {n: metadata.version(n) for n in names}
        write_text(self.path / "versions.json", json.dumps(versions, indent=2))
        self.file_settings(config)

    def file_settings(self, config: RunConfig) -> None:
        write_text(self.path / CONFIG_FILE, dump(config))

    def settings(self) -> RunConfig | None:
        """The settings that the run was started with; None if they are gone or of another version."""
        try:
            return load_recipe(str(self.path.resolve()))
        except UserError:
            return None

    # -------------------------------------------------------------------------------------- log

    def log(self, row: Mapping[str, float]) -> None:
        """Appends a row. What is not finite is left out: NaN is no JSON."""
        finite = {name: value for name, value in row.items() if math.isfinite(value)}
        with (self.path / LOG).open("a") as file:
            file.write(json.dumps(finite, allow_nan=False) + "\n")

    def history(self) -> list[dict[str, Any]]:
        """The rows of the log."""
        path = self.path / LOG
        lines = path.read_text().splitlines() if path.exists() else []
        rows = [json.loads(line) for line in lines[:-1]]
        try:
            return rows + [json.loads(line) for line in lines[-1:]]
        except json.JSONDecodeError:
            return rows  # its last line was being written when the disk was full or the machine went down

    def forget_after(self, iteration: int) -> None:
        """Drops what the log has of later iterations."""
        rows = [json.dumps(row) for row in self.history() if row["iteration"] <= iteration]
        write_text(self.path / LOG, "".join(row + "\n" for row in rows))

    def is_evaluated(self, iteration: int) -> bool:
        """Whether the log has an evaluation of the model after an iteration."""
        return any("eval/reward_missing" in row and row["iteration"] == iteration for row in self.history())

    def alarmed(self) -> tuple[bool, int]:
        """Whether an evaluation of the log raised an alarm, and the last evaluated iteration before that; 0 if none."""
        evaluated = [row for row in self.history() if "eval/alarms" in row]
        first = next((row["iteration"] for row in evaluated if row["eval/alarms"]), math.inf)
        sound = max((int(row["iteration"]) for row in evaluated if row["iteration"] < first), default=0)
        return first < math.inf, sound

    def is_finished(self) -> bool:
        """Whether the exported weights are those of the run's end: an interrupted run exports its own too."""
        note = self.path / EXPORTED
        if not note.is_file() or not (self.path / CONFIG_FILE).is_file():
            return False
        return json.loads(note.read_text())["iteration"] >= load_recipe(str(self.path.resolve())).iterations

    @contextmanager
    def exporting(self, iteration: int) -> Iterator[None]:
        """Notes, when the block has ended, after which iteration the weights were exported."""
        (self.path / EXPORTED).unlink(missing_ok=True)
        yield
        write_text(self.path / EXPORTED, json.dumps({"iteration": iteration}))

    # -------------------------------------------------------------------------------------- checkpoints

    def checkpoints(self) -> list[Path]:
        """Oldest first."""
        return sorted((self.path / "checkpoints").glob("iteration_*.safetensors"))

    @property
    def diverged(self) -> Path:
        """The last batch of a run that has diverged."""
        return self.path / "diverged.safetensors"

    def checkpoint(self, iteration: int) -> Path:
        """Where the checkpoint after an iteration is, or is to be."""
        return self.path / "checkpoints" / f"iteration_{iteration:06d}.safetensors"

    def require_metric(self, best: str) -> None:
        """Raises UserError if the log has evaluations, and none of them has this metric."""
        evaluated = [row for row in self.history() if "eval/reward_missing" in row]
        if evaluated and not any(f"eval/{best}" in row for row in evaluated):
            names = (name.removeprefix("eval/") for name in evaluated[-1] if name.startswith("eval/"))
            raise UserError(f"evaluation.best = {best!r}: the metrics are {', '.join(names)}; name one")

    def drop_old_checkpoints(self, *, best: str = "reward", lower: bool = False, keep: int | None = None) -> None:
        """Keeps the last checkpoints, that of the iteration ``keep``, and the one with the best value of the metric
        ``best``, which is the lowest if ``lower``."""
        name, sign = f"eval/{best}", -1 if lower else 1
        evaluated = (row for row in self.history() if name in row)
        found = max(evaluated, key=lambda row: sign * row[name], default={}).get("iteration")
        for old in self.checkpoints()[:-KEPT_CHECKPOINTS]:
            if iteration_of(old) not in (found, keep):
                remove_checkpoint(old)


def iteration_of(checkpoint: Path) -> int:
    """The iteration after which a checkpoint was written."""
    return int(checkpoint.stem.removeprefix("iteration_"))


def listed(checkpoints: Iterable[Path]) -> str:
    """Their iterations, for people."""
    return ", ".join(str(i) for i in sorted(map(iteration_of, checkpoints)))
