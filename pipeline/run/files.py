"""Files and folders written whole or not at all."""

from __future__ import annotations

import os
import shutil
from contextlib import contextmanager
from typing import TYPE_CHECKING

from pipeline.run.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A file to write that takes the place of `path` when the block ends, and vanishes if it fails.

    Its name has our process id in it, so that several processes can make the same file.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def new_file(dest: Path) -> Iterator[Path]:
    """A file to write for the user that becomes dest when the block ends, and vanishes if it fails.

    Raises:
        InputError: there is something already, or it can't be written there.
    """
    _refuse_existing(dest)
    try:
        with replacing(dest) as partial:
            yield partial
    except OSError as error:
        raise InputError(f"can't write {dest}: {error.strerror or error}") from error


@contextmanager
def new_folder(dest: Path) -> Iterator[Path]:
    """A folder to fill that becomes dest when the block ends, and vanishes when it fails.

    Raises:
        InputError: there is something already, or it can't be written there.
    """
    _refuse_existing(dest)
    partial = dest.with_name(f".{dest.name}.partial")
    try:
        partial.mkdir(parents=True)
        yield partial
        partial.replace(dest)
    except OSError as error:
        raise InputError(f"can't write {dest}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _refuse_existing(dest: Path) -> None:
    if dest.exists():
        raise InputError(f"{dest} exists; choose another name, or remove it")


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file that is either the old one or the new one at every moment."""
    with replacing(path) as partial, partial.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    sync_folder(path.parent)


def sync_folder(path: Path) -> None:
    """Make renames and new names in a folder survive a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def folder_files(path: Path) -> Iterator[Path]:
    """Every file below a folder, sorted by its relative POSIX path."""
    files = (p for p in path.rglob("*") if p.is_file())
    yield from sorted(files, key=lambda p: p.relative_to(path).as_posix())
