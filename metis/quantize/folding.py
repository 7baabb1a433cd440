"""A float student as the chip's quantizer sees it: what the host does cut off, BatchNorm folded.

Every change is exact, up to the order of float operations.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import onnx
import onnxruntime as ort
from onnx import helper, numpy_helper

from metis.backend import BackendError
from metis.graph.connections import Connections
from metis.graph.edit import attributes_of, constants_of, copy_proto, set_inputs, with_batch
from metis.graph.sessions import open_session
from metis.graph.view import constant_nodes
from metis.operators.report import check_model

if TYPE_CHECKING:
    from collections.abc import Mapping

    from metis.graph.edit import Array


#: Operators with weights: each becomes one int8 kernel.
COMPUTE = ("Conv", "ConvTranspose", "Gemm")


@dataclass(frozen=True)
class SplitGraph:
    """A student, cut where the compiler would cut it."""

    student: onnx.ModelProto  # the whole of it, folded, batch 1
    core: onnx.ModelProto  # for the chip, folded, with a free batch
    preamble: onnx.ModelProto | None = None  # float, on the host, before it
    postamble: onnx.ModelProto | None = None  # float, on the host, after it

    @property
    def host_operators(self) -> list[str]:
        """Kinds of the nodes that the host runs, in order."""
        ends = (self.preamble, self.postamble)
        return [node.op_type for part in ends if part is not None for node in part.graph.node]


def prepare(student: onnx.ModelProto) -> SplitGraph:
    """Cut a student at the edges that only the host can run; fold what is left for the chip.

    Args:
        student: float32, opset 14 to 17, batch 1, one input NCHW, one output.

    Raises:
        BackendError: an operator between the edges can't run on the chip, or an edge carries more
            than one tensor, or the batch is built into the graph.
    """
    folded = _fold(_lift_constants(student))
    free = [with_batch(part, "N") if part is not None else None for part in _cut_ends(folded)]
    core, preamble, postamble = free
    assert core is not None
    _check_same(student, folded, core)
    return SplitGraph(folded, core, preamble, postamble)


def _lift_constants(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy whose constants are all initializers."""
    result = copy_proto(model)
    for name, tensor in constant_nodes(model.graph.node):
        result.graph.initializer.append(tensor)
        result.graph.initializer[-1].name = name
    del result.graph.node[:]
    result.graph.node.extend(node for node in model.graph.node if node.op_type != "Constant")
    return result


def _cut_ends(
    model: onnx.ModelProto,
) -> tuple[onnx.ModelProto, onnx.ModelProto | None, onnx.ModelProto | None]:
    """Core, preamble and postamble."""
    report = check_model(model)
    for entry in report.fatal:
        raise BackendError(
            f"Metis can't run {entry.op_type} {entry.name}: {entry.reason}"
            + (f"; {entry.cure}" if entry.cure else "")
        )
    graph = model.graph
    sides: dict[bool, list[onnx.NodeProto]] = {False: [], True: []}
    for node, entry in zip(graph.node, report.nodes, strict=True):
        sides[entry.verdict == "host edge"].append(node)
    chip, host = sides[False], sides[True]
    if not host:
        return model, None, None
    produced = {name for node in chip for name in node.output}
    available = produced | {tensor.name for tensor in graph.initializer}
    inputs = {name for node in chip for name in node.input if name} - available
    outputs = produced & {graph.output[0].name, *(name for node in host for name in node.input)}
    if len(inputs) != 1 or len(outputs) != 1:
        raise BackendError(
            f"the chip's part of the student takes {', '.join(sorted(inputs)) or 'nothing'} and "
            f"gives {', '.join(sorted(outputs)) or 'nothing'}; it must take and give one tensor"
        )
    start, end = inputs.pop(), outputs.pop()
    extract = onnx.utils.Extractor(onnx.shape_inference.infer_shapes(model)).extract_model
    source, sink = graph.input[0].name, graph.output[0].name
    return (
        extract([start], [end]),
        extract([source], [start]) if start != source else None,
        extract([end], [sink]) if end != sink else None,
    )


def _fold(model: onnx.ModelProto) -> onnx.ModelProto:
    """BatchNorm into the convolution before it, else a convolution of its own; plain Gemms.

    The nodes of `model` are changed; its initializers stay as they are.
    """
    graph = model.graph
    constants = constants_of(model)
    connections = Connections(graph.node, graph.output)
    arrays: dict[str, Array] = {}
    nodes = []
    for node in graph.node:
        if node.op_type == "BatchNormalization":
            conv = connections.producer(node.input[0])
            is_fused = connections.only_consumer(node.input[0]) is not None
            factor, shift = _affine(node, constants)
            if conv is not None and conv.op_type == "Conv" and is_fused:
                _scale_conv(conv, factor, shift, constants, arrays)
                conv.output[0] = node.output[0]
            else:
                nodes.append(_as_conv(node, factor, shift, arrays))
            constants.update(arrays)
        else:
            if node.op_type == "Gemm":
                _make_gemm_plain(node, constants, arrays)
            nodes.append(node)
    names = {name for node in nodes for name in node.input}
    initializers = [t for t in graph.initializer if t.name in names and t.name not in arrays]
    initializers += [
        numpy_helper.from_array(np.ascontiguousarray(array, np.float32), name)
        for name, array in arrays.items()
    ]
    folded = helper.make_graph(nodes, graph.name, graph.input, graph.output, initializers)
    result = helper.make_model(folded, opset_imports=model.opset_import)
    result.ir_version = min(model.ir_version, 9)
    return result


