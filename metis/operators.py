"""Which nodes of an ONNX graph a Metis chip can run: every rule as a predicate on the real graph.

Source:
    Voyager SDK, docs/reference/compiler/onnx-opset17-support.md, said to be the same for opsets 14
    to 17. An operator that is not listed runs on the host, which is possible at the edges of a
    graph only (our inference). A listed operator whose rule is broken was seen to abort the
    compiler once (Conv with auto_pad), so it counts as refused.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import onnx
from onnx import numpy_helper

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

Verdict = Literal["chip", "host edge", "refused"]

OPSETS = range(14, 18)

#: Effective taps of a grouped or depthwise convolution must be fewer.
_MAX_GROUPED_TAPS = 128

#: Channel slices and pads of the chip come in words of this many channels.
_CHANNEL_WORD = 64


@dataclass(frozen=True)
class NodeReport:
    """One node and what becomes of it."""

    name: str
    op_type: str
    shape: tuple[int, ...]  # of its first output
    macs: int
    verdict: Verdict
    reason: str = ""  # which rule is broken, or why it is on the host
    cure: str = ""
    curable: bool = False  # an exact rewrite makes it pass


@dataclass(frozen=True)
class OperatorReport:
    """What becomes of a whole graph."""

    nodes: tuple[NodeReport, ...]
    graph: tuple[str, ...]  # what is wrong with the graph as a whole

    @property
    def refused(self) -> list[NodeReport]:
        """Nodes that the chip does not run, and that can't go to the host."""
        return [node for node in self.nodes if node.verdict == "refused"]

    @property
    def fatal(self) -> list[NodeReport]:
        """The refused nodes that no exact rewrite cures."""
        return [node for node in self.refused if not node.curable]

    @property
    def macs(self) -> int:
        """Multiply-accumulates of one inference."""
        return sum(node.macs for node in self.nodes)

    @property
    def share_on_chip(self) -> float:
        """Share of the MACs that the chip does, 0..1."""
        on_chip = sum(node.macs for node in self.nodes if node.verdict == "chip")
        return on_chip / self.macs if self.macs else 0.0

    def lines(self) -> Iterator[str]:
        """A table for a terminal, one node per line."""
        for node in self.nodes:
            words = "; ".join(part for part in (node.reason, node.cure) if part)
            shape = "x".join(map(str, node.shape))
            yield (
                f"{node.verdict:<9} {node.op_type:<20} {shape:<18} {node.macs / 1e6:>9.2f} M  "
                f"{node.name}{': ' + words if words else ''}"
            )
        yield from self.graph


class _Graph:
    """Shapes and constants of a model, by the names of its tensors."""

    def __init__(self, model: onnx.ModelProto) -> None:
        inferred = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
        self.nodes = [node for node in inferred.node if node.op_type != "Constant"]
        self.constants: dict[str, onnx.TensorProto] = {i.name: i for i in inferred.initializer}
        for node in inferred.node:
            for attribute in node.attribute if node.op_type == "Constant" else ():
                if attribute.name == "value":
                    self.constants[node.output[0]] = attribute.t
        self.inputs = [v for v in inferred.input if v.name not in self.constants]
        self.outputs = {value.name for value in inferred.output}
        self._shapes = {name: tuple(t.dims) for name, t in self.constants.items()}
        for value in (*self.inputs, *inferred.value_info, *inferred.output):
            dims = value.type.tensor_type.shape.dim
            if value.type.tensor_type.HasField("shape"):
                self._shapes[value.name] = tuple(d.dim_value for d in dims)

    def shape(self, name: str) -> tuple[int, ...]:
        """Static shape; () for a scalar, (0,) for an unknown one."""
        return self._shapes.get(name, (0,))

    def constant(self, name: str) -> Any:  # noqa: ANN401 - an array, or None
        """The value of a constant."""
        return numpy_helper.to_array(self.constants[name]) if name in self.constants else None


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
        return number < len(self.proto.input) and bool(self.proto.input[number])

    def shape(self, number: int = 0) -> tuple[int, ...]:
        return self.graph.shape(self.proto.input[number])

    @property
    def out(self) -> tuple[int, ...]:
        return self.graph.shape(self.proto.output[0])

    def value(self, number: int) -> Any:  # noqa: ANN401 - an array, or None
        return self.graph.constant(self.proto.input[number]) if self.has(number) else None

    def is_constant(self, number: int) -> bool:
        return self.proto.input[number] in self.graph.constants


