"""Small readings and edits of ONNX graphs that several rooms need."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

from onnx import helper, numpy_helper

if TYPE_CHECKING:
    from collections.abc import Iterable

    import onnx
    from numpy.typing import NDArray

    Array = NDArray[Any]
    Proto = TypeVar("Proto", onnx.ModelProto, onnx.NodeProto)


def copy_proto(proto: Proto) -> Proto:
    """A copy of a model or a node that shares nothing with it."""
    copy = type(proto)()
    copy.CopyFrom(proto)
    return copy


def constants_of(model: onnx.ModelProto) -> dict[str, Array]:
    """Every initializer as an array."""
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}


def attributes_of(node: onnx.NodeProto) -> dict[str, Any]:
    """Every attribute of a node by name."""
    return {entry.name: helper.get_attribute_value(entry) for entry in node.attribute}


def set_array(tensor: onnx.TensorProto, array: Array) -> None:
    """Give an initializer another value, and leave it its name."""
    tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))


def set_inputs(node: onnx.NodeProto, names: list[str]) -> None:
    """Let a node read these tensors and no others."""
    del node.input[:]
    node.input.extend(names)


def show_tensors(model: onnx.ModelProto, names: Iterable[str]) -> onnx.ModelProto:
    """A copy whose outputs are these tensors; onnxruntime infers their types and shapes."""
    result = copy_proto(model)
    del result.graph.output[:]
    for name in names:
        result.graph.output.add(name=name)
    return result


def with_batch(model: onnx.ModelProto, batch: int | str) -> onnx.ModelProto:
    """A copy whose first dimension, everywhere, is `batch`: a number, or a name for a free one."""
    result = copy_proto(model)
    for value in [*result.graph.input, *result.graph.output]:
        dim = value.type.tensor_type.shape.dim[0]
        if isinstance(batch, str):
            dim.dim_param = batch
        else:
            dim.dim_value = batch
    del result.graph.value_info[:]
    targets = {node.input[1] for node in result.graph.node if node.op_type == "Reshape"}
    for initializer in result.graph.initializer:
        if initializer.name in targets:
            shape = numpy_helper.to_array(initializer).copy()
            if len(shape) and shape[0] == 1:
                shape[0] = 0  # "as in the input", which is the batch
                set_array(initializer, shape)
    return result
