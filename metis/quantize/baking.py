"""Weights put on their int8 grid inside the float graph."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from metis.graph.edit import attributes_of, constants_of, set_inputs
from metis.quantize.folding import bias_of
from metis.quantize.grids import channel_axis, on_grid, tensor_grid, weight_scales
from metis.quantize.observers import Observations
from metis.quantize.placement import compute_nodes, place

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from metis.quantize.folding import SplitGraph
    from metis.quantize.ranges import Ranges


def bake_weights(
    parts: SplitGraph,
    observations: Observations,
    ranges: Ranges,
    *,
    correct_bias: bool = True,
    clip_weights: bool = False,
) -> onnx.ModelProto:
    """The whole student, batch 1, that loses nothing more when its weights are rounded to int8.

    Weights lie on the grid of `weight_scales`; weights of dead channels are exactly 0. With
    `correct_bias`, every bias takes up the mean of what rounding changes: `sum(dW * E[x])` over the
    kernel, from the channel means of the layer's input.

    Args:
        parts: of `metis.quantize.folding.prepare`.
        observations: the pass over the calibration set, with the means of every layer's input.
        ranges: of its tensors, for the guard of the bias.
        correct_bias: move the biases.
        clip_weights: shrink a channel's range where that lowers the squared error of its weights.

    Source:
        Nagel, van Baalen, Blankevoort, Welling 2019, section 4.2 (bias correction).
    """
    result = _without_initializers(parts.student)
    constants = constants_of(parts.student)
    placement = place(parts.core)
    on_chip = {node.output[0] for node in compute_nodes(parts.core)}
    write = result.graph.initializer.append
    for node in compute_nodes(result):
        if node.output[0] not in on_chip:
            continue
        axis, output = channel_axis(node), node.output[0]
        weight = constants[node.input[1]]
        bias = bias_of(node, constants)
        source = tensor_grid(ranges.of(placement.root[node.input[0]])).scale
        clipped = _clip_weights(weight, axis) if clip_weights else weight
        scales = weight_scales(clipped, bias, source, axis)
        shape = [-1 if i == axis else 1 for i in range(weight.ndim)]
        rounded = on_grid(clipped, scales, axis).astype(np.float32) * scales.reshape(shape)
        names = [node.input[0], f"{output}/baked_w"]
        write(numpy_helper.from_array(rounded, names[1]))
        if correct_bias or bias is not None:
            names.append(f"{output}/baked_b")
            corrected = np.zeros(len(scales)) if bias is None else bias.astype(np.float64)
            if correct_bias:
                means = observations.means(node.input[0])
                corrected = corrected + _mean_shift(node, weight - rounded, means)
            write(numpy_helper.from_array(corrected.astype(np.float32), names[2]))
        set_inputs(node, names)
    used = {name for node in result.graph.node for name in node.input}
    result.graph.initializer.extend(t for t in parts.student.graph.initializer if t.name in used)
    return result


def _without_initializers(model: onnx.ModelProto) -> onnx.ModelProto:
    graph = model.graph
    bare = helper.make_graph(graph.node, graph.name, graph.input, graph.output)
    return helper.make_model(bare, opset_imports=model.opset_import, ir_version=model.ir_version)


def _mean_shift(
    node: onnx.NodeProto, dw: NDArray[np.float32], means: NDArray[np.float64]
) -> NDArray[Any]:
    """Mean per output channel that the missing part `dw` of the weights would have added."""
    shift: NDArray[Any]
    if node.op_type == "Gemm":
        shift = dw.astype(np.float64) @ means
        return shift
    taps = dw.astype(np.float64).sum(axis=(2, 3))
    if node.op_type == "ConvTranspose":  # weights are (in, out, kh, kw); the chip has no groups
        shift = means @ taps
        return shift
    group = attributes_of(node).get("group", 1)
    groups = taps.reshape(group, -1, taps.shape[1])
    shift = np.einsum("goi,gi->go", groups, means.reshape(group, -1)).ravel()
    return shift


def _clip_weights(weight: NDArray[np.float32], axis: int) -> NDArray[np.float32]:
    """Every output channel cut at the share of its largest weight that rounds with least error."""
    rows = np.moveaxis(weight, axis, 0).reshape(weight.shape[axis], -1)
    top = np.abs(rows).max(axis=1, keepdims=True)
    best, lowest = rows, np.full(len(rows), np.inf)
    for share in np.linspace(1.0, 0.5, 26):
        step = np.maximum(top * share / 127, np.finfo(np.float32).tiny)
        clipped = np.clip(rows, -top * share, top * share)
        error = np.square(np.rint(clipped / step) * step - rows).sum(axis=1)
        best = np.where((error < lowest)[:, None], clipped, best)
        lowest = np.minimum(error, lowest)
    shape = np.moveaxis(weight, axis, 0).shape
    result: NDArray[np.float32] = np.moveaxis(best.reshape(shape), 0, axis).astype(np.float32)
    return result