#: The broken rule and its cure in words, or None. A cure that begins with `!` is an exact rewrite.
_Complaint = tuple[str, str] | None


def _fine(node: _Node) -> _Complaint:
    return None


def _explicit_padding(node: _Node) -> _Complaint:
    if node.attribute("auto_pad", "NOTSET") != "NOTSET":
        return "auto_pad must be NOTSET", "!write explicit pads"
    return None


def _average_pool(node: _Node) -> _Complaint:
    if complaint := _explicit_padding(node):
        return complaint
    pads, kernel = node.attribute("pads"), node.attribute("kernel_shape")
    if not pads or not any(pads):
        return None
    if len(pads) != 4:
        return "pads must be four numbers", ""
    symmetric = pads[0] == pads[2] and pads[1] == pads[3]
    if symmetric and not (pads[0] <= kernel[0] / 2 and pads[1] <= kernel[1] / 2):
        return "symmetric pads must be at most half the kernel", ""
    if node.attribute("count_include_pad", 0) != 1:
        return "with padding, count_include_pad must be 1", "use count_include_pad=True"
    return None


def _clip(node: _Node) -> _Complaint:
    bounds = [node.value(number) for number in (1, 2)]
    if any(node.has(n) and bound is None for n, bound in zip((1, 2), bounds, strict=True)):
        return "min and max must be constants", "!fold them into constants"
    found = tuple(None if b is None else float(b) for b in bounds)
    if found not in ((0.0, 6.0), (-1.0, 1.0)):
        return "only Clip(0, 6) and Clip(-1, 1) are listed", "use ReLU6 or HardTanh"
    return None


def _concat(node: _Node) -> _Complaint:
    ranks = {len(node.shape(number)) for number in range(len(node.proto.input))}
    if ranks != {4} or node.attribute("axis") not in (-3, -2, -1, 1, 2, 3):
        return "only maps of rank 4, along channels, height or width", ""
    return None


def _conv(node: _Node) -> _Complaint:
    if complaint := _explicit_padding(node):
        return complaint
    if node.attribute("group", 1) == 1:
        return None
    height, width = node.shape(1)[2:] if len(node.shape(1)) == 4 else (0, 0)
    dilations = node.attribute("dilations") or [1, 1]
    strides = node.attribute("strides") or [1, 1]
    square = height == width and dilations[0] == dilations[1] and strides[0] == strides[1]
    if not square:
        return "grouped: kernel, dilations and strides must be square", ""
    taps = ((height - 1) * dilations[0] + 1) * ((width - 1) * dilations[1] + 1)
    if taps >= _MAX_GROUPED_TAPS:
        return f"grouped: {taps} effective taps, fewer than {_MAX_GROUPED_TAPS} can be", (
            "use a kernel of side 11 or less"
        )
    return None


