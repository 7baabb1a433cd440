"""Which nodes of an ONNX graph a Metis chip can run: every published rule as a predicate.

Source:
    Voyager SDK, docs/reference/compiler/onnx-opset17-support.md (after release 1.6.1), whose rules
    are said to be the same for opsets 14 to 17. They are written for NCHW, static shapes, batch 1.
    An operator that is not listed runs on the host, which is possible at the edges of a graph only
    (our inference). A listed operator that broke its rule was seen to abort the compiler (a Conv
    with auto_pad), so it is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import product
from math import prod
from typing import Any, Literal

import numpy as np
import onnx
from onnx import numpy_helper

Verdict = Literal["chip", "host edge", "refused"]
Shape = tuple[int, ...]  # 0 for a dimension that is not fixed

OPSETS = range(14, 18)

#: Effective taps of a grouped or depthwise convolution must be fewer.
_MAX_GROUPED_TAPS = 128

#: Pads along channels, and channels of maps whose height or width is sliced, come in this many.
_CHANNEL_WORD = 64

#: Parameters of activations are compared as loosely as the vendor does.
_TOLERANCE = 5e-6

#: Constants of up to this many elements can be shapes, axes, pads: shape inference reads them.
_SMALL = 1024

#: Changes of a graph that leave what it computes as it is, up to the order of float operations.
REWRITES = {
    "batch to 1": "fix the batch to 1",
    "clip bounds": "fold the bounds into constants",
    "constants": "fold the constants",
    "explicit pads": "write explicit pads",
    "flatten": "a Flatten does the same",
    "front axis": "count the axis from the front",
    "gemm": "a Gemm computes the same",
    "gemm transpose": "transpose the first operand beforehand",
    "global pool": "a GlobalAveragePool computes the same",
    "hard sigmoid": "a HardSigmoid computes the same",
    "hard swish": "a HardSwish computes the same",
    "identity": "remove it",
    "operand shape": "reshape the constant to [1, C, 1, 1] or a scalar",
    "resize roi": "drop the empty roi",
    "slice per axis": "one Slice per axis",
    "storage order": "nobody reads the indices: set storage_order to 0",
}


@dataclass(frozen=True)
class NodeReport:
    """What becomes of one node, or what is wrong with the graph as a whole."""

    name: str
    op_type: str  # "graph" for the graph as a whole
    shape: Shape  # of its first output
    macs: int
    verdict: Verdict
    rule: str = ""  # as the vendor's page has it, in few words
    reason: str = ""  # how it breaks the rule, why it is on the host, or what is uncertain
    cure: str = ""
    rewrites: tuple[str, ...] = ()  # names in REWRITES that cure it completely
    curable: bool = False  # it is refused, and `rewrites` make it pass

    def line(self) -> str:
        """One line of a terminal table."""
        shape = "x".join(str(size) if size else "?" for size in self.shape)
        words = "; ".join(part for part in (self.reason, self.cure) if part)
        return (
            f"{self.verdict:<9} {self.op_type:<20} {shape:<16} {self.macs / 1e6:>9.2f}  {self.name}"
            + (f": {words}" if words else "")
        )


@dataclass(frozen=True)
class OperatorReport:
    """What becomes of a whole graph."""

    nodes: tuple[NodeReport, ...]
    graph: tuple[NodeReport, ...]  # what is wrong with the graph as a whole

    @property
    def refused(self) -> list[NodeReport]:
        """What keeps the graph from the chip."""
        return [*self.graph, *(node for node in self.nodes if node.verdict == "refused")]

    @property
    def fatal(self) -> list[NodeReport]:
        """What of it no exact rewrite cures."""
        return [node for node in self.refused if not node.curable]

    @property
    def doubtful(self) -> list[NodeReport]:
        """Nodes for the chip by the rule as printed, about which there is more to say."""
        return [node for node in self.nodes if node.verdict == "chip" and node.reason]

    @property
    def macs(self) -> int:
        """Multiply-accumulates of one inference."""
        return sum(node.macs for node in self.nodes)

    @property
    def share_on_chip(self) -> float:
        """Share of the multiply-accumulates that the chip does, 0..1."""
        on_chip = sum(node.macs for node in self.nodes if node.verdict == "chip")
        return on_chip / self.macs if self.macs else 0.0

    def lines(self) -> Iterator[str]:
        """A table for a terminal: one node per line, then what they sum up to."""
        yield f"{'verdict':<9} {'operator':<20} {'output':<16} {'M MACs':>9}  node"
        for node in (*self.nodes, *self.graph):
            yield node.line()
        found = [node.verdict for node in self.nodes]
        yield (
            f"{found.count('chip')} nodes on the chip, {found.count('host edge')} on the host, "
            f"{len(self.refused)} refused ({len(self.refused) - len(self.fatal)} of them curable); "
            f"{self.macs / 1e6:.1f} M MACs, {100 * self.share_on_chip:.1f} % on the chip"
        )


def check_model(model: onnx.ModelProto) -> OperatorReport:
    """Judge every node of a model, and the model as a whole, by the published rules.

    A batch that is not fixed is taken as 1, and reported.
    """
    graph = _Graph(model)
    nodes = tuple(_report(_Node(graph, proto)) for proto in graph.nodes)
    return OperatorReport(nodes, tuple(_whole(model, graph, nodes)))


def count_macs(model: onnx.ModelProto) -> int:
    """Multiply-accumulates of one inference: convolutions and matrix products."""
    graph = _Graph(model)
    return sum(_macs(_Node(graph, proto)) for proto in graph.nodes)


class _UnknownShapeError(Exception):
    """A rule needs a shape that the graph does not fix."""


class _Graph:
    """Shapes, constants and neighbours of a model, by the names of its tensors."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.free_batch = _free_batch(model.graph)
        outline = _outline(model)
        if self.free_batch:
            _fix_batch(outline.graph, self.free_batch)
        inferred = onnx.shape_inference.infer_shapes(outline, data_prop=True).graph
        self.nodes = [node for node in inferred.node if node.op_type != "Constant"]
        self._constants = {tensor.name: tensor for tensor in model.graph.initializer}
        self._constants.update(_constant_nodes(inferred.node))
        self.inputs = [v for v in inferred.input if v.name not in self._constants]
        self.outputs = {value.name for value in inferred.output}
        self._shapes = {name: tuple(t.dims) for name, t in self._constants.items()}
        for value in (*self.inputs, *inferred.value_info, *inferred.output):
            if value.type.tensor_type.HasField("shape"):
                self._shapes[value.name] = _dims(value)
        self.maker = {name: node for node in self.nodes for name in node.output if name}
        self._readers: dict[str, list[onnx.NodeProto]] = {}
        for node in self.nodes:
            for name in set(node.input) - {""}:  # an optional one that is left out
                self._readers.setdefault(name, []).append(node)
        self._fixed = self._fixed_tensors()
        # Tensors that only the host touches: before the chip's part of the graph, and after it.
        self._before = self._host_tensors(forward=True)
        self._after = self._host_tensors(forward=False)

    def shape(self, name: str) -> Shape | None:
        """With 0 for what is not fixed; () for a scalar, None for an unknown one."""
        return self._shapes.get(name)

    def constant(self, name: str) -> Any:  # noqa: ANN401 - an array, or None
        """The value of an initializer or of a Constant."""
        return numpy_helper.to_array(self._constants[name]) if name in self._constants else None

    def is_fixed(self, name: str) -> bool:
        """Whether a tensor is a constant, or is computed from nothing else."""
        return name in self._fixed

    def readers(self, name: str) -> list[onnx.NodeProto]:
        return self._readers.get(name, [])

    def on_host(self, node: onnx.NodeProto) -> bool:
        """Whether an operator that is not listed is at one of the graph's edges."""
        made = node.output[0]
        return made not in self._fixed and (made in self._before or made in self._after)

    def _fixed_tensors(self) -> set[str]:
        fixed = set(self._constants)
        for node in self.nodes:
            if any(a.type == onnx.AttributeProto.GRAPH for a in node.attribute):
                continue  # a branch or a loop reads more than its inputs
            known = node.op_type == "Shape" and all(self.shape(node.input[0]) or (0,))
            if known or (node.input and all(name in fixed for name in node.input if name)):
                fixed.update(node.output)
        return fixed

    def _host_tensors(self, *, forward: bool) -> set[str]:
        found: set[str] = set()
        ours = {value.name for value in self.inputs}
        for node in self.nodes if forward else reversed(self.nodes):
            if _is_listed(node):
                continue
            if forward:
                alone = all(n in found or n in ours or n in self._fixed for n in node.input if n)
            else:
                alone = all(r.output[0] in found for n in node.output for r in self.readers(n))
            if alone:
                found.update(node.output)
        return found


