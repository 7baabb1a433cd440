"""A copy of an ONNX graph that is being rewritten, and runs of whole graphs and single nodes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np
import onnx
from onnx import numpy_helper

from metis.graph.connections import tensors_read
from metis.graph.edit import copy_proto
from metis.graph.sessions import run_node
from metis.graph.view import Node
from metis.operators.report import read_graph

if TYPE_CHECKING:
    from metis.graph.edit import Array


class Draft:
    """A copy of a model that is being rewritten, and the graph as it was before."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.model = copy_proto(model)
        self.graph = read_graph(model)
        self.nodes = list(self.model.graph.node)
        self._computed: dict[str, Array] = {}
        values = (*model.graph.input, *model.graph.initializer)
        self._names = {value.name for value in values} | {
            name for node in model.graph.node for name in node.output
        }

    def view(self, node: onnx.NodeProto) -> Node:
        """A node with what can be asked of it."""
        return Node(self.graph, node)

    def finish(self) -> onnx.ModelProto:
        """The model with its new nodes, without those that nobody reads any more."""
        graph = self.model.graph
        alive: list[onnx.NodeProto] = []
        used = {value.name for value in graph.output}
        for node in reversed(self.nodes):
            if used.intersection(node.output):
                alive.append(node)
                used.update(tensors_read(node))
        initializers = [tensor for tensor in graph.initializer if tensor.name in used]
        unused = {tensor.name for tensor in graph.initializer} - used
        inputs = [value for value in graph.input if value.name not in unused]
        del graph.node[:], graph.initializer[:], graph.input[:], graph.value_info[:]
        graph.node.extend(reversed(alive))
        graph.initializer.extend(initializers)
        graph.input.extend(inputs)
        return self.model

    def read_instead(self, old: str, new: str) -> None:
        """Let every reader of one tensor read another, inside branches and loops too."""
        _read_instead(self.nodes, old, new)

    def replace(self, node: onnx.NodeProto, *replacements: onnx.NodeProto) -> None:
        """Put nodes in the place of one."""
        index = next(i for i, candidate in enumerate(self.nodes) if candidate is node)
        self.nodes[index : index + 1] = replacements

    def constant(self, near: str, array: Array) -> str:
        """Add an initializer under a new name."""
        name = self.free_name(near)
        self.model.graph.initializer.append(numpy_helper.from_array(array, name))
        return name

    def free_name(self, near: str) -> str:
        """A name for a tensor that no other has."""
        name, number = near, 0
        while name in self._names:
            number += 1
            name = f"{near}_{number}"
        self._names.add(name)
        return name

    def value(self, name: str) -> Array:
        """The value of a tensor that is a constant, or is computed from nothing else."""
        if name not in self._computed:
            constant = self.graph.constant(name)
            if constant is None:
                producer = self.graph.producer(name)
                assert producer is not None
                self._compute(producer)
            else:
                self._computed[name] = constant
        return self._computed[name]

    def _compute(self, node: onnx.NodeProto) -> None:
        if node.op_type == "Shape":  # of a tensor whose shape is fixed, not its values
            shape = np.array(self.graph.shape(node.input[0]), np.int64)
            view = self.view(node)
            self._computed[node.output[0]] = shape[
                view.attribute("start", 0) : view.attribute("end")
            ]
            return
        inputs = {name: self.value(name) for name in node.input if name}
        outputs = run_node(node, inputs, self.model)
        self._computed.update(zip((name for name in node.output if name), outputs, strict=True))


def _read_instead(nodes: Iterable[onnx.NodeProto], old: str, new: str) -> None:
    for node in nodes:
        for number, name in enumerate(node.input):
            if name == old:
                node.input[number] = new
        for attribute in node.attribute:
            _read_instead(attribute.g.node, old, new)
