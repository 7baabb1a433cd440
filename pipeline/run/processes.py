"""Several processes that train together: the first runs the stages, the others only train.

Lightning starts the others itself (they find TASKS in their environment), or torchrun or SLURM
starts all of them alike (then the others wait for the first to say what to train).
"""

from __future__ import annotations

import os
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.run.files import replacing

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


#: Names the file with the trainings for processes that Lightning starts.
TASKS = "KDPIPE_TASKS"

#: What Lightning tells the processes that it starts; it must not outlive a training here.
_LIGHTNINGS = ("LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")

_WAIT_SECONDS = 0.2


def is_follower() -> bool:
    """Whether this process only trains along."""
    return TASKS in os.environ or _rank() > 0


def follow(folder: Path, take_part: Callable[[Path], None]) -> None:
    """Train along until the first process has ended.

    Args:
        folder: of the run.
        take_part: does the trainings that a file describes.
    """
    if TASKS in os.environ:
        take_part(Path(os.environ[TASKS]))
        return
    tasks, ended = _files(folder)
    while not ended.exists():
        if tasks.exists():
            take_part(tasks)
            while tasks.exists() and not ended.exists():
                time.sleep(_WAIT_SECONDS)
        time.sleep(_WAIT_SECONDS)


@contextmanager
def leading(folder: Path) -> Iterator[None]:
    """Tell followers of torchrun or SLURM when this process, the first, has ended."""
    if not _job():
        yield
        return
    try:
        yield
    finally:
        _, ended = _files(folder)
        ended.parent.mkdir(parents=True, exist_ok=True)
        ended.touch()


@contextmanager
def announce(folder: Path, tasks: bytes) -> Iterator[None]:
    """Let followers find these trainings while they are done here.

    Args:
        folder: of the run.
        tasks: the document that `take_part` reads.
    """
    file, _ = _files(folder)
    file.parent.mkdir(parents=True, exist_ok=True)
    with replacing(file) as partial:
        partial.write_bytes(tasks)
    environment = {name: os.environ.get(name) for name in _LIGHTNINGS}
    os.environ[TASKS] = str(file)
    try:
        yield
    finally:
        file.unlink(missing_ok=True)
        del os.environ[TASKS]
        for name, value in environment.items():
            if value is None:
                os.environ.pop(name, None)


def _rank() -> int:
    return int(os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or 0)


def _job() -> str:
    """What all processes of one launch have in common; empty when there is one process."""
    if int(os.environ.get("WORLD_SIZE") or os.environ.get("SLURM_NTASKS") or 1) < 2:
        return ""
    if "SLURM_JOB_ID" in os.environ:
        return f"slurm-{os.environ['SLURM_JOB_ID']}-{os.environ.get('SLURM_STEP_ID', '')}"
    name = os.environ.get("TORCHELASTIC_RUN_ID", "none")
    # Without a name of its own, a launch is known by its one parent process.
    return f"torchrun-{name}" if name != "none" else f"torchrun-{os.getppid()}"


def _files(folder: Path) -> tuple[Path, Path]:
    scratch = folder / "scratch"
    return scratch / f"tasks-{_job()}.json", scratch / f"ended-{_job()}"
