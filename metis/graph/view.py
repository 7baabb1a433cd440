"""An ONNX graph as the chip's rules see it: shapes, constants, neighbours, the host's edges."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from math import prod
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper

from metis.graph.connections import Connections, tensors_read
from metis.graph.edit import attributes_of

Shape = tuple[int, ...]  # 0 for a dimension that is not fixed

#: Constants of up to this many elements can be shapes, axes, pads: shape inference reads them.
_SMALL = 1024


class UnknownShapeError(Exception):
    """A rule needs a shape that the graph does not fix."""


class Graph(Connections):
    """Shapes, constants and neighbours of a model, by the names of its tensors."""

    def __init__(self, model: onnx.ModelProto, is_listed: Callable[[onnx.NodeProto], bool]) -> None:
        self._is_listed = is_listed
        self.free_batch = _free_batch(model.graph)
        outline = _outline(model)
        if self.free_batch:
            _fix_batch(outline.graph, self.free_batch)
        inferred = onnx.shape_inference.infer_shapes(outline, data_prop=True).graph
        self.nodes = [node for node in inferred.node if node.op_type != "Constant"]
        super().__init__(self.nodes, inferred.output)
        self._constants = constant_tensors(model.graph)
        self.inputs = [v for v in inferred.input if v.name not in self._constants]
        self._shapes = {name: tuple(t.dims) for name, t in self._constants.items()}
        for value in (*self.inputs, *inferred.value_info, *inferred.output):
            if value.type.tensor_type.HasField("shape"):
                self._shapes[value.name] = _dims(value)
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

    def on_host(self, node: onnx.NodeProto) -> bool:
        """Whether an operator that is not listed is at one of the graph's edges."""
        name = node.output[0]
        return name not in self._fixed and (name in self._before or name in self._after)

    def _fixed_tensors(self) -> set[str]:
        fixed = set(self._constants)
        for node in self.nodes:
            if any(attribute.type == onnx.AttributeProto.GRAPH for attribute in node.attribute):
                continue  # a branch or a loop reads more than its inputs
            is_known_shape = node.op_type == "Shape" and all(self.shape(node.input[0]) or (0,))
            if is_known_shape or (node.input and all(name in fixed for name in node.input if name)):
                fixed.update(node.output)
        return fixed

    def _host_tensors(self, *, forward: bool) -> set[str]:
        tensors: set[str] = set()
        inputs = {value.name for value in self.inputs}
        for node in self.nodes if forward else reversed(self.nodes):
            if self._is_listed(node):
                continue
            if forward:
                is_end = all(
                    n in tensors or n in inputs or n in self._fixed for n in tensors_read(node)
                )
            else:
                is_end = all(r.output[0] in tensors for n in node.output for r in self.consumers(n))
            if is_end:
                tensors.update(node.output)
        return tensors


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


def constant_tensors(graph: onnx.GraphProto) -> dict[str, onnx.TensorProto]:
    """Initializers, and what Constants make, by name."""
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    tensors.update(constant_nodes(graph.node))
    return tensors


def constant_nodes(nodes: Iterable[onnx.NodeProto]) -> Iterator[tuple[str, onnx.TensorProto]]:
    """What the Constants among some nodes make: its name, and its value."""
    for node in nodes:
        if node.op_type == "Constant":
            value, form = node.attribute[0], node.attribute[0].name
            if form == "value":
                yield node.output[0], value.t
            elif form.startswith(("value_float", "value_int")):
                kind = np.float32 if "float" in form else np.int64
                array = np.asarray(onnx.helper.get_attribute_value(value), kind)
                yield node.output[0], numpy_helper.from_array(array)


class Node:
    """One node, with what the rules ask of it."""

    def __init__(self, graph: Graph, proto: onnx.NodeProto) -> None:
        self.graph = graph
        self.proto = proto
        self._attributes = attributes_of(proto)

    def attribute(self, name: str, default: Any = None) -> Any:  # noqa: ANN401 - of any kind
        """The value of an attribute, text as str."""
        value = self._attributes.get(name, default)
        return value.decode() if isinstance(value, bytes) else value

    def has(self, number: int) -> bool:
        """Whether an optional input is there."""
        return number < len(self.proto.input) and bool(self.proto.input[number])

    def shape(self, number: int = 0) -> Shape:
        """The shape of an input; an UnknownShapeError when it is not fixed."""
        return self._static(self.proto.input[number])

    @property
    def out(self) -> Shape:
        """The shape of the first output; an UnknownShapeError when it is not fixed."""
        return self._static(self.proto.output[0])

    def _static(self, name: str) -> Shape:
        shape = self.graph.shape(name)
        if shape is None or not all(shape):
            raise UnknownShapeError(f"the shape of {name} is not fixed")
        return shape

    def value(self, number: int) -> Any:  # noqa: ANN401 - an array, or None
        """The value of a constant input."""
        return self.graph.constant(self.proto.input[number]) if self.has(number) else None

    def integers(self, number: int) -> list[int]:
        """The values of a constant input of whole numbers; none where it is no constant."""
        value = self.value(number)
        return [] if value is None else [int(element) for element in value.ravel()]

    def scalar(self, number: int) -> float | None:
        """The value of a constant input of one element."""
        value = self.value(number)
        return float(value.item()) if value is not None and value.size == 1 else None

    def is_fixed(self, number: int) -> bool:
        """Whether an input is a constant, or is computed from nothing else."""
        return self.has(number) and self.graph.is_fixed(self.proto.input[number])

    def producer(self, number: int) -> Node | None:
        """The node that computes an input."""
        proto = self.graph.producer(self.proto.input[number]) if self.has(number) else None
        return Node(self.graph, proto) if proto is not None else None
