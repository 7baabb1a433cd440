"""Rewrites of an ONNX graph that leave what it computes as it is, one function for each name.

The names are those of `metis.operators.rules.REWRITES`: a finding of the chip's rules that names
one goes away when it is done. Whether a rewrite kept what the graph computes is for
`metis.operators.legalizer` to prove; nothing here is taken on trust.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
from onnx import helper, numpy_helper

from metis.operators.draft import Draft
from metis.operators.hard_activations import hard_pattern
from metis.operators.rules import is_channelwise, same_padding

#: The description of what was done; None where the rewrite can't be done.
Rewriter = Callable[[Draft, onnx.NodeProto], str | None]


def _set_attribute(node: onnx.NodeProto, name: str, value: object) -> None:
    """Set an attribute; None takes it away."""
    attributes = [attribute for attribute in node.attribute if attribute.name != name]
    del node.attribute[:]
    node.attribute.extend(attributes)
    if value is not None:
        node.attribute.append(helper.make_attribute(name, value))


def fix_batch(draft: Draft, name: str) -> str:
    """Fix the batch of a graph's input to 1, and the shapes of its outputs."""
    graph = draft.model.graph
    source = next(value for value in graph.input if value.name == name)
    source.type.tensor_type.shape.dim[0].dim_value = 1
    for value in graph.output:
        shape = draft.graph.shape(value.name)
        if shape is not None:
            value.type.tensor_type.ClearField("shape")
            for size in shape:
                dim = value.type.tensor_type.shape.dim.add()
                if size:
                    dim.dim_value = size
    return "the batch is 1"


def _fold(draft: Draft, node: onnx.NodeProto) -> str:
    for name in filter(None, node.output):
        tensor = numpy_helper.from_array(np.asarray(draft.value(name)), name)
        draft.model.graph.initializer.append(tensor)
    draft.replace(node)
    return f"{node.op_type} computed beforehand"


def _clip_bounds(draft: Draft, node: onnx.NodeProto) -> str:
    for number in (1, 2):
        if draft.view(node).has(number):
            name = node.input[number]
            node.input[number] = draft.constant(f"{name}_bound", draft.value(name))
    return "its bounds computed beforehand"


