"""ONNX Runtime sessions: opened one way, with threads that are measured."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import helper, numpy_helper

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray


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


Array = NDArray[Any]


def run_node(
    node: onnx.NodeProto, inputs: Mapping[str, Array], model: onnx.ModelProto
) -> list[Array]:
    """What one node of a model gives for these inputs, by onnxruntime."""
    graph = helper.make_graph(
        [node],
        "one",
        [],
        [onnx.ValueInfoProto(name=name) for name in node.output if name],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in inputs.items()],
    )
    alone = helper.make_model(graph, opset_imports=model.opset_import, ir_version=model.ir_version)
    return list(open_plain(alone).run(None, {}))


def open_plain(model: onnx.ModelProto) -> ort.InferenceSession:
    """An onnxruntime session that runs the graph as it is written, node by node."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4  # what goes wrong comes as an exception
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return ort.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


def open_with_options(model: Path | bytes, options: Mapping[str, str]) -> ort.InferenceSession:
    """A session on the CPU with entries of onnxruntime's session configuration."""
    chosen = ort.SessionOptions()
    chosen.log_severity_level = 3
    for key, value in options.items():
        chosen.add_session_config_entry(key, value)
    return ort.InferenceSession(
        model if isinstance(model, bytes) else str(model),
        chosen,
        providers=["CPUExecutionProvider"],
    )


def open_graph(model: onnx.ModelProto) -> ort.InferenceSession:
    """A float session on the CPU that says nothing."""
    options = ort.SessionOptions()
    options.log_severity_level = 4
    return ort.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
