"""What a graph asks of the chip, layer by layer: the quantities that the cost model prices.

The counting rules were found by comparing published frame rates with graphs; see
DECISIONS.md. Channels come in words of 64, a grouped convolution is filled up to a
dense one, and an operator costs something even when it computes little.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import astuple, dataclass
from math import ceil, prod

import onnx

from metis.graph.view import Node, UnknownShapeError
from metis.operators.report import node_macs, read_graph

#: Rows and columns of the matrix that one core multiplies at once.
_TILE = 512

#: Channels are padded to this many; those of the network's input to four.
_WORD, _INPUT_WORD = 64, 4

#: What a core's memory has room for (3.5 MiB).
_L1_BYTES = 3_670_000

#: A layer with few output channels may be laid several times side by side in the matrix.
_COPIES = (1, 2, 4, 8)

_MAX_COPIED_TILES = 4

#: A Concat of so many inputs goes through external memory once per input.
_LONG_CONCAT = 9

#: Part of the layer before them, or no work at all.
_FREE = (
    *("Clip", "Dropout", "Flatten", "HardSigmoid", "Identity", "LeakyRelu", "Pad", "PRelu", "Relu"),
    *("Reshape", "Sigmoid", "Squeeze", "Unsqueeze"),
)

#: Activations that cost as much as any operator; the published networks have SiLU only.
_IN_PLACE = ("Elu", "Erf", "Gelu", "HardSwish", "Mish", "Selu", "Softplus", "Tanh")

#: What makes a product of two maps an activation.
_GATES = ("Sigmoid", "HardSigmoid")

#: Operators of the networks with published frame rates; the constants know no others.
_SEEN = {
    *("Add", "AveragePool", "BatchNormalization", "Clip", "Concat", "Conv", "Dropout", "Flatten"),
    *("Gemm", "GlobalAveragePool", "Identity", "MatMul", "MaxPool", "Mul", "Pad", "ReduceMean"),
    *("Relu", "Reshape", "Sigmoid", "Squeeze", "Unsqueeze"),
}


class UnpricedError(ValueError):
    """The cost model has no term for something that the graph does."""


@dataclass(frozen=True)
class Layer:
    """One operator that costs time, with what hangs on it (activation, folded normalization)."""

    name: str
    op_type: str
    macs: int = 0
    tiles: int = 0  # matrix products of 512x512 for one frame, one copy of the layer
    copied_tiles: int = 0  # the same, the layer laid side by side as often as it pays
    weight_bytes: int = 0  # int8, padded, groups filled up
    needed_weights: int = 0  # of these, the ones that the graph has
    taps: int = 0  # multiplications of a depthwise convolution, channels padded
    spill_bytes: int = 0  # maps in and out, int8, beyond a core's memory
    concat_bytes: int = 0  # traffic of a long Concat
    operators: int = 1


@dataclass(frozen=True)
class Workload:
    """A graph as the cost model sees it."""

    layers: tuple[Layer, ...]
    misses: tuple[str, ...]  # of what the cost model is known to miss, or knows nothing
    input_hw: tuple[int, int]  # pixels

    @property
    def total(self) -> Layer:
        """All layers as one, every quantity summed up."""
        sums = (
            sum(values)
            for values in zip(*(astuple(layer)[2:] for layer in self.layers), strict=True)
        )
        return Layer("all", "all", *sums)


def read_workload(model: onnx.ModelProto) -> Workload:
    """Read a model with one image input (1, C, H, W); a batch that is not fixed is taken as 1.

    Raises:
        UnpricedError: a shape is not fixed, two activations are multiplied as matrices, or
            nothing in the graph is a convolution.
    """
    graph = read_graph(model)
    if len(graph.inputs) != 1 or len(graph.shape(graph.inputs[0].name) or ()) != 4:
        raise UnpricedError("the graph does not have one input of shape (1, C, H, W)")
    height, width = (graph.shape(graph.inputs[0].name) or ())[2:]
    layers: list[Layer] = []
    misses: dict[str, None] = {}
    for proto in graph.nodes:
        if graph.is_fixed(proto.output[0]):
            continue
        node = Node(graph, proto)
        if graph.on_host(proto):
            if node_macs(node):
                misses[f"{_name(node)} is left to the host, whose time is not counted"] = None
            continue
        try:
            layer = _layer(node)
            misses.update(dict.fromkeys(_misses(node)))
        except UnknownShapeError as error:
            raise UnpricedError(f"{error}; export with fixed shapes") from error
        if layer is not None:
            layers.append(layer)
    if not any(layer.op_type.endswith("Conv") for layer in layers):
        raise UnpricedError("there is no convolution in the graph")
    return Workload(tuple(layers), tuple(misses), (height, width))


def _layer(node: Node) -> Layer | None:
    op_type = node.proto.op_type
    if op_type in _FREE or (op_type == "BatchNormalization" and _is_folded(node)):
        return None
    if op_type in ("Conv", "ConvTranspose"):
        return _convolution(node)
    if op_type in ("Gemm", "MatMul"):
        return _linear(node)
    if op_type in _IN_PLACE or _gates_itself(node):
        return Layer(_name(node), "activation")
    concat = 0
    if op_type == "Concat":
        inputs = len(node.proto.input)
        if inputs == 1:
            return None
        concat = inputs * _count_padded(node.out) if inputs >= _LONG_CONCAT else 0
    return Layer(_name(node), op_type, spill_bytes=_spill(node), concat_bytes=concat)


def _convolution(node: Node) -> Layer:
    weight = node.shape(1)
    taps = prod(weight[2:])
    pixels = node.out[2:] if node.proto.op_type == "Conv" else node.shape(0)[2:]
    cin, cout, group = node.shape(0)[1], node.out[1], node.attribute("group", 1)
    if group > 1 and group == cin:
        padded_weights = _up(cout, _WORD) * taps
        return Layer(
            _name(node),
            "depthwise Conv",
            macs=node_macs(node),
            weight_bytes=padded_weights,
            needed_weights=prod(weight),
            taps=prod(pixels) * padded_weights,
            spill_bytes=_spill(node),
        )
    first = node.proto.input[0] in {value.name for value in node.graph.inputs}
    rows = _up(cin, _INPUT_WORD if first else _WORD)
    columns = _up(cout, _WORD)
    stride = node.attribute("strides", [1] * len(pixels))[-1]
    window = Window(rows * taps // weight[-1], weight[-1], stride, columns)
    return Layer(
        _name(node),
        "grouped Conv" if group > 1 else node.proto.op_type,
        macs=node_macs(node),
        tiles=window.tiles(pixels),
        copied_tiles=window.first_layer(pixels) if first else window.copied_tiles(pixels),
        weight_bytes=rows * taps * columns,
        needed_weights=prod(weight),
        spill_bytes=_spill(node),
    )


@dataclass(frozen=True)
class Window:
    """The matrix of a convolution: one row per input value under the kernel."""

    column: int  # input values per column of the kernel: padded channels times kernel height
    width: int  # columns of the kernel
    stride: int  # along the width
    outputs: int  # padded output channels

    def height(self, copies: int = 1) -> int:
        """Tiles that cover the rows of so many copies, side by side along the width."""
        return ceil(self.column * (self.width + (copies - 1) * self.stride) / _TILE)

    def tiles(self, pixels: tuple[int, ...], copies: int = 1) -> int:
        """Tiles for a map of (height, width) outputs; copies share a step along the width."""
        steps = prod(pixels[:-1]) * ceil(pixels[-1] / copies)
        return steps * self.height(copies) * ceil(copies * self.outputs / _TILE)

    def copied_tiles(self, pixels: tuple[int, ...]) -> int:
        """Tiles with the best number of copies."""
        if prod(pixels) == 1:
            return self.tiles(pixels)
        return min(
            self.tiles(pixels, copies)
            for copies in _COPIES
            if copies == 1
            or (copies * self.outputs <= _TILE and self.height(copies) <= _MAX_COPIED_TILES)
        )

    def first_layer(self, pixels: tuple[int, ...]) -> int:
        """Tiles of the network's first layer, which is laid out in a way of its own."""
        copies = max(1, min(_COPIES[-1], _TILE // self.outputs))
        while copies > 1 and self.column * (self.width + (copies - 1) * self.stride) > _TILE:
            copies //= 2
        return self.tiles(pixels, copies)


def _linear(node: Node) -> Layer:
    """A product with constant weights is a 1x1 convolution on as many pixels as it has rows."""
    if not node.is_fixed(1):
        raise UnpricedError(
            f"{_name(node)} multiplies two activations; the cost model has no term for that"
        )
    rows, columns = node.shape(1)[-2:]
    if node.attribute("transB", 0):
        rows, columns = columns, rows
    window = Window(_up(rows, _WORD), 1, 1, _up(columns, _WORD))
    pixels = (1, prod(node.out[:-1]))
    return Layer(
        _name(node),
        node.proto.op_type,
        macs=node_macs(node),
        tiles=window.tiles(pixels),
        copied_tiles=window.copied_tiles(pixels),
        weight_bytes=window.column * window.outputs,
        needed_weights=rows * columns,
        spill_bytes=_spill(node),
    )


def _misses(node: Node) -> Iterator[str]:
    op_type = node.proto.op_type
    if op_type not in _SEEN:
        yield f"{op_type} occurs in no network with a published frame rate"
    if op_type == "MaxPool" and node.attribute("ceil_mode", 0) and _pads_more(node):
        yield (
            f"{_name(node)} pads at the end (ceil_mode); "
            "SqueezeNet 1.0, which does that, runs 6 times slower than predicted"
        )
    if op_type == "Concat" and len(node.proto.input) >= _LONG_CONCAT:
        yield (
            f"a Concat has {_LONG_CONCAT} inputs or more; DenseNet, which has such, runs a fifth "
            "to a third slower than predicted"
        )


def _pads_more(node: Node) -> bool:
    """Whether rounding up gives an output that rounding down would not."""
    kernel = node.attribute("kernel_shape")
    strides = node.attribute("strides", [1] * len(kernel))
    pads = node.attribute("pads", [0] * 2 * len(kernel))
    total = [pads[i] + pads[i + len(kernel)] for i in range(len(kernel))]
    return any(
        out > (size + pad - k) // stride + 1
        for out, size, pad, k, stride in zip(
            node.out[2:], node.shape(0)[2:], total, kernel, strides, strict=True
        )
    )


def _is_folded(node: Node) -> bool:
    producer = node.producer(0)
    is_only = len(node.graph.consumers(node.proto.input[0])) == 1
    return is_only and producer is not None and producer.proto.op_type in ("Conv", "Gemm")


def _spill(node: Node) -> int:
    """Bytes of maps in and out, channels padded, that a core's memory can't hold."""
    maps = [name for name in node.proto.input if name and not node.graph.is_fixed(name)]
    graph_inputs = {value.name for value in node.graph.inputs}
    size = _count_padded(node.out) + sum(
        _count_padded(node.graph.shape(name) or (), _INPUT_WORD if name in graph_inputs else _WORD)
        for name in maps
    )
    return max(0, size - _L1_BYTES)


def _gates_itself(node: Node) -> bool:
    """Whether this is the product of x * sigmoid(x)."""
    if node.proto.op_type != "Mul":
        return False
    left, right = node.proto.input
    return any(
        (gate := node.producer(number)) is not None
        and gate.proto.op_type in _GATES
        and gate.proto.input[0] == x
        for number, x in ((0, right), (1, left))
    )


def _count_padded(shape: tuple[int, ...], word: int = _WORD) -> int:
    """Elements of (1, C, ...) with the channels padded."""
    return _up(shape[1], word) * prod(shape[2:]) if len(shape) > 1 else prod(shape)


def _name(node: Node) -> str:
    return node.proto.name or node.proto.output[0]


def _up(count: int, word: int) -> int:
    return word * ceil(count / word)
