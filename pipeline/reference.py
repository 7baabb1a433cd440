"""ONNX networks in onnxruntime on the host: the float reference, and the teachers."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import onnxruntime as ort

from preprocessing.apply import student_tensor

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from numpy.typing import NDArray

    from preprocessing.contract import StudentInput

    Network = Callable[[NDArray[np.float32]], NDArray[np.float32]]

#: Tensors made at a time: 300 MB of RGB at 224x224.
_BLOCK = 512

#: A choice of threads must be this much faster than fewer threads to be taken.
_WORTH = 0.9

#: Timed runs per choice, and seconds after which one run is enough.
_RUNS = 3
_LONG_RUN = 0.5


@dataclass(frozen=True)
class Threads:
    """How onnxruntime shares the processor; its own default spins on every core."""

    count: int = 0  # 0: as many as onnxruntime likes
    spin: bool = True

    def __str__(self) -> str:
        return f"{self.count or 'all'} threads, {'' if self.spin else 'not '}spinning"


def open_session(
    model: Path | bytes, threads: Threads | None = None, *, cuda: bool = False
) -> ort.InferenceSession:
    """Open an ONNX file or model; onnxruntime's own exceptions pass through.

    Args:
        model: file or serialized model.
        threads: None: onnxruntime's own choice.
        cuda: use CUDA where onnxruntime has it; else always the CPU, whose results are the
            reference.
    """
    options = ort.SessionOptions()
    options.log_severity_level = 3  # errors come as exceptions; warnings are for its developers
    if threads is not None:
        options.intra_op_num_threads = threads.count
        options.add_session_config_entry(
            "session.intra_op.allow_spinning", "1" if threads.spin else "0"
        )
    wanted = ("CUDAExecutionProvider", "CPUExecutionProvider")[0 if cuda else 1 :]
    available = ort.get_available_providers()
    return ort.InferenceSession(
        model if isinstance(model, bytes) else str(model),
        options,
        providers=[name for name in wanted if name in available],
    )


def fastest_threads(model: Path, shape: tuple[int, ...], dtype: type[np.floating[Any]]) -> Threads:
    """Measure which way to share the processor runs a model fastest here and now.

    Where other programs use the cores too, one thread, or threads that sleep instead of spinning,
    can be several times faster than onnxruntime's default.

    Args:
        model: what to run.
        shape: of one batch.
        dtype: of its input.

    Returns:
        The fastest; of nearly equal ones the one with fewer threads.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    choices = [Threads(1, False)]
    if (cores or 1) > 1:
        choices += [Threads(cores or 1, False), Threads(cores or 1, True)]
    best, fastest = choices[0], float("inf")
    for choice in choices:
        session = open_session(model, choice, cuda=True)
        feed = {session.get_inputs()[0].name: np.zeros(shape, dtype)}
        session.run(None, feed)
        seconds = []
        for _ in range(_RUNS):
            start = time.perf_counter()
            session.run(None, feed)
            seconds.append(time.perf_counter() - start)
            if seconds[-1] > _LONG_RUN:
                break
        if min(seconds) < _WORTH * fastest:
            best, fastest = choice, min(seconds)
    return best


def reference_network(path: Path) -> Network:
    """A batch-1 ONNX classifier, opened once: (N, C, H, W) in, logits (N, classes) out, float32."""
    session = open_session(path)
    name = session.get_inputs()[0].name

    def logits(tensors: NDArray[np.float32]) -> NDArray[np.float32]:
        return np.concatenate([session.run(None, {name: tensor[None]})[0] for tensor in tensors])

    return logits


def reference_logits(path: Path, tensors: NDArray[np.float32]) -> NDArray[np.float32]:
    """Run a batch-1 ONNX classifier once; see `reference_network`."""
    return reference_network(path)(tensors)


def answers(
    images: NDArray[np.uint8], given: StudentInput, *networks: Network
) -> list[NDArray[np.float32]]:
    """Logits of networks for stored images, whose tensors are never in memory all at once.

    Args:
        images: uint8 (N, H, W, channels), as the device receives them.
        given: the student's input.
        networks: float32 (n, C, H, W) to logits (n, classes).

    Returns:
        Per network: (N, classes).
    """
    parts: list[list[NDArray[np.float32]]] = [[] for _ in networks]
    for start in range(0, len(images), _BLOCK):
        tensors = student_tensor(images[start : start + _BLOCK], given)
        for network, part in zip(networks, parts, strict=True):
            part.append(network(tensors))
    return [np.concatenate(part) for part in parts]
