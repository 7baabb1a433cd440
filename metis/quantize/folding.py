"""A float student as the chip's quantizer sees it: what the host does cut off, BatchNorm folded.

Every change is exact, up to the order of float operations.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnxruntime as ort
from onnx import helper, numpy_helper

from metis.backend import BackendError
from metis.graph.edit import attributes_of, constants_of, with_batch
from metis.graph.sessions import open_graph
from metis.graph.view import constant_nodes
from metis.operators.report import check_model

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]


#: Operators with weights: each becomes one int8 kernel.
COMPUTE = ("Conv", "ConvTranspose", "Gemm")


@dataclass(frozen=True)
class Parts:
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


def prepare(student: onnx.ModelProto) -> Parts:
    """Cut a student at the edges that only the host can run; fold what is left for the chip.

    Args:
        student: float32, opset 14 to 17, batch 1, one input NCHW, one output.

    Raises:
        BackendError: an operator between the edges can't run on the chip, or an edge carries more
            than one tensor, or the batch is built into the graph.
    """
    folded = _folded(_with_initializers(student))
    free = [with_batch(part, "N") if part is not None else None for part in _cut(folded)]
    core, preamble, postamble = free
    assert core is not None
    _check_same(student, folded, core)
    return Parts(folded, core, preamble, postamble)


def _with_initializers(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy whose constants are all initializers."""
    result = onnx.ModelProto()
    result.CopyFrom(model)
    for name, tensor in constant_nodes(result.graph.node):
        initializer = result.graph.initializer.add()
        initializer.CopyFrom(tensor)
        initializer.name = name
    kept = [node for node in result.graph.node if node.op_type != "Constant"]
    del result.graph.node[:]
    result.graph.node.extend(kept)
    return result


def _cut(
    model: onnx.ModelProto,
) -> tuple[onnx.ModelProto, onnx.ModelProto | None, onnx.ModelProto | None]:
    """Core, preamble and postamble."""
    report = check_model(model)
    for found in report.fatal:
        raise BackendError(
            f"Metis can't run {found.op_type} {found.name}: {found.reason}"
            + (f"; {found.cure}" if found.cure else "")
        )
    graph = model.graph
    on_host = [found.verdict == "host edge" for found in report.nodes]
    if not any(on_host):
        return model, None, None
    fixed = {tensor.name for tensor in graph.initializer}
    chip = [node for node, host in zip(graph.node, on_host, strict=True) if not host]
    made = {name for node in chip for name in node.output}
    enters = {n for node in chip for n in node.input if n and n not in made and n not in fixed}
    read = {n for node, host in zip(graph.node, on_host, strict=True) if host for n in node.input}
    leaves = {n for n in made if n in read or n == graph.output[0].name}
    if len(enters) != 1 or len(leaves) != 1:
        raise BackendError(
            f"the chip's part of the student takes {', '.join(sorted(enters)) or 'nothing'} and "
            f"gives {', '.join(sorted(leaves)) or 'nothing'}; it must take and give one tensor"
        )
    enter, leave = enters.pop(), leaves.pop()
    extract = onnx.utils.Extractor(onnx.shape_inference.infer_shapes(model)).extract_model
    source, sink = graph.input[0].name, graph.output[0].name
    return (
        extract([enter], [leave]),
        extract([source], [enter]) if enter != source else None,
        extract([leave], [sink]) if leave != sink else None,
    )


def _folded(model: onnx.ModelProto) -> onnx.ModelProto:
    """BatchNorm into the convolution before it, else a convolution of its own; Gemm made plain."""
    graph = model.graph
    constants = constants_of(model)
    makers = {name: node for node in graph.node for name in node.output}
    readers: dict[str, int] = {}
    for node in graph.node:
        for name in node.input:
            readers[name] = readers.get(name, 0) + 1
    new: dict[str, Array] = {}
    nodes = []
    for node in graph.node:
        if node.op_type == "BatchNormalization":
            before = makers.get(node.input[0])
            alone = readers[node.input[0]] == 1 and node.input[0] != graph.output[0].name
            factor, shift = _affine(node, constants)
            if before is not None and before.op_type == "Conv" and alone:
                _scale_conv(before, factor, shift, constants, new)
                before.output[0] = node.output[0]
            else:
                nodes.append(_as_conv(node, factor, shift, new))
            constants.update(new)
        else:
            if node.op_type == "Gemm":
                _plain_gemm(node, constants, new)
            nodes.append(node)
    kept = {name for node in nodes for name in node.input}
    initializers = [t for t in graph.initializer if t.name in kept and t.name not in new]
    initializers += [
        numpy_helper.from_array(np.ascontiguousarray(v, np.float32), n) for n, v in new.items()
    ]
    folded = helper.make_graph(nodes, graph.name, graph.input, graph.output, initializers)
    result = helper.make_model(folded, opset_imports=model.opset_import)
    result.ir_version = min(model.ir_version, 9)
    return result


