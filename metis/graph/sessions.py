"""ONNX Runtime sessions: opened one way, with threads that are measured."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnxruntime as ort
from onnx import helper, numpy_helper

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from metis.graph.edit import Array


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
    model: Path | onnx.ModelProto,
    *,
    threads: Threads | None = None,
    options: Mapping[str, str] | None = None,
    optimize: bool = True,
    cuda: bool = False,
) -> ort.InferenceSession:
    """Open an ONNX model; onnxruntime's own exceptions pass through.

    Args:
        model: a file, or a model in memory.
        threads: None: onnxruntime's own choice.
        options: entries of onnxruntime's session configuration, by key.
        optimize: False: run the graph as it is written, node by node.
        cuda: use CUDA where onnxruntime has it; else always the CPU, whose results are the
            reference.
    """
    settings = ort.SessionOptions()
    # Errors come as exceptions; a GPU that can't be used is only logged.
    settings.log_severity_level = 3 if cuda else 4
    if threads is not None:
        settings.intra_op_num_threads = threads.count
        settings.add_session_config_entry(
            "session.intra_op.allow_spinning", "1" if threads.spin else "0"
        )
    for key, value in (options or {}).items():
        settings.add_session_config_entry(key, value)
    if not optimize:
        settings.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    providers = ("CUDAExecutionProvider", "CPUExecutionProvider")[0 if cuda else 1 :]
    available = ort.get_available_providers()
    return ort.InferenceSession(
        model.SerializeToString() if isinstance(model, onnx.ModelProto) else str(model),
        settings,
        providers=[name for name in providers if name in available],
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
        session = open_session(model, threads=choice, cuda=True)
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
    single = helper.make_model(graph, opset_imports=model.opset_import, ir_version=model.ir_version)
    return list(open_exact(single).run(None, {}))


def open_exact(model: onnx.ModelProto) -> ort.InferenceSession:
    """A session that runs the graph as it is written, on threads that sleep while they wait."""
    return open_session(model, threads=Threads(spin=False), optimize=False)
