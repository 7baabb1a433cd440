"""Cross-layer equalization: move scale between two layers so that both round with less error.

Exact for what is positively homogeneous between them: nothing, or a Relu.

Source:
    Nagel, van Baalen, Blankevoort, Welling 2019, section 4.1: the ranges of channel i before and
    after become equal with s_i = sqrt(r1_i * r2_i) / r2_i.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx

from metis.graph.connections import Connections
from metis.graph.edit import attributes_of, constants_of, copy_proto, set_array
from metis.quantize.folding import bias_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from metis.graph.edit import Array


#: Times all pairs are gone through; a layer between two others belongs to two pairs.
_ROUNDS = 4


def equalize(student: onnx.ModelProto) -> tuple[onnx.ModelProto, int]:
    """Write a folded student that computes the same with weights of more equal range.

    Args:
        student: `SplitGraph.student` of `metis.quantize.folding.prepare`.

    Returns:
        The student, and how many pairs of layers there were.
    """
    result = copy_proto(student)
    arrays = constants_of(student)
    pairs = list(_pairs(result.graph, arrays))
    for _ in range(_ROUNDS):
        for first, second in pairs:
            _balance(first, second, arrays)
    for tensor in result.graph.initializer:
        if arrays[tensor.name].dtype == np.float32:
            set_array(tensor, arrays[tensor.name])
    return result, len(pairs)


def _pairs(
    graph: onnx.GraphProto, arrays: dict[str, Array]
) -> Iterator[tuple[onnx.NodeProto, onnx.NodeProto]]:
    connections = Connections(graph.node, graph.output)
    for first in graph.node:
        second = connections.only_consumer(first.output[0])
        if second is not None and second.op_type == "Relu":
            second = connections.only_consumer(second.output[0])
        if second is None or not first.op_type == second.op_type == "Conv":
            continue
        weights = [name for name in (*first.input[1:], second.input[1]) if name]
        is_shared = any(len(connections.consumers(name)) > 1 for name in weights)
        if not is_shared and _is_simple(second, arrays):
            yield first, second


def _is_simple(node: onnx.NodeProto, arrays: dict[str, Array]) -> bool:
    """Not grouped, or depthwise without a multiplier: which weights read a channel is plain."""
    group = attributes_of(node).get("group", 1)
    return bool(group == 1 or arrays[node.input[1]].shape[:2] == (group, 1))


def _balance(first: onnx.NodeProto, second: onnx.NodeProto, arrays: dict[str, Array]) -> None:
    w1, w2 = arrays[first.input[1]], arrays[second.input[1]]
    depthwise = attributes_of(second).get("group", 1) > 1
    axes = (1, 2, 3) if depthwise else (0, 2, 3)
    r1, r2 = np.abs(w1).max(axis=(1, 2, 3)), np.abs(w2).max(axis=axes)
    live = (r1 > 0) & (r2 > 0)
    s = np.where(live, np.sqrt(r1 / np.where(live, r2, 1)), 1).clip(1e-3, 1e3).astype(np.float32)
    arrays[first.input[1]] = w1 / s[:, None, None, None]
    if (bias := bias_of(first, arrays)) is not None:
        arrays[first.input[2]] = bias / s
    shape = (-1, 1, 1, 1) if depthwise else (1, -1, 1, 1)
    arrays[second.input[1]] = w2 * s.reshape(shape)
