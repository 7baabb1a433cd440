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
from metis.operators.hard_patterns import hard_pattern
from metis.operators.rules import is_channelwise

#: What was done, in words; None where the rewrite can't be done.
Rewriter = Callable[[Draft, onnx.NodeProto], str | None]


def _set(node: onnx.NodeProto, name: str, value: object) -> None:
    """Set an attribute; None takes it away."""
    others = [attribute for attribute in node.attribute if attribute.name != name]
    del node.attribute[:]
    node.attribute.extend(others)
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
    kernel = view.shape(1)[2:] if "Conv" in node.op_type else view.attribute("kernel_shape")
    sizes, auto = view.shape()[2:], view.attribute("auto_pad")
    strides = view.attribute("strides") or [1] * len(kernel)
    dilations = view.attribute("dilations") or [1] * len(kernel)
    begins, ends = [0] * len(kernel), [0] * len(kernel)
    if auto != "VALID":
        for axis, (size, k, step, d) in enumerate(
            zip(sizes, kernel, strides, dilations, strict=True)
        ):
            outputs = -(-size // step)
            total = max((outputs - 1) * step + (k - 1) * d + 1 - size, 0)
            small, large = total // 2, total - total // 2
            begins[axis], ends[axis] = (small, large) if auto == "SAME_UPPER" else (large, small)
    _set(node, "auto_pad", None)
    _set(node, "pads", begins + ends)
    return f"auto_pad {auto} -> pads {begins + ends}"


def _flatten(draft: Draft, node: onnx.NodeProto) -> str:
    shape = list(draft.view(node).out)
    flatten = helper.make_node("Flatten", node.input[:1], node.output, node.name, axis=1)
    draft.replace(node, flatten)
    return f"Reshape to {shape} -> Flatten"


def _front_axis(draft: Draft, node: onnx.NodeProto) -> str:
    view = draft.view(node)
    axis = view.attribute("axis")
    _set(node, "axis", axis + len(view.shape()))
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
    _set(node, "transA", None)
    if view.is_fixed(0):
        node.input[0] = draft.constant(f"{name}_transposed", draft.value(name).T.copy())
        return "transA -> a transposed constant"
    made = draft.free_name(f"{node.output[0]}_transposed")
    before = view.producer(0)
    if before is not None and before.proto.op_type == "Flatten":  # one Flatten instead of two
        name = before.proto.input[0]
    axis = 0 if view.shape()[1] == 1 else len(draft.graph.shape(name) or ())
    node.input[0] = made
    draft.replace(node, helper.make_node("Flatten", [name], [made], made, axis=axis), node)
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
        fused = helper.make_node("HardSwish", [x], node.output, node.name)
    else:
        fused = helper.make_node("HardSigmoid", [x], node.output, node.name, alpha=1 / 6, beta=0.5)
    draft.replace(node, fused)
    return f"Add, Clip, ..., {node.op_type} -> {fused.op_type}"


def _identity(draft: Draft, node: onnx.NodeProto) -> str | None:
    source, made = node.input[0], node.output[0]
    outputs = {value.name for value in draft.model.graph.output}
    if made in outputs:
        maker = next((known for known in draft.nodes if source in known.output), None)
        if maker is None or source in outputs:
            return None
        draft.read_instead(source, made)
        maker.output[list(maker.output).index(source)] = made
    else:
        draft.read_instead(made, source)
    draft.replace(node)
    return f"{node.op_type} removed"


def _operand_shape(draft: Draft, node: onnx.NodeProto) -> str | None:
    view = draft.view(node)
    for of, other in ((0, 1), (1, 0)):
        feature_map, partner = view.shape(of), view.shape(other)
        if len(feature_map) == 4 and view.is_fixed(other) and is_channelwise(partner, feature_map):
            name = node.input[other]
            value = draft.value(name)
            shaped = value.reshape(() if value.size == 1 else (1, -1, 1, 1))
            node.input[other] = draft.constant(f"{name}_shaped", shaped)
            return f"constant {list(partner)} -> {list(shaped.shape)}"
    return None


def _reshape_target(draft: Draft, node: onnx.NodeProto) -> str:
    shape, name = list(draft.view(node).out), node.input[1]
    _set(node, "allowzero", None)
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
    along = [int(a) % len(view.shape()) for a in (range(count) if axes is None else axes)]
    order = sorted(range(count), key=lambda number: along[number] == 1)
    source, slices = node.input[0], []
    for place, number in enumerate(order):
        last = place == count - 1
        made = node.output[0] if last else draft.free_name(f"{node.output[0]}_{along[number]}")
        step = 1 if steps is None else steps[number]
        values = [
            draft.constant(f"{made}_{word}", np.array([value], np.int64))
            for word, value in zip(
                ("starts", "ends", "axes", "steps"),
                (starts[number], ends[number], along[number], step),
                strict=True,
            )
        ]
        slices.append(helper.make_node("Slice", [source, *values], [made], made))
        source = made
    draft.replace(node, *slices)
    return f"one Slice for each of the axes {[along[number] for number in order]}"


def _storage_order(draft: Draft, node: onnx.NodeProto) -> str:
    _set(node, "storage_order", None)
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