def _dims(value: onnx.ValueInfoProto) -> Shape:
    return tuple(dim.dim_value for dim in value.type.tensor_type.shape.dim)


def _free_batch(graph: onnx.GraphProto) -> set[str]:
    """Inputs of which only the first dimension is free."""
    constants = {tensor.name for tensor in graph.initializer}
    shapes = {value.name: _dims(value) for value in graph.input if value.name not in constants}
    return {name for name, shape in shapes.items() if shape and not shape[0] and all(shape[1:])}


def _fix_batch(graph: onnx.GraphProto, inputs: set[str]) -> None:
    for value in graph.input:
        if value.name in inputs:
            value.type.tensor_type.shape.dim[0].dim_value = 1
    del graph.value_info[:]
    for value in graph.output:
        value.type.tensor_type.ClearField("shape")


def _outline(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy without the weights: shape inference would copy them twice more."""
    outline = onnx.ModelProto(ir_version=model.ir_version)
    outline.opset_import.extend(model.opset_import)
    outline.functions.extend(model.functions)
    graph = model.graph
    outline.graph.name = graph.name
    for field in ("node", "input", "output", "value_info"):
        getattr(outline.graph, field).extend(getattr(graph, field))
    for tensor in graph.initializer:
        if prod(tensor.dims) <= _SMALL:
            outline.graph.initializer.append(tensor)
        else:
            outline.graph.initializer.add(
                name=tensor.name, data_type=tensor.data_type, dims=tensor.dims
            )
    return outline


def _constant_nodes(nodes: Iterable[onnx.NodeProto]) -> Iterator[tuple[str, onnx.TensorProto]]:
    for node in nodes:
        if node.op_type == "Constant":
            value, form = node.attribute[0], node.attribute[0].name
            if form == "value":
                yield node.output[0], value.t
            elif form.startswith(("value_float", "value_int")):
                kind = np.float32 if "float" in form else np.int64
                array = np.asarray(onnx.helper.get_attribute_value(value), kind)
                yield node.output[0], numpy_helper.from_array(array)


class _Node:
    """One node, with what the rules ask of it."""

    def __init__(self, graph: _Graph, proto: onnx.NodeProto) -> None:
        self.graph = graph
        self.proto = proto
        self._attributes = {a.name: onnx.helper.get_attribute_value(a) for a in proto.attribute}

    def attribute(self, name: str, default: Any = None) -> Any:  # noqa: ANN401 - of any kind
        value = self._attributes.get(name, default)
        return value.decode() if isinstance(value, bytes) else value

    def has(self, number: int) -> bool:
        """Whether an optional input is there."""
        return number < len(self.proto.input) and bool(self.proto.input[number])

    def shape(self, number: int = 0) -> Shape:
        return self._static(self.proto.input[number])

    @property
    def out(self) -> Shape:
        return self._static(self.proto.output[0])

    def _static(self, name: str) -> Shape:
        shape = self.graph.shape(name)
        if shape is None or not all(shape):
            raise _UnknownShapeError(f"the shape of {name} is not fixed")
        return shape

    def value(self, number: int) -> Any:  # noqa: ANN401 - an array, or None
        """The value of a constant input."""
        return self.graph.constant(self.proto.input[number]) if self.has(number) else None

    def scalar(self, number: int) -> float | None:
        """The value of a constant input of one element."""
        value = self.value(number)
        return float(value.item()) if value is not None and value.size == 1 else None

    def is_fixed(self, number: int) -> bool:
        return self.has(number) and self.graph.is_fixed(self.proto.input[number])

    def maker(self, number: int) -> _Node | None:
        """The node that computes an input."""
        proto = self.graph.maker.get(self.proto.input[number]) if self.has(number) else None
        return _Node(self.graph, proto) if proto is not None else None


@dataclass(frozen=True)
class _Finding:
    """What a rule has to say about a node."""

    reason: str
    cure: str = ""
    rewrite: str = ""  # a name in REWRITES; it makes this finding go away
    doubt: bool = False  # by the rule as printed the node passes


_Findings = Iterator[_Finding]
_Check = Callable[[_Node], _Findings]

#: Operator -> its rule in words, and as a predicate; without one any configuration runs.
_RULES: dict[str, tuple[str, _Check | None]] = {}

_ANY = "any configuration"
for _name in (
    "BatchNormalization",
    "GlobalAveragePool",
    "GlobalMaxPool",
    "HardSwish",
    "LeakyRelu",
    "Relu",
    "Sigmoid",
    "Tanh",
):
    _RULES[_name] = (_ANY, None)


def _rule(op_type: str, words: str) -> Callable[[_Check], _Check]:
    def register(check: _Check) -> _Check:
        _RULES[op_type] = (words, check)
        return check

    return register


def _auto_pad(node: _Node) -> _Findings:
    if node.attribute("auto_pad", "NOTSET") != "NOTSET":
        yield _Finding("auto_pad must be NOTSET", rewrite="explicit pads")


def _same_pads(node: _Node, kernel: list[int]) -> bool:
    """Whether auto_pad SAME_UPPER or SAME_LOWER pads at all."""
    sizes, strides = node.shape()[2:], node.attribute("strides") or [1] * len(kernel)
    steps = zip(sizes, kernel, strides, strict=True)
    return any((-(-size // stride) - 1) * stride + k > size for size, k, stride in steps)


@_rule(
    "AveragePool",
    "auto_pad NOTSET; four pads, if symmetric at most half the kernel; count_include_pad 1 with "
    "any padding",
)
def _average_pool(node: _Node) -> _Findings:
    yield from _auto_pad(node)
    kernel, pads = node.attribute("kernel_shape"), node.attribute("pads")
    padded = any(pads or ())
    if node.attribute("auto_pad", "").startswith("SAME"):
        padded = _same_pads(node, kernel)
    if pads and len(pads) != 4:
        yield _Finding("pads must be four numbers")
    elif pads and pads[:2] == pads[2:] and (2 * pads[0] > kernel[0] or 2 * pads[1] > kernel[1]):
        yield _Finding("symmetric pads must be at most half the kernel")
    if padded and node.attribute("count_include_pad", 0) != 1:
        yield _Finding("with padding, count_include_pad must be 1", "use count_include_pad=True")
    if node.attribute("ceil_mode", 0):
        yield _Finding(
            "the rule is silent on ceil_mode, and the vendor's zoo switches it off",
            "use ceil_mode=False where height and width divide evenly",
            doubt=True,
        )


@_rule("Clip", "min 0 and max 6, or min -1 and max 1")
def _clip(node: _Node) -> _Findings:
    bounds = [node.value(number) for number in (1, 2)]
    if any(node.has(n) and bounds[n - 1] is None for n in (1, 2)):
        if all(node.is_fixed(n) for n in (1, 2)):
            yield _Finding("min and max must be constants", rewrite="clip bounds")
        else:
            yield _Finding("min and max must be constants", "use ReLU6 or Hardtanh")
    elif (node.scalar(1), node.scalar(2)) not in ((0.0, 6.0), (-1.0, 1.0)):
        yield _Finding("only Clip(0, 6) and Clip(-1, 1)", "use ReLU6 or Hardtanh")
    elif _shifted_by_3(node) is not None:
        yield _Finding(
            "a hand-written HardSigmoid or HardSwish aborted on the chip before SDK 1.8",
            "use torch's Hardsigmoid or Hardswish",
            doubt=True,
        )


@_rule("Concat", "inputs of rank 4; along channels, height or width")
def _concat(node: _Node) -> _Findings:
    if any(len(node.shape(number)) != 4 for number in range(len(node.proto.input))):
        yield _Finding("an input is not of rank 4")
    if node.attribute("axis") not in (-3, -2, -1, 1, 2, 3):
        yield _Finding("the axis is not channels, height or width")


@_rule(
    "Conv",
    "auto_pad NOTSET; grouped: square kernel, dilations and strides, and fewer than "
    f"{_MAX_GROUPED_TAPS} effective taps",
)
def _conv(node: _Node) -> _Findings:
    yield from _auto_pad(node)
    if node.attribute("group", 1) == 1:
        return
    kernel = node.shape(1)[2:]
    if len(kernel) != 2:
        yield _Finding("grouped: only in two dimensions")
        return
    dilations = node.attribute("dilations") or [1, 1]
    strides = node.attribute("strides") or [1, 1]
    if any(pair[0] != pair[1] for pair in (kernel, dilations, strides)):
        shape = "x".join(map(str, kernel))
        yield _Finding(f"grouped: kernel {shape}, dilations {dilations}, strides {strides}")
    taps = prod((k - 1) * d + 1 for k, d in zip(kernel, dilations, strict=True))
    if taps >= _MAX_GROUPED_TAPS:
        yield _Finding(f"grouped: {taps} effective taps", "an effective kernel of side 11 or less")


@_rule("ConvTranspose", "auto_pad NOTSET; not grouped; equal pads at both ends; no output_shape")
def _conv_transpose(node: _Node) -> _Findings:
    if node.attribute("auto_pad", "NOTSET") == "VALID":
        yield from _auto_pad(node)
    elif node.attribute("auto_pad", "NOTSET") != "NOTSET":
        yield _Finding("auto_pad must be NOTSET", "export with explicit, symmetric pads")
    if node.attribute("group", 1) != 1:
        yield _Finding("it is grouped")
    pads = node.attribute("pads") or []
    if pads[: len(pads) // 2] != pads[len(pads) // 2 :]:
        yield _Finding("pads differ at the two ends")
    if node.attribute("output_shape") is not None:
        yield _Finding("output_shape is given", "give pads instead")


def _in_its_place(node: _Node) -> bool:
    """Whether a Gemm, or nothing on the chip, reads it."""
    readers = node.graph.readers(node.proto.output[0])
    return all(
        reader.op_type == "Gemm"
        or node.graph.on_host(reader)
        or (reader.op_type in ("Identity", "Dropout") and _in_its_place(_Node(node.graph, reader)))
        for reader in readers
    )


@_rule("Flatten", "in particular places such as before a Gemm or at the end; axis 0 or more")
def _flatten(node: _Node) -> _Findings:
    if node.attribute("axis", 1) < 0:
        yield _Finding("the axis is negative", rewrite="front axis")
    if not _in_its_place(node):
        yield _Finding("neither before a Gemm nor at the end")


@_rule("Gemm", "transA 0")
def _gemm(node: _Node) -> _Findings:
    if node.attribute("transA", 0):
        yield _Finding("transA is 1", rewrite="gemm transpose")


@_rule("HardSigmoid", "alpha 1/6, beta 0.5")
def _hard_sigmoid(node: _Node) -> _Findings:
    alpha, beta = node.attribute("alpha", 0.2), node.attribute("beta", 0.5)
    if abs(alpha - 0.166667) >= _TOLERANCE or abs(beta - 0.5) >= _TOLERANCE:
        yield _Finding(f"alpha {alpha:g}, beta {beta:g}", "use torch's Hardsigmoid")


@_rule("MaxPool", "auto_pad NOTSET; storage_order 0")
def _max_pool(node: _Node) -> _Findings:
    yield from _auto_pad(node)
    if node.attribute("storage_order", 0):
        indices = node.proto.output[1] if len(node.proto.output) > 1 else ""
        unread = not node.graph.readers(indices) and indices not in node.graph.outputs
        yield _Finding("storage_order is 1", rewrite="storage order" if unread else "")


def _is_channelwise(other: Shape, of: Shape) -> bool:
    """Whether `other` broadcasts over the map `of` as a scalar or as [1, C, 1, 1]."""
    padded = (1,) * (4 - len(other)) + other
    return padded in ((1, 1, 1, 1), (1, of[1], 1, 1))


def _with_map(node: _Node, *, scalar_on_one_channel: bool) -> _Findings:
    """The rule of Add, Mul and Sub for a map of rank 4 and a smaller partner."""
    shapes = (node.shape(0), node.shape(1))
    cure = ""
    for one, other in ((0, 1), (1, 0)):
        of, partner = shapes[one], shapes[other]
        if len(of) != 4:
            continue
        if partner == () and (scalar_on_one_channel or of[1] != 1):
            return
        if partner == ():
            # As printed the shape is compared with the number 0, which never holds.
            yield _Finding("the printed rule for a scalar on one channel is garbled", doubt=True)
            return
        if of[1] != 1 and partner == (1, of[1], 1, 1):
            return
        if node.is_fixed(other) and _is_channelwise(partner, of):
            cure = "operand shape"
    yield _Finding(f"the shapes are {list(shapes[0])} and {list(shapes[1])}", rewrite=cure)


def _two_activations(node: _Node) -> bool:
    return node.shape(0) == node.shape(1) and not node.is_fixed(0) and not node.is_fixed(1)


@_rule("Add", "two activations of one shape; or rank 4 with a scalar or a [1, C, 1, 1]")
def _add(node: _Node) -> _Findings:
    if _two_activations(node):
        return
    for term, bias in ((0, 1), (1, 0)):
        maker = node.maker(term)
        matmul = maker if maker is not None and maker.proto.op_type == "MatMul" else None
        if matmul and node.is_fixed(bias) and len(node.shape(bias)) < 3 and _as_gemm(matmul):
            yield _Finding("it adds to a MatMul", rewrite="gemm")
            return
    yield from _with_map(node, scalar_on_one_channel=False)


@_rule("Mul", "two activations of one shape, not the same; or rank 4 with a scalar or [1, C, 1, 1]")
def _mul(node: _Node) -> _Findings:
    if node.proto.input[0] == node.proto.input[1]:
        yield _Finding("both operands are the same tensor")
    elif not _two_activations(node):
        yield from _with_map(node, scalar_on_one_channel=True)


@_rule("Sub", "rank 4 with a scalar or a [1, C, 1, 1]; not two activations of one shape")
def _sub(node: _Node) -> _Findings:
    yield from _with_map(node, scalar_on_one_channel=True)


@_rule("PRelu", "a slope of one element, or of one per channel")
def _prelu(node: _Node) -> _Findings:
    slope = [size for size in node.shape(1) if size != 1]
    if slope and slope != [node.shape(0)[1]]:
        yield _Finding(f"the slope has shape {list(node.shape(1))}")


@_rule(
    "Pad",
    f"constant 0; not reflect or edge; not the batch; channels by multiples of {_CHANNEL_WORD}",
)
def _pad(node: _Node) -> _Findings:
    mode, pads, rank = node.attribute("mode", "constant"), node.value(1), len(node.shape())
    if mode in ("reflect", "edge"):
        yield _Finding(f"the mode is {mode}", "use zero padding")
    if node.has(2) and node.scalar(2) != 0:
        yield _Finding("the padding is not 0", "use zero padding")
    if pads is None or rank < 2 or len(pads) != 2 * rank:
        yield _Finding("pads must be constants, for both ends of every axis")
        return
    if pads[0] or pads[rank]:
        yield _Finding("it pads the batch")
    if pads[1] % _CHANNEL_WORD or pads[rank + 1] % _CHANNEL_WORD:
        yield _Finding(f"it pads channels by {pads[1]} and {pads[rank + 1]}")


@_rule("Reshape", "allowzero 0; a no-op, or to two dimensions: [N, C, ...] to [N, C] or [N, -1]")
def _reshape(node: _Node) -> _Findings:
    old, new, target = node.shape(), node.out, node.value(1)
    changes = f"{list(old)} to {list(new)}"
    if node.attribute("allowzero", 0):
        yield _Finding("allowzero is 1")
    if new == old:
        return
    if len(new) != 2 or len(old) < 2 or new[0] != old[0]:
        yield _Finding(changes)
    elif new[1] != old[1]:
        place = _in_its_place(node)
        if target is None or target[1] != -1:
            yield _Finding(changes, rewrite="flatten" if place else "")
        else:
            yield _Finding(
                f"{changes} passes as printed; the vendor's note is about [1, N, 1, 1] only",
                REWRITES["flatten"] if place else "",
                doubt=True,
            )


#: (mode, coordinate_transformation_mode, nearest_mode) that run; linear ignores the last.
_HALF = ("half_pixel", "pytorch_half_pixel")
_ROUND = ("round_prefer_floor", "round_prefer_ceil")
_RESIZES = {
    ("nearest", "asymmetric", "floor"),
    *product(("nearest",), _HALF, _ROUND),
    *product(("linear",), _HALF, (*_ROUND, "floor")),
}


@_rule(
    "Resize",
    "no roi; linear with half_pixel and one integer factor; nearest with half_pixel and rounding, "
    "or asymmetric and floor, by integer factors up to one pixel",
)
def _resize(node: _Node) -> _Findings:
    mode = node.attribute("mode", "nearest")
    coordinates = node.attribute("coordinate_transformation_mode", "half_pixel")
    rounding = node.attribute("nearest_mode", "round_prefer_floor")
    old, new = node.shape(), node.out
    if node.has(1):
        roi = node.value(1)
        unused = roi is not None and not roi.size and coordinates != "tf_crop_and_resize"
        yield _Finding("a roi is given", rewrite="resize roi" if unused else "")
    if (mode, coordinates, rounding) not in _RESIZES:
        cure = "use align_corners=False" if coordinates == "align_corners" else ""
        yield _Finding(f"{mode}, {coordinates}, {rounding}", cure)
    if len(old) != 4:
        yield _Finding("the input is not of rank 4")
        return
    sides = list(zip(old[2:], new[2:], strict=True))
    change = f"{old[2]}x{old[3]} to {new[2]}x{new[3]}"
    if mode == "linear" and len({y // x for x, y in sides}) > 1:
        yield _Finding(f"{change}: the factors differ")
    elif any(y % x not in ((0,) if mode == "linear" else (0, 1, x - 1)) for x, y in sides):
        yield _Finding(f"{change}: no integer factors")


@_rule("Selu", "the default alpha and gamma")
def _selu(node: _Node) -> _Findings:
    alpha, gamma = node.attribute("alpha", 1.67326), node.attribute("gamma", 1.0507)
    if abs(alpha - 1.67326) >= _TOLERANCE or abs(gamma - 1.0507) >= _TOLERANCE:
        yield _Finding(f"alpha {alpha:g}, gamma {gamma:g}")


@_rule(
    "Slice",
    "one axis, given; steps other than 1 along channels only; along height and width only with "
    f"channels a multiple of {_CHANNEL_WORD}",
)
def _slice(node: _Node) -> _Findings:
    shape, starts, axes, steps = node.shape(), node.value(1), node.value(3), node.value(4)
    if starts is None or (node.has(3) and axes is None) or (node.has(4) and steps is None):
        yield _Finding("starts, axes and steps must be constants")
        return
    along = [int(a) % len(shape) for a in (range(starts.size) if axes is None else axes)]
    if axes is None or len(along) != 1:
        yield _Finding(f"it slices {len(along)} axes at once", rewrite="slice per axis")
    for axis, step in zip(along, [1] * len(along) if steps is None else steps, strict=True):
        if axis != 1 and step != 1:
            yield _Finding(f"step {step} along axis {axis}")
        if axis != 1 and shape[1] % _CHANNEL_WORD:
            yield _Finding(f"along axis {axis} with {shape[1]} channels")


@_rule("Split", "axis above 0; not the first operator")
def _split(node: _Node) -> _Findings:
    axis = node.attribute("axis", 0)
    if axis == 0 or axis == -len(node.shape()):
        yield _Finding("it splits the batch")
    elif axis < 0:
        yield _Finding("the axis is negative", rewrite="front axis")
    if node.proto.input[0] in {value.name for value in node.graph.inputs}:
        yield _Finding("it is the first operator")


@_rule("Squeeze", "in particular places, such as before a Gemm or at the end")
def _squeeze(node: _Node) -> _Findings:
    if not _in_its_place(node):
        yield _Finding("neither before a Gemm nor at the end")


#: Listed, but for places that no classifier of ours has: judged like those that are not listed.
_ELSEWHERE = {
    "MatMul": "only inside YOLO11's attention",
    "Softmax": "only inside YOLO11's attention",
    "Transpose": "only no-ops",
}
_UNLISTED = "not listed: host, at the edges of the graph only"


def _is_noop(node: onnx.NodeProto) -> bool:
    perm = [list(a.ints) for a in node.attribute if a.name == "perm"]
    return node.op_type == "Transpose" and perm == [[0, 1, 2, 3]]


def _is_listed(node: onnx.NodeProto) -> bool:
    return node.domain in ("", "ai.onnx") and (node.op_type in _RULES or _is_noop(node))


def _shifted_by_3(clip: _Node) -> str | None:
    """The x of a Clip(x + 3, 0, 6), or None."""
    if clip.proto.op_type != "Clip" or (clip.scalar(1), clip.scalar(2)) != (0.0, 6.0):
        return None
    add = clip.maker(0)
    if add is None or add.proto.op_type != "Add":
        return None
    return next((add.proto.input[1 - n] for n in (0, 1) if add.scalar(n) == 3.0), None)


def _hard_pattern(node: _Node) -> str:
    """The name of the rewrite of clip(x + 3, 0, 6) / 6, or of x clip(x + 3, 0, 6) / 6."""
    numerator = node.maker(0) if node.scalar(1) == 6.0 else None
    if numerator is None:
        return ""
    if _shifted_by_3(numerator) is not None:
        return "hard sigmoid"
    if numerator.proto.op_type == "Mul":
        for clip, x in ((0, 1), (1, 0)):
            maker = numerator.maker(clip)
            if maker is not None and _shifted_by_3(maker) == numerator.proto.input[x]:
                return "hard swish"
    return ""


def _global_pool(node: _Node) -> str:
    """A mean over height and width; without them kept, a Flatten must be able to follow."""
    axes = node.attribute("axes") if node.attribute("axes") is not None else node.value(1)
    if axes is None or len(node.shape()) != 4 or {int(a) % 4 for a in axes} != {2, 3}:
        return ""
    return "global pool" if node.attribute("keepdims", 1) or _in_its_place(node) else ""


def _as_gemm(node: _Node) -> str:
    return "gemm" if node.is_fixed(1) and len(node.shape(0)) == len(node.shape(1)) == 2 else ""


def _keeps_order(node: _Node) -> bool:
    return list(node.attribute("perm") or ()) == list(range(len(node.shape())))


def _nothing_dropped(node: _Node) -> str:
    return "identity" if not node.has(2) or node.scalar(2) == 0 else ""


_RESCUES: dict[str, Callable[[_Node], str]] = {
    "Div": _hard_pattern,
    "Dropout": _nothing_dropped,
    "Identity": lambda _: "identity",
    "MatMul": _as_gemm,
    "ReduceMean": _global_pool,
    "Transpose": lambda node: "identity" if _keeps_order(node) else "",
}
_ADVICE = {
    "ArgMax": "leave it to the host program",
    "Erf": "use ReLU or Hardswish instead of GELU and train again",
    "Gelu": "use ReLU or Hardswish and train again",
    "LayerNormalization": "use BatchNorm and train again",
    "Softmax": "leave it out of the graph: the host program does it",
    "Transpose": "keep the graph NCHW",
}


def _unlisted(node: _Node) -> _Finding:
    op_type = node.proto.op_type
    rewrite = _RESCUES[op_type](node) if op_type in _RESCUES else ""
    reason = _ELSEWHERE.get(op_type, "not in the list of operators")
    return _Finding(reason, _ADVICE.get(op_type, ""), rewrite)


def _findings(node: _Node) -> list[_Finding]:
    if all(node.graph.is_fixed(name) for name in node.proto.output):
        return [_Finding("it computes a constant", rewrite="constants")]
    try:
        if not _is_listed(node.proto):
            return [_unlisted(node)]
        check = _RULES[node.proto.op_type][1] if node.proto.op_type in _RULES else None
        return list(check(node)) if check is not None else []
    except _UnknownShapeError as unknown:
        return [_Finding(str(unknown), "export with fixed shapes")]


def _report(node: _Node) -> NodeReport:
    proto = node.proto
    findings = _findings(node)
    broken = [f for f in findings if not f.doubt]
    verdict: Verdict = "refused" if broken else "chip"
    if broken and not _is_listed(proto) and node.graph.on_host(proto):
        verdict = "host edge"
    words = _ELSEWHERE.get(proto.op_type, _UNLISTED)
    cures = dict.fromkeys(REWRITES[f.rewrite] if f.rewrite else f.cure for f in findings)
    curable = verdict == "refused" and all(f.rewrite for f in broken)
    return NodeReport(
        name=proto.name or proto.output[0],
        op_type=proto.op_type,
        shape=node.graph.shape(proto.output[0]) or (),
        macs=_macs(node),
        verdict=verdict,
        rule=_RULES[proto.op_type][0] if proto.op_type in _RULES else words,
        reason="; ".join(f.reason for f in findings),
        cure="; ".join(cure for cure in cures if cure),
        rewrites=tuple(dict.fromkeys(f.rewrite for f in broken)) if curable else (),
        curable=curable,
    )


def _macs(node: _Node) -> int:
    op_type = node.proto.op_type
    try:
        if op_type == "Conv":  # (M, C / group, kH, kW): per output value, one kernel
            return prod(node.out) * prod(node.shape(1)[1:])
        if op_type == "ConvTranspose":  # (C, M / group, kH, kW): per input value, one kernel
            return prod(node.shape(0)) * prod(node.shape(1)[1:])
        if op_type in ("Gemm", "MatMul"):
            return prod(node.out) * node.shape(0)[-2 if node.attribute("transA", 0) else -1]
    except _UnknownShapeError:
        pass  # check_model says so
    return 0


def _whole(
    model: onnx.ModelProto, graph: _Graph, nodes: tuple[NodeReport, ...]
) -> Iterator[NodeReport]:
    """What is wrong with the graph as a whole."""

    def refuse(
        name: str, reason: str, cure: str, rewrite: str = "", shape: Shape = ()
    ) -> NodeReport:
        rewrites, curable = ((rewrite,), True) if rewrite else ((), False)
        rule = "opset 14 to 17, static shapes, batch 1"
        return NodeReport(name, "graph", shape, 0, "refused", rule, reason, cure, rewrites, curable)

    versions = [o.version for o in model.opset_import if o.domain in ("", "ai.onnx")]
    if not versions or versions[0] not in OPSETS:
        found = f"opset {versions[0]}" if versions else "no opset"
        yield refuse("opset", f"{found}, not 14 to 17", "export with opset 17")
    for value in graph.inputs:
        shape = graph.shape(value.name)
        if value.name in graph.free_batch:
            cure = REWRITES["batch to 1"]
            yield refuse(value.name, "the batch is not fixed", cure, "batch to 1", shape or ())
        elif shape is None or not all(shape):
            yield refuse(value.name, "the shape is not fixed", "export with fixed shapes")
        elif shape and shape[0] != 1:
            yield refuse(value.name, f"batch {shape[0]}", "export with batch 1", shape=shape)
    if nodes and not any(n.verdict == "chip" or n.curable for n in nodes):
        yield refuse("nodes", "nothing in it is for the chip", "choose another network")
