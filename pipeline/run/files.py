"""Files and folders written whole or not at all."""

from __future__ import annotations

import os
import shutil
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.run.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@contextmanager
def new_folder(dest: Path) -> Iterator[Path]:
    """A folder to fill that becomes dest when the block ends, and vanishes when it fails.

    Raises:
        InputError: there is something already, or it can't be written there.
    """
    if dest.exists():
        raise InputError(f"{dest} exists; choose another name, or remove it")
    partial = dest.with_name(f".{dest.name}.partial")
    try:
        partial.mkdir(parents=True)
        yield partial
        partial.replace(dest)
    except OSError as error:
        raise InputError(f"can't write {dest}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file that is either the old one or the new one at every moment."""
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
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
