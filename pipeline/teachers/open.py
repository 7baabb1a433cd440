"""Opens every teacher that kdpipe.yaml names, and measures how many threads serve it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from metis.graph.sessions import Threads, fastest_threads
from pipeline.run.errors import InputError, first_line
from pipeline.tasks.task import DEFAULT_TASK, open_task
from pipeline.teachers.onnx_teacher import open_onnx
from pipeline.teachers.teacher import Teacher

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from pipeline.params.sources import TeacherParams
    from pipeline.tasks.task import Task
    from preprocessing.contract import Channels, Contract


#: Patches per call when threads are compared.
_TRIAL_BATCH = 16


def open_teacher(
    path: Path | None,
    params: TeacherParams,
    contract: Contract,
    channels: Channels,
    threads: Threads | None = None,
    task: Task | None = None,
) -> Teacher:
    """Open a teacher and check it against the contract and the data.

    Args:
        path: its ONNX file, or the weights of a torch teacher; None: those of a hub.
        params: how it is described in kdpipe.yaml.
        contract: classes, layout and size of the input.
        channels: its bands.
        threads: for onnxruntime.
        task: what an output must be; None: the default.

    Raises:
        InputError: unreadable, truncated or unsafe file; not one input; wrong channel count, input
            size, type or number of classes; a second normalization. The message names the file.
    """
    if params.timm is not None:
        from pipeline.teachers.torch_teacher import open_torch_teacher

        teacher = open_torch_teacher(path, params, contract, channels)
    else:
        assert path is not None, "ingest's own checks"
        teacher = open_onnx(path, params, contract, channels, threads)
    _check_output(teacher, contract, task or open_task(DEFAULT_TASK))
    return teacher


def open_teachers(
    files: Iterable[tuple[Path | None, TeacherParams, Channels]],
    contract: Contract,
    task: Task | None = None,
) -> tuple[list[Teacher], Threads | None]:
    """Open teachers on as many threads as are fastest for the first of them here and now.

    Args:
        files: file, description and bands, as `open_teacher` takes them.
        contract: classes, layout and size of the input.
        task: what an output must be; None: the default.

    Returns:
        The teachers, and the threads of those in onnxruntime, if there are any.

    Raises:
        InputError: see `open_teacher`.
    """
    teachers = []
    threads: Threads | None = None
    for path, params, channels in files:
        teacher = open_teacher(path, params, contract, channels, threads, task)
        if threads is None and (threads := choose_threads(teacher)):
            teacher = open_teacher(path, params, contract, channels, threads, task)
        teachers.append(teacher)
    return teachers, threads


def choose_threads(teacher: Teacher) -> Threads | None:
    """Measure how onnxruntime runs a teacher fastest on this machine; None for a torch teacher."""
    if teacher.opset is None:
        return None
    depth, (height, width) = len(teacher.bands), teacher.size_hw
    batch = teacher.batch or _TRIAL_BATCH
    shape = (
        (batch, depth, height, width) if teacher.layout == "NCHW" else (batch, height, width, depth)
    )
    return fastest_threads(teacher.files[0], shape, teacher.dtype)


def _check_output(teacher: Teacher, contract: Contract, task: Task) -> None:
    """Run one patch of zeros: the output must be what the task needs."""
    name = teacher.files[0].name if teacher.files else teacher.name
    height, width = teacher.size_hw
    zeros = np.zeros((1, height, width, len(teacher.bands)), np.float32)
    try:
        output = teacher.outputs(zeros)[0]
    except Exception as error:  # onnxruntime's exceptions share no narrower base
        raise InputError(f"{name} fails on a patch: {first_line(error)}") from error
    if fault := task.output_fault(output.shape, len(contract.labels), teacher.size_hw):
        raise InputError(f"{name} {fault}")
