"""Cross-layer equalization: move scale between two layers so that both round with less error.

Exact for what is positively homogeneous between them: nothing, or a Relu.

Source:
    Nagel, van Baalen, Blankevoort, Welling 2019, section 4.1: the ranges of channel i before and
    after become equal with s_i = sqrt(r1_i * r2_i) / r2_i.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from onnx import numpy_helper

from metis.graph.edit import attributes_of, constants_of

if TYPE_CHECKING:
    from numpy.typing import NDArray


#: Times all pairs are gone through; a layer between two others belongs to two pairs.
_ROUNDS = 4


def equalized(student: onnx.ModelProto) -> tuple[onnx.ModelProto, int]:
    """A folded student that computes the same with weights of more equal range.

    Args:
        student: `Parts.student` of `metis.folding.prepare`.

    Returns:
        The student, and how many pairs of layers there were.
    """
    result = onnx.ModelProto()
    result.CopyFrom(student)
    weights: dict[str, NDArray[Any]] = dict(constants_of(student))
    pairs = list(_pairs(result, weights))
    for _ in range(_ROUNDS):
        for first, second in pairs:
            _balance(first, second, weights)
    for tensor in result.graph.initializer:
        if weights[tensor.name].dtype == np.float32:
            tensor.CopyFrom(numpy_helper.from_array(weights[tensor.name], tensor.name))
    return result, len(pairs)


def _pairs(
    model: onnx.ModelProto, weights: dict[str, NDArray[Any]]
) -> list[tuple[onnx.NodeProto, onnx.NodeProto]]:
    graph = model.graph
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    found = []
    for first in graph.node:
        if first.op_type != "Conv" or any(len(readers[n]) > 1 for n in first.input[1:] if n):
            continue
        after = readers.get(first.output[0], [])
        if len(after) == 1 and after[0].op_type == "Relu":
            after = readers.get(after[0].output[0], [])
        alone = (
            len(after) == 1 and after[0].op_type == "Conv" and len(readers[after[0].input[1]]) == 1
        )
        if alone and _is_simple(after[0], weights):
            found.append((first, after[0]))
    return found


def _is_simple(node: onnx.NodeProto, weights: dict[str, NDArray[Any]]) -> bool:
    """Not grouped, or depthwise without a multiplier: which weights read a channel is plain."""
    group = attributes_of(node).get("group", 1)
    return bool(group == 1 or weights[node.input[1]].shape[:2] == (group, 1))


def _balance(
    first: onnx.NodeProto, second: onnx.NodeProto, weights: dict[str, NDArray[Any]]
) -> None:
    before, after = weights[first.input[1]], weights[second.input[1]]
    depthwise = attributes_of(second).get("group", 1) > 1
    axes = (1, 2, 3) if depthwise else (0, 2, 3)
    r1, r2 = np.abs(before).max(axis=(1, 2, 3)), np.abs(after).max(axis=axes)
    live = (r1 > 0) & (r2 > 0)
    s = np.where(live, np.sqrt(r1 / np.where(live, r2, 1)), 1).clip(1e-3, 1e3).astype(np.float32)
    weights[first.input[1]] = before / s[:, None, None, None]
    if len(first.input) > 2 and first.input[2]:
        weights[first.input[2]] = weights[first.input[2]] / s
    shape = (-1, 1, 1, 1) if depthwise else (1, -1, 1, 1)
    weights[second.input[1]] = after * s.reshape(shape)
