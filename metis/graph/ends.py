"""What a teacher's ONNX graph does at its two ends, and how to see inside it."""

from __future__ import annotations

from difflib import get_close_matches
from typing import TYPE_CHECKING

import numpy as np
import onnx
from onnx import numpy_helper
from onnx.external_data_helper import ExternalDataInfo

from metis.graph.connections import Connections
from metis.graph.edit import copy_proto
from metis.graph.view import constant_tensors

if TYPE_CHECKING:
    from collections.abc import Mapping


#: Nodes that pass every value on as it is.
_PASSING = ("Identity", "Dropout", "Cast", "Flatten", "Reshape", "Squeeze", "Unsqueeze")

#: Nodes that make no difference to which channel a value belongs to.
_BEFORE_NORMALIZATION = ("Identity", "Cast", "Transpose")

_NORMALIZING = ("Sub", "Add", "Div", "Mul", "BatchNormalization")


class GraphError(ValueError):
    """A tensor that was asked for is not in the graph."""


def graph_inputs(model: onnx.ModelProto) -> list[onnx.ValueInfoProto]:
    """What is fed to a graph; old ones list their weights among the inputs too."""
    weights = {initializer.name for initializer in model.graph.initializer}
    return [value for value in model.graph.input if value.name not in weights]


def external_files(model: onnx.ModelProto) -> list[str]:
    """The files that a model's weights lie in, besides its own, relative to its folder."""
    outside = [t for t in model.graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL]
    return sorted({str(ExternalDataInfo(tensor).location) for tensor in outside})


def trailing_softmax(model: onnx.ModelProto) -> str | None:
    """The tensor that goes into a softmax at the end of the graph.

    Args:
        model: a classifier with one output.

    Returns:
        The name of the logits, or None when the graph does not end in Softmax or LogSoftmax over
        rows.
    """
    connections = Connections(model.graph.node, model.graph.output)
    node = connections.producer(model.graph.output[0].name)
    while node is not None and node.op_type in _PASSING:
        node = connections.producer(node.input[0])
    if node is None or node.op_type not in ("Softmax", "LogSoftmax"):
        return None
    logits: str = node.input[0]
    return logits


def leading_normalization(model: onnx.ModelProto) -> list[str]:
    """Names of the nodes that normalize the input before anything else: (x - a) / b and the like.

    Only arithmetic with constants of one value, or of one per channel or pixel, counts.
    """
    constants = constant_tensors(model.graph)
    connections = Connections(model.graph.node, model.graph.output)
    tensor = graph_inputs(model)[0].name
    names = []
    while (node := connections.only_consumer(tensor)) is not None:
        if node.op_type in _NORMALIZING and _is_normalizing(node, tensor, constants):
            names.append(f"{node.op_type} {node.name}".strip())
        elif node.op_type not in _BEFORE_NORMALIZATION:
            break
        tensor = node.output[0]
    return names


def _is_normalizing(
    node: onnx.NodeProto, source: str, constants: Mapping[str, onnx.TensorProto]
) -> bool:
    if node.op_type == "BatchNormalization":
        return True
    operands = [name for name in node.input if name != source]
    if len(operands) != 1 or operands[0] not in constants:
        return False
    tensor = constants[operands[0]]
    if tensor.data_location == onnx.TensorProto.EXTERNAL:
        return True
    neutral = 0 if node.op_type in ("Sub", "Add") else 1
    return bool((numpy_helper.to_array(tensor) != np.float32(neutral)).any())


def with_outputs(model: onnx.ModelProto, names: list[str]) -> onnx.ModelProto:
    """A copy of the model whose outputs are these tensors.

    Raises:
        GraphError: no node makes a tensor of that name; the message lists near ones.
    """
    tensors = [name for node in model.graph.node for name in node.output]
    for name in names:
        if name not in tensors:
            near = get_close_matches(name, tensors, n=4, cutoff=0.4) or tensors[-4:]
            raise GraphError(f"no node makes a tensor {name!r}; there are {', '.join(near)}")
    inferred = onnx.shape_inference.infer_shapes(model).graph.value_info
    infos = {value.name: value for value in (*model.graph.output, *inferred)}
    result = copy_proto(model)
    del result.graph.output[:]
    # onnxruntime infers what a bare name leaves open.
    result.graph.output.extend(infos.get(name, onnx.ValueInfoProto(name=name)) for name in names)
    return result
