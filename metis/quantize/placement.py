"""Where quantization lies in a folded graph."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import onnx

from metis.graph.connections import Connections
from metis.graph.edit import attributes_of, constants_of
from metis.quantize.folding import COMPUTE
from metis.quantize.observers import Observations

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from metis.quantize.folding import SplitGraph


#: Operators whose output lies on the grid of their input.
_SAME_GRID = (
    "Flatten",
    "GlobalMaxPool",
    "MaxPool",
    "Pad",
    "Reshape",
    "Slice",
    "Split",
    "Squeeze",
    "Transpose",
)

#: Operators after which a Relu or Clip costs nothing: saturation of the codes does it.
_SATURATING = (*COMPUTE, "Add", "Mul", "Sub", "Concat", "AveragePool", "GlobalAveragePool")


@dataclass(frozen=True)
class Placement:
    """Which tensors of a folded graph are int8, and where one grid serves several."""

    tensors: tuple[str, ...]  # with a grid of their own: these are observed
    root: Mapping[str, str]  # int8 tensor -> the tensor whose grid it has
    fused: Mapping[str, onnx.NodeProto]  # tensor that is never stored -> the activation it enters
    depthwise: tuple[str, ...]  # of `tensors`: read by depthwise convolutions only


def place(core: onnx.ModelProto) -> Placement:
    """Decide where a folded graph is quantized: after every operator, fused activations aside."""
    graph = core.graph
    constants = constants_of(core)
    connections = Connections(graph.node, graph.output)
    fused = {}
    for node in graph.node:
        if node.op_type in ("Relu", "Clip") and _is_saturation(node, constants):
            producer = connections.producer(node.input[0])
            is_only = connections.only_consumer(node.input[0]) is not None
            if producer is not None and producer.op_type in _SATURATING and is_only:
                fused[node.input[0]] = node
    root = {graph.input[0].name: graph.input[0].name}
    for node in graph.node:
        for name in node.output:
            if name and name not in fused and name not in constants:
                root[name] = root[node.input[0]] if node.op_type in _SAME_GRID else name
    tensors = tuple(name for name, owner in root.items() if name == owner)
    shared = {owner for name, owner in root.items() if name != owner}
    depthwise = tuple(
        name
        for name in tensors
        if name not in shared
        and name != graph.input[0].name  # its grid goes to the device's host as two numbers
        and (consumers := connections.consumers(name))
        and all(_is_depthwise(node, constants) for node in consumers)
    )
    return Placement(tensors, root, fused, depthwise)


def _is_saturation(node: onnx.NodeProto, constants: Mapping[str, Any]) -> bool:
    if node.op_type == "Relu":
        return True
    return len(node.input) > 2 and float(constants[node.input[1]]) == 0


def _is_depthwise(node: onnx.NodeProto, constants: Mapping[str, Any]) -> bool:
    group = attributes_of(node).get("group", 1)
    return bool(node.op_type == "Conv" and group > 1 and constants[node.input[1]].shape[1] == 1)


def compute_nodes(core: onnx.ModelProto) -> Iterator[onnx.NodeProto]:
    """The operators with weights, in the graph's order."""
    return (node for node in core.graph.node if node.op_type in COMPUTE)


def open_observations(parts: SplitGraph) -> Observations:
    """Open a student's graph to observe everything that its quantization needs to know."""
    placement = place(parts.core)
    return Observations(
        parts.core,
        placement.tensors,
        means_of={node.input[0] for node in compute_nodes(parts.core)},
        channels_of=placement.depthwise,
        preamble=parts.preamble,
    )
