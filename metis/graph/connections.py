"""Which node of an ONNX graph makes a tensor, and which nodes read it."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

    import onnx


class Connections:
    """Producer and consumers of every tensor of a graph, by the tensor's name.

    A node that reads a tensor twice is one consumer; what a branch or a loop reads, its node reads.
    """

    def __init__(
        self, nodes: Iterable[onnx.NodeProto], outputs: Iterable[onnx.ValueInfoProto]
    ) -> None:
        """Go through the graph once.

        Args:
            nodes: of the graph; later changes of their inputs and outputs are not followed.
            outputs: of the graph.
        """
        self.outputs = {value.name for value in outputs}
        self._producers: dict[str, onnx.NodeProto] = {}
        self._consumers: dict[str, list[onnx.NodeProto]] = {}
        for node in nodes:
            self._producers.update((name, node) for name in node.output if name)
            for name in tensors_read(node):
                self._consumers.setdefault(name, []).append(node)

    def producer(self, name: str) -> onnx.NodeProto | None:
        """The node that makes a tensor; None for an input or an initializer."""
        return self._producers.get(name)

    def consumers(self, name: str) -> list[onnx.NodeProto]:
        """The nodes that read a tensor, in the graph's order."""
        return self._consumers.get(name, [])

    def only_consumer(self, name: str) -> onnx.NodeProto | None:
        """The node that reads a tensor; None where several do, or where it leaves the graph."""
        consumers = self.consumers(name)
        return consumers[0] if len(consumers) == 1 and name not in self.outputs else None


def tensors_read(node: onnx.NodeProto) -> set[str]:
    """Tensors that a node reads; branches and loops read more than their inputs."""
    names = set(node.input) - {""}  # an optional one that is left out
    for attribute in node.attribute:
        body = attribute.g
        local = {value.name for value in (*body.input, *body.initializer)}
        local.update(name for node in body.node for name in node.output)
        names.update(name for node in body.node for name in tensors_read(node) - local)
    return names
