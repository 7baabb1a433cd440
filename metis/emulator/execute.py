"""Graphs run in batches, as the compiled model would."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnxruntime as ort

from metis.emulator.device_tensors import device_specs
from metis.emulator.kernels import arithmetic
from metis.graph.sessions import open_session
from metis.quantize.folding import SplitGraph
from preprocessing.int8 import TensorSpec, dequantize, quantize
from preprocessing.scores import without_positions

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray


#: Frames per call of the host's int8 model.
_BATCH = 64


def run_session(session: ort.InferenceSession, batch: NDArray[Any]) -> NDArray[Any]:
    """The first output of a session with one input."""
    output: NDArray[Any] = session.run(None, {session.get_inputs()[0].name: batch})[0]
    return output


Step = Callable[["NDArray[np.float32]"], "NDArray[np.float32]"]


def run_graphs(
    graphs: Sequence[tuple[onnx.ModelProto | None, Mapping[str, str]]],
    frames: NDArray[np.float32],
) -> NDArray[np.float32]:
    """Run graphs with a free batch one after the other, without a file.

    Args:
        graphs: each with its options for onnxruntime; None is passed over.
        frames: float32 (N, C, H, W).

    Returns:
        Logits, float32 (N, classes, ...).
    """
    steps = [
        partial(run_session, open_session(graph, options=options))
        for graph, options in graphs
        if graph is not None
    ]
    return run_in_batches(steps, frames)


def int8_network(parts: SplitGraph, graph: onnx.ModelProto, scheme: str) -> Step:
    """What `Emulator.infer` computes with this int8 graph of the core, without a file.

    Returns:
        Frames, float32 (N, C, H, W), to logits, float32 (N, classes, ...).
    """
    options = arithmetic(scheme)[1]
    steps: list[Step] = [
        partial(put_on_grid, spec=device_specs(graph)[0]),
        partial(run_session, open_session(graph, options=options)),
    ]
    if parts.preamble is not None:
        steps.insert(0, partial(run_session, open_session(parts.preamble)))
    if parts.postamble is not None:
        steps.append(partial(run_session, open_session(parts.postamble)))
    return partial(run_in_batches, steps)


def run_in_batches(steps: Sequence[Step], frames: NDArray[np.float32]) -> NDArray[np.float32]:
    """Logits (N, classes, ...) after all steps, computed for a limited number of frames at a time.

    A network that ends in a single position, such as (N, classes, 1, 1), gives (N, classes).
    """
    logits = []
    for batch in np.array_split(frames, max(1, -(-len(frames) // _BATCH))):
        tensor = batch
        for step in steps:
            tensor = step(tensor)
        logits.append(without_positions(tensor))
    return np.concatenate(logits)


def put_on_grid(tensor: NDArray[np.float32], spec: TensorSpec) -> NDArray[np.float32]:
    """Real values as the device input's codes carry them.

    onnxruntime rounds before it adds the zero point, the SDK after. Values that lie on the int8
    grid already come out the same either way.
    """
    return dequantize(quantize(tensor, spec.scale, spec.zero_point), spec.scale, spec.zero_point)