def _check_same(student: onnx.ModelProto, folded: onnx.ModelProto, core: onnx.ModelProto) -> None:
    """Folding changes nothing, and two frames at once give what each gives alone."""
    frames = _random_frames(student)
    expected, logits = (_run(open_session(model), frames, 1) for model in (student, folded))
    if not _is_close(expected, logits):
        raise BackendError("folding BatchNorm changed what the student computes")
    message = "the student's graph has its batch size of 1 built in; export it anew"
    frames, session = _random_frames(core), open_session(core)
    single = _run(session, frames, 1)
    try:
        pair = _run(session, frames, len(frames))
    except Exception as error:  # onnxruntime's exceptions have no common class of their own
        raise BackendError(message) from error
    if not _is_close(single, pair):
        raise BackendError(message)


def _random_frames(model: onnx.ModelProto) -> Array:
    dims = model.graph.input[0].type.tensor_type.shape.dim[1:]
    frames = np.random.default_rng(0).normal(size=(2, *(dim.dim_value for dim in dims)))
    return frames.astype(np.float32)


def _run(session: ort.InferenceSession, frames: Array, batch_size: int) -> Array:
    name = session.get_inputs()[0].name
    batches = np.split(frames, len(frames) // batch_size)
    return np.concatenate([session.run(None, {name: batch})[0] for batch in batches])


def _is_close(expected: Array, actual: Array) -> bool:
    limit = 1e-4 * max(1, np.abs(expected).max())
    return expected.shape == actual.shape and bool(np.abs(expected - actual).max() <= limit)


def bias_of(node: onnx.NodeProto, constants: Mapping[str, Array]) -> Array | None:
    """The bias of a compute operator, where it has one."""
    return constants[node.input[2]] if len(node.input) > 2 and node.input[2] else None


def _affine(node: onnx.NodeProto, constants: dict[str, Array]) -> tuple[Array, Array]:
    gamma, beta, mean, variance = (constants[name].astype(np.float64) for name in node.input[1:5])
    factor = gamma / np.sqrt(variance + attributes_of(node).get("epsilon", 1e-5))
    return factor, beta - mean * factor


def _set_parameters(
    node: onnx.NodeProto, tensor: str, parameters: list[Array], arrays: dict[str, Array]
) -> None:
    """Give a node a weight, and a bias if there is one, under names of a tensor's."""
    names = [f"{tensor}/weight", f"{tensor}/bias"][: len(parameters)]
    arrays.update(zip(names, parameters, strict=True))
    set_inputs(node, [node.input[0], *names])


def _scale_conv(
    conv: onnx.NodeProto,
    factor: Array,
    shift: Array,
    constants: dict[str, Array],
    arrays: dict[str, Array],
) -> None:
    weight = constants[conv.input[1]].astype(np.float64)
    bias = bias_of(conv, constants)
    scaled = shift if bias is None else bias * factor + shift
    parameters = [weight * factor[:, None, None, None], scaled]
    _set_parameters(conv, conv.output[0], parameters, arrays)


def _as_conv(
    node: onnx.NodeProto, factor: Array, shift: Array, arrays: dict[str, Array]
) -> onnx.NodeProto:
    conv = helper.make_node("Conv", node.input[:1], node.output, name=node.name, group=len(factor))
    _set_parameters(conv, node.output[0], [factor[:, None, None, None], shift], arrays)
    return conv


def _make_gemm_plain(
    node: onnx.NodeProto, constants: dict[str, Array], arrays: dict[str, Array]
) -> None:
    """Set transB 1, alpha and beta 1: a row of the weight, a value of the bias per output."""
    attributes = attributes_of(node)
    alpha, beta = attributes.get("alpha", 1.0), attributes.get("beta", 1.0)
    transposed = attributes.get("transB", 0)
    flat = len(node.input) < 3 or constants[node.input[2]].ndim == 1
    if transposed and alpha == beta == 1 and flat:
        return
    weight = constants[node.input[1]].astype(np.float64) * alpha
    parameters = [weight if transposed else weight.T]
    if len(node.input) > 2:
        bias = constants[node.input[2]].astype(np.float64) * beta  # one value, or a row of them
        parameters.append(np.broadcast_to(bias.ravel(), len(parameters[0])))
    _set_parameters(node, node.output[0], parameters, arrays)
    del node.attribute[:]
    node.attribute.append(helper.make_attribute("transB", 1))
