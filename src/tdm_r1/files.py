"""Files and folders that appear whole or not at all, also where several processes write them."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yields a file to write that becomes ``path`` when the block ends without an error, and is removed otherwise.

    Raises OSError where it cannot be written, whichever library wrote.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = _beside(path)
    try:
        with _told(path):
            yield partial
            sync(partial)
            os.replace(partial, path)
            sync_folder(path.parent)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """The same for a folder; an older one of that name is replaced."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial, old = _beside(path), path.with_name(f"{path.name}.old")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        with _told(path):
            yield partial
            for file in (f for f in partial.rglob("*") if f.is_file()):
                sync(file)
            shutil.rmtree(old, ignore_errors=True)
            if path.exists():
                os.replace(path, old)
            os.replace(partial, path)
            sync_folder(path.parent)
            shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Writes a text file (UTF-8)."""
    with whole_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


def _beside(path: Path) -> Path:
    return path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.partial")  # processes may write the same file


def sync(file: Path) -> None:
    """A file that is there by name is there in whole, also after a power cut."""
    with file.open("rb+") as opened:
        os.fsync(opened.fileno())


def sync_folder(folder: Path) -> None:
    """Its names are those that there were last, also after a power cut, where the system can say so of folders."""
    try:
        opened = os.open(folder, os.O_RDONLY)
    except OSError:  # Windows opens no folders
        return
    try:
        os.fsync(opened)
    except OSError:
        pass  # some network file systems have no such thing
    finally:
        os.close(opened)


def remove_partial(folder: Path) -> None:
    """Removes what a process that was killed has left of files and folders that it was writing inside ``folder``."""
    for partial in folder.rglob("*.partial"):
        shutil.rmtree(partial) if partial.is_dir() else partial.unlink(missing_ok=True)


@contextmanager
def _told(path: Path) -> Iterator[None]:
    try:
        yield
    except SafetensorError as error:  # of a full disk, for one
        raise OSError(f"cannot write {path}: {error}") from error