def _check_same(student: onnx.ModelProto, folded: onnx.ModelProto, core: onnx.ModelProto) -> None:
    """Folding changes nothing, and two frames at once give what each gives alone."""
    frames = _random_frames(student)
    before, after = (_answers(open_graph(model), frames, 1) for model in (student, folded))
    if not _close(before, after):
        raise BackendError("folding BatchNorm changed what the student computes")
    built_in = "the student's graph has its batch size of 1 built in; export it anew"
    frames, session = _random_frames(core), open_graph(core)
    alone = _answers(session, frames, 1)
    try:
        together = _answers(session, frames, len(frames))
    except Exception as error:  # onnxruntime's exceptions have no common class of their own
        raise BackendError(built_in) from error
    if not _close(alone, together):
        raise BackendError(built_in)


def _random_frames(model: onnx.ModelProto) -> Array:
    dims = model.graph.input[0].type.tensor_type.shape.dim[1:]
    frames = np.random.default_rng(0).normal(size=(2, *(dim.dim_value for dim in dims)))
    return frames.astype(np.float32)


def _answers(session: ort.InferenceSession, frames: Array, batch: int) -> Array:
    name = session.get_inputs()[0].name
    batches = np.split(frames, len(frames) // batch)
    return np.concatenate([session.run(None, {name: fed})[0] for fed in batches])


def _close(one: Array, other: Array) -> bool:
    limit = 1e-4 * max(1, np.abs(one).max())
    return one.shape == other.shape and bool(np.abs(one - other).max() <= limit)


def _affine(node: onnx.NodeProto, constants: dict[str, Array]) -> tuple[Array, Array]:
    gamma, beta, mean, variance = (constants[name].astype(np.float64) for name in node.input[1:5])
    factor = gamma / np.sqrt(variance + attributes_of(node).get("epsilon", 1e-5))
    return factor, beta - mean * factor


def _scale_conv(
    conv: onnx.NodeProto,
    factor: Array,
    shift: Array,
    constants: dict[str, Array],
    new: dict[str, Array],
) -> None:
    weight = constants[conv.input[1]].astype(np.float64)
    bias = constants[conv.input[2]] if len(conv.input) > 2 and conv.input[2] else 0.0
    names = [conv.input[0], f"{conv.output[0]}/weight", f"{conv.output[0]}/bias"]
    new[names[1]] = weight * factor[:, None, None, None]
    new[names[2]] = bias * factor + shift
    del conv.input[:]
    conv.input.extend(names)


def _as_conv(
    node: onnx.NodeProto, factor: Array, shift: Array, new: dict[str, Array]
) -> onnx.NodeProto:
    names = f"{node.output[0]}/weight", f"{node.output[0]}/bias"
    new[names[0]], new[names[1]] = factor[:, None, None, None], shift
    return helper.make_node(
        "Conv", [node.input[0], *names], node.output, name=node.name, group=len(factor)
    )


def _plain_gemm(node: onnx.NodeProto, constants: dict[str, Array], new: dict[str, Array]) -> None:
    """Set transB 1, alpha and beta 1: a row of the weight, a value of the bias per output."""
    given = attributes_of(node)
    alpha, beta = given.get("alpha", 1.0), given.get("beta", 1.0)
    flat = len(node.input) < 3 or constants[node.input[2]].ndim == 1
    if given.get("transB", 0) and alpha == beta == 1 and flat:
        return
    weight = constants[node.input[1]].astype(np.float64) * alpha
    names = [node.input[0], f"{node.output[0]}/weight"]
    new[names[1]] = weight if given.get("transB", 0) else weight.T
    if len(node.input) > 2:
        names.append(f"{node.output[0]}/bias")
        bias = constants[node.input[2]].astype(np.float64) * beta  # one value, or a row of them
        new[names[2]] = np.broadcast_to(bias.ravel(), len(new[names[1]]))
    del node.input[:]
    node.input.extend(names)
    del node.attribute[:]
    node.attribute.append(helper.make_attribute("transB", 1))