def _conv_transpose(node: _Node) -> _Complaint:
    if complaint := _explicit_padding(node):
        return complaint
    pads = node.attribute("pads") or [0, 0, 0, 0]
    if node.attribute("group", 1) != 1:
        return "grouped transposed convolutions are not listed", ""
    if pads[: len(pads) // 2] != pads[len(pads) // 2 :]:
        return "pads must be the same at both ends", ""
    if node.attribute("output_shape") is not None:
        return "output_shape must be absent", ""
    return None


def _flatten(node: _Node) -> _Complaint:
    if node.attribute("axis", 1) < 0:
        return "axis must be 0 or more", "!count the axis from the front"
    return None


def _gemm(node: _Node) -> _Complaint:
    if node.attribute("transA", 0):
        return "transA must be 0", "!transpose the constant, or the product"
    return None


def _hard_sigmoid(node: _Node) -> _Complaint:
    alpha, beta = node.attribute("alpha", 0.2), node.attribute("beta", 0.5)
    if abs(alpha - 1 / 6) >= 5e-6 or abs(beta - 0.5) >= 5e-6:
        return f"alpha {alpha:g} and beta {beta:g} must be 1/6 and 0.5", "use torch's Hardsigmoid"
    return None


def _selu(node: _Node) -> _Complaint:
    alpha, gamma = node.attribute("alpha", 1.67326), node.attribute("gamma", 1.0507)
    if abs(alpha - 1.67326) >= 5e-6 or abs(gamma - 1.0507) >= 5e-6:
        return "only the default alpha and gamma", ""
    return None


def _max_pool(node: _Node) -> _Complaint:
    if complaint := _explicit_padding(node):
        return complaint
    if node.attribute("storage_order", 0) != 0:
        return "storage_order must be 0", ""
    return None


def _elementwise(same_shape: bool) -> Callable[[_Node], _Complaint]:
    """Add and Mul also take two maps of the same shape, Sub does not."""

    def rule(node: _Node) -> _Complaint:
        if len(set(node.proto.input)) == 1:
            return "both operands are the same tensor", ""
        both = (0, 1)
        shapes = [node.shape(number) for number in both]
        constant = [node.is_constant(number) for number in both]
        if same_shape and shapes[0] == shapes[1] and not any(constant):
            return None
        for one, other in (shapes, shapes[::-1]):
            # A constant of one element counts as a scalar: the compiler's own words allow it.
            if len(one) == 4 and (np.prod(other) == 1 or other == (1, one[1], 1, 1)):
                return None
        listed = "a scalar or a [1, C, 1, 1] partner" + (" or equal shapes" if same_shape else "")
        words = f"{list(shapes[0])} and {list(shapes[1])}: only {listed}"
        return words, "reshape constants to [1, C, 1, 1]" if any(constant) else ""

    return rule


def _prelu(node: _Node) -> _Complaint:
    slope = [size for size in node.shape(1) if size != 1]
    if slope and slope != [node.shape(0)[1]]:
        return "the slope must be a scalar or one per channel", ""
    return None


def _pad(node: _Node) -> _Complaint:
    rank, pads, filler = len(node.shape()), node.value(1), node.value(2)
    if node.attribute("mode", "constant") in ("reflect", "edge"):
        return "only constant padding", "use zero padding"
    if filler is not None and float(filler) != 0:
        return "only padding by 0", "use zero padding"
    if pads is None or len(pads) != 2 * rank:
        return "pads must be constants for both ends of every axis", ""
    if pads[0] or pads[rank]:
        return "no padding of the batch", ""
    if pads[1] % _CHANNEL_WORD or pads[rank + 1] % _CHANNEL_WORD:
        return f"channels are padded by multiples of {_CHANNEL_WORD} only", ""
    return None


def _reshape(node: _Node) -> _Complaint:
    old, new = node.shape(), node.out
    if node.attribute("allowzero", 0) == 0:
        if new == old:
            return None
        # [1, C, H, W] to [1, C * H * W] passes the rule as printed; its note says [1, N, 1, 1].
        if len(new) == 2 and len(old) >= 2 and new[0] == old[0]:
            return None
    return f"{list(old)} to {list(new)}: only no-ops and [1, N, 1, 1] to [1, N]", ""


def _resize(node: _Node) -> _Complaint:
    mode = node.attribute("mode", "nearest")
    coordinates = node.attribute("coordinate_transformation_mode", "half_pixel")
    nearest = node.attribute("nearest_mode", "round_prefer_floor")
    half = coordinates in ("half_pixel", "pytorch_half_pixel")
    rounded = nearest in ("round_prefer_floor", "round_prefer_ceil")
    if coordinates == "tf_crop_and_resize":
        return "roi must be absent", ""
    allowed = (mode == "linear" and half) or (
        mode == "nearest"
        and ((half and rounded) or (coordinates == "asymmetric" and nearest == "floor"))
    )
    if not allowed:
        return f"{mode}, {coordinates}, {nearest} is not listed", "use align_corners=False"
    old, new = node.shape()[2:], node.out[2:]
    remainders = [(b % a, a) for a, b in zip(old, new, strict=True) if a]
    if mode == "linear":
        if (
            any(rest for rest, _ in remainders)
            or len({b // a for a, b in zip(old, new, strict=True)}) > 1
        ):
            return "linear: one integer factor for height and width", ""
    elif any(rest not in (0, 1, a - 1) for rest, a in remainders):
        return "nearest: integer factors only", ""
    return None


def _slice(node: _Node) -> _Complaint:
    axes, steps = node.value(3), node.value(4)
    if axes is None or len(axes) != 1:
        return "exactly one axis, as a constant input", "!one Slice per axis"
    axis = int(axes[0]) % len(node.shape())
    if axis == 1:
        return None
    if steps is not None and (len(steps) != 1 or steps[0] != 1):
        return "steps other than 1 on channels only", ""
    if node.shape()[1] % _CHANNEL_WORD:
        return f"height and width are sliced when channels are a multiple of {_CHANNEL_WORD}", ""
    return None


def _split(node: _Node) -> _Complaint:
    if node.attribute("axis", 0) <= 0:
        return "axis must be above 0", ""
    if node.proto.input[0] in {value.name for value in node.graph.inputs}:
        return "not as the first operator", ""
    return None


def _transpose(node: _Node) -> _Complaint:
    if list(node.attribute("perm") or []) != list(range(len(node.shape()))):
        return "real transposes are not listed", "keep the graph NCHW"
    return None


_RULES: dict[str, Callable[[_Node], _Complaint]] = {
    **dict.fromkeys(
        (
            "BatchNormalization",
            "GlobalAveragePool",
            "GlobalMaxPool",
            "HardSwish",
            "LeakyRelu",
            "Relu",
            "Sigmoid",
            "Tanh",
            "Squeeze",
        ),
        _fine,
    ),
    "Add": _elementwise(same_shape=True),
    "AveragePool": _average_pool,
    "Clip": _clip,
    "Concat": _concat,
    "Conv": _conv,
    "ConvTranspose": _conv_transpose,
    "Flatten": _flatten,
    "Gemm": _gemm,
    "HardSigmoid": _hard_sigmoid,
    "MaxPool": _max_pool,
    "Mul": _elementwise(same_shape=True),
    "PRelu": _prelu,
    "Pad": _pad,
    "Reshape": _reshape,
    "Resize": _resize,
    "Selu": _selu,
    "Slice": _slice,
    "Split": _split,
    "Sub": _elementwise(same_shape=False),
    "Transpose": _transpose,
}

#: Listed, but only inside the attention of one family of networks: like unlisted ones here.
_SPECIAL = {"MatMul": "only inside YOLO11's attention", "Softmax": "only inside YOLO11's attention"}

#: Unlisted operators that an exact rewrite removes.
_REWRITTEN = {"Identity": "!remove it", "Dropout": "!remove it"}


def check_model(model: onnx.ModelProto) -> OperatorReport:
    """Judge every node of a model by the published rules.

    Args:
        model: with static shapes and batch 1, opset 14 to 17.
    """
    graph = _Graph(model)
    complaints = [_complaint(_Node(graph, node)) for node in graph.nodes]
    unlisted = [_is_unlisted(node) for node in graph.nodes]
    edge = _at_the_edges(graph, unlisted)
    return OperatorReport(
        nodes=tuple(
            _report(_Node(graph, node), complaint, at_edge)
            for node, complaint, at_edge in zip(graph.nodes, complaints, edge, strict=True)
        ),
        graph=tuple(_graph_complaints(model, graph)),
    )


def count_macs(model: onnx.ModelProto) -> int:
    """Multiply-accumulates of one inference: convolutions and matrix products."""
    graph = _Graph(model)
    return sum(_macs(_Node(graph, node)) for node in graph.nodes)


def _is_unlisted(node: onnx.NodeProto) -> bool:
    return node.op_type not in _RULES


def _complaint(node: _Node) -> _Complaint:
    op_type = node.proto.op_type
    if op_type in _RULES:
        return _RULES[op_type](node)
    if op_type == "ReduceMean" and _is_global_pool(node):
        return "ReduceMean is not listed", "!GlobalAveragePool computes the same"
    words = _SPECIAL.get(op_type, "not listed")
    return f"{op_type} is {words}", _REWRITTEN.get(op_type, "")


def _is_global_pool(node: _Node) -> bool:
    axes = node.attribute("axes")
    if axes is None:
        axes = node.value(1)
    rank = len(node.shape())
    return rank == 4 and axes is not None and {int(a) % rank for a in axes} == {2, 3}


def _at_the_edges(graph: _Graph, unlisted: list[bool]) -> list[bool]:
    """Whether a node can run on the host: before everything, or after everything, on the chip."""
    makers = {name: i for i, node in enumerate(graph.nodes) for name in node.output}
    readers: dict[int, list[int]] = {i: [] for i in range(len(graph.nodes))}
    sources: dict[int, list[int]] = {i: [] for i in range(len(graph.nodes))}
    for i, node in enumerate(graph.nodes):
        for name in node.input:
            if name in makers:
                readers[makers[name]].append(i)
                sources[i].append(makers[name])
    edge = [False] * len(graph.nodes)
    for neighbours in (readers, sources):
        # A suffix: only unlisted nodes read it. A prefix: only unlisted nodes feed it.
        marked = [False] * len(graph.nodes)
        waiting = deque(i for i, found in neighbours.items() if not found)
        while waiting:
            i = waiting.popleft()
            if marked[i] or not unlisted[i] or not all(marked[j] for j in neighbours[i]):
                continue
            marked[i] = edge[i] = True
            other = sources if neighbours is readers else readers
            waiting.extend(other[i])
    return edge


def _report(node: _Node, complaint: _Complaint, at_edge: bool) -> NodeReport:
    proto = node.proto
    verdict: Verdict = "chip" if complaint is None else "host edge" if at_edge else "refused"
    reason, cure = complaint or ("", "")
    return NodeReport(
        name=proto.name or proto.output[0],
        op_type=proto.op_type,
        shape=node.out,
        macs=_macs(node),
        verdict=verdict,
        reason=reason,
        cure=cure.removeprefix("!"),
        curable=cure.startswith("!"),
    )


def _macs(node: _Node) -> int:
    op_type, out = node.proto.op_type, node.out
    if op_type == "Conv":  # (M, C / group, kH, kW): per output value, one kernel
        return int(np.prod(out) * np.prod(node.shape(1)[1:]))
    if op_type == "ConvTranspose":  # per input value, one kernel
        return int(np.prod(node.shape(0)) * np.prod(node.shape(1)[1:]))
    if op_type in ("Gemm", "MatMul"):
        inner = node.shape(0)[-2 if node.attribute("transA", 0) else -1]
        return int(np.prod(out) * inner)
    return 0


def _graph_complaints(model: onnx.ModelProto, graph: _Graph) -> Iterator[str]:
    versions = [o.version for o in model.opset_import if o.domain in ("", "ai.onnx")]
    if not versions or versions[0] not in OPSETS:
        yield f"opset {versions[0] if versions else 'none'}: export with opset 17"
    for value in graph.inputs:
        shape = graph.shape(value.name)
        if not all(shape):
            yield f"input {value.name} has free dimensions: export with fixed ones"
        elif shape[0] != 1:
            yield f"input {value.name} has batch {shape[0]}: export with batch 1"