def _explicit_pads(draft: Draft, node: onnx.NodeProto) -> str:
    """The pads that auto_pad means, by the operators' definition in ONNX."""
    view = draft.view(node)
    mode, totals = view.attribute("auto_pad"), [max(total, 0) for total in same_padding(view)]
    small = [0 if mode == "VALID" else total // 2 for total in totals]
    large = [0 if mode == "VALID" else total - total // 2 for total in totals]
    pads = small + large if mode == "SAME_UPPER" else large + small
    _set_attribute(node, "auto_pad", None)
    _set_attribute(node, "pads", pads)
    return f"auto_pad {mode} -> pads {pads}"


def _flatten(draft: Draft, node: onnx.NodeProto) -> str:
    shape = list(draft.view(node).out)
    flatten = helper.make_node("Flatten", node.input[:1], node.output, node.name, axis=1)
    draft.replace(node, flatten)
    return f"Reshape to {shape} -> Flatten"


def _front_axis(draft: Draft, node: onnx.NodeProto) -> str:
    view = draft.view(node)
    axis = view.attribute("axis")
    _set_attribute(node, "axis", axis + len(view.shape()))
    return f"axis {axis} -> {axis + len(view.shape())}"


def _gemm(draft: Draft, node: onnx.NodeProto) -> str:
    """A MatMul, or an Add that follows one, in which case the MatMul may have no more readers."""
    operands = list(node.input)
    if node.op_type == "Add":
        producers = [draft.graph.producer(name) for name in node.input]
        term = next(n for n in (0, 1) if (m := producers[n]) is not None and m.op_type == "MatMul")
        matmul = producers[term]
        assert matmul is not None
        operands = [*matmul.input, node.input[1 - term]]
    draft.replace(node, helper.make_node("Gemm", operands, node.output, node.name))
    return "MatMul and Add -> Gemm" if len(operands) == 3 else "MatMul -> Gemm"


def _gemm_transpose(draft: Draft, node: onnx.NodeProto) -> str:
    """A fixed operand is transposed now; a row becomes a column, or back, in a Flatten."""
    view, name = draft.view(node), node.input[0]
    _set_attribute(node, "transA", None)
    if view.is_fixed(0):
        node.input[0] = draft.constant(f"{name}_transposed", draft.value(name).T.copy())
        return "transA -> a transposed constant"
    result = draft.free_name(f"{node.output[0]}_transposed")
    producer = view.producer(0)
    if producer is not None and producer.proto.op_type == "Flatten":  # one Flatten instead of two
        name = producer.proto.input[0]
    axis = 0 if view.shape()[1] == 1 else len(draft.graph.shape(name) or ())
    node.input[0] = result
    draft.replace(node, helper.make_node("Flatten", [name], [result], result, axis=axis), node)
    return "transA -> Flatten"


def _global_pool(draft: Draft, node: onnx.NodeProto) -> str:
    name = node.output[0]
    if draft.view(node).attribute("keepdims", 1):
        pool = helper.make_node("GlobalAveragePool", node.input[:1], [name], node.name)
        draft.replace(node, pool)
        return "ReduceMean -> GlobalAveragePool"
    pooled = draft.free_name(f"{name}_pooled")
    pool = helper.make_node("GlobalAveragePool", node.input[:1], [pooled], node.name)
    flatten = helper.make_node("Flatten", [pooled], [name], f"{pooled}_flatten", axis=1)
    draft.replace(node, pool, flatten)
    return "ReduceMean -> GlobalAveragePool, Flatten"


def _hard(draft: Draft, node: onnx.NodeProto) -> str | None:
    pattern = hard_pattern(draft.view(node))
    if pattern is None:
        return None
    name, x = pattern
    if name == "hard swish":
        activation = helper.make_node("HardSwish", [x], node.output, node.name)
    else:
        activation = helper.make_node("HardSigmoid", [x], node.output, node.name)
        _set_attribute(activation, "alpha", 1 / 6)
        _set_attribute(activation, "beta", 0.5)
    draft.replace(node, activation)
    return f"Add, Clip, ..., {node.op_type} -> {activation.op_type}"


def _identity(draft: Draft, node: onnx.NodeProto) -> str | None:
    source, result = node.input[0], node.output[0]
    outputs = {value.name for value in draft.model.graph.output}
    if result in outputs:
        producer = next((maker for maker in draft.nodes if source in maker.output), None)
        if producer is None or source in outputs:
            return None
        draft.read_instead(source, result)
        producer.output[list(producer.output).index(source)] = result
    else:
        draft.read_instead(result, source)
    draft.replace(node)
    return f"{node.op_type} removed"


def _operand_shape(draft: Draft, node: onnx.NodeProto) -> str | None:
    view = draft.view(node)
    for number, operand in ((0, 1), (1, 0)):
        feature_map, partner = view.shape(number), view.shape(operand)
        is_map = len(feature_map) == 4
        if is_map and view.is_fixed(operand) and is_channelwise(partner, feature_map):
            name = node.input[operand]
            value = draft.value(name)
            shaped = value.reshape(() if value.size == 1 else (1, -1, 1, 1))
            node.input[operand] = draft.constant(f"{name}_shaped", shaped)
            return f"constant {list(partner)} -> {list(shaped.shape)}"
    return None


def _reshape_target(draft: Draft, node: onnx.NodeProto) -> str:
    shape, name = list(draft.view(node).out), node.input[1]
    _set_attribute(node, "allowzero", None)
    node.input[1] = draft.constant(f"{name}_written", np.array(shape, np.int64))
    return f"the target is {shape}"


def _resize_roi(draft: Draft, node: onnx.NodeProto) -> str:
    node.input[1] = ""
    return "roi dropped"


def _slice_per_axis(draft: Draft, node: onnx.NodeProto) -> str:
    """Channels last: slices along height and width need many of them."""
    view = draft.view(node)
    starts, ends, axes, steps = (view.value(number) for number in (1, 2, 3, 4))
    count = len(starts)
    rank = len(view.shape())
    slice_axes = [int(axis) % rank for axis in (range(count) if axes is None else axes)]
    order = sorted(range(count), key=lambda number: slice_axes[number] == 1)
    source, slices = node.input[0], []
    for place, number in enumerate(order):
        is_last = place == count - 1
        near = f"{node.output[0]}_{slice_axes[number]}"
        result = node.output[0] if is_last else draft.free_name(near)
        step = 1 if steps is None else steps[number]
        values = [
            draft.constant(f"{result}_{word}", np.array([value], np.int64))
            for word, value in zip(
                ("starts", "ends", "axes", "steps"),
                (starts[number], ends[number], slice_axes[number], step),
                strict=True,
            )
        ]
        slices.append(helper.make_node("Slice", [source, *values], [result], result))
        source = result
    draft.replace(node, *slices)
    return f"one Slice for each of the axes {[slice_axes[number] for number in order]}"


def _storage_order(draft: Draft, node: onnx.NodeProto) -> str:
    _set_attribute(node, "storage_order", None)
    del node.output[1:]
    return "storage_order 1 -> 0"


#: In the order in which they are tried.
REWRITERS: dict[str, Rewriter] = {
    "clip bounds": _clip_bounds,  # before constants: what computed the bounds goes unread
    "constants": _fold,
    "identity": _identity,
    "explicit pads": _explicit_pads,
    "flatten": _flatten,
    "front axis": _front_axis,
    "gemm": _gemm,
    "gemm transpose": _gemm_transpose,
    "global pool": _global_pool,
    "hard sigmoid": _hard,
    "hard swish": _hard,
    "operand shape": _operand_shape,
    "reshape target": _reshape_target,
    "resize roi": _resize_roi,
    "slice per axis": _slice_per_axis,
    "storage order": _storage_order,
}
