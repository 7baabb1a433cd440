"""Which nodes of an ONNX graph a Metis chip can run: every published rule as a predicate.

An operator that is not listed runs on the host, which is possible at the edges of a graph only
(our inference). A listed operator that broke its rule was seen to abort the compiler (a Conv
with auto_pad), so it is refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import Literal

import onnx

from metis.graph.view import Graph, Node, Shape, UnknownShapeError
from metis.operators.rules import REWRITES, RULES
from metis.operators.unlisted import ELSEWHERE, UNLISTED, is_listed, judge

Verdict = Literal["chip", "host edge", "refused"]

OPSETS = range(14, 18)


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
    rewrites: tuple[str, ...] = ()  # names in REWRITES that bring it to the chip, or end a doubt
    curable: bool = False  # it is refused, and `rewrites` make it pass

    def line(self) -> str:
        """One line of a terminal table."""
        shape = "x".join(str(size) if size else "?" for size in self.shape)
        rule = f"rule: {self.rule}" if self.verdict == "refused" else ""
        cure = f"cure: {self.cure}" if self.cure else ""
        words = "; ".join(part for part in (self.reason, rule, cure) if part)
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
    def refusals(self) -> list[NodeReport]:
        """What keeps the graph from the chip."""
        return [*self.graph, *(node for node in self.nodes if node.verdict == "refused")]

    @property
    def fatal(self) -> list[NodeReport]:
        """What of it no exact rewrite cures."""
        return [node for node in self.refusals if not node.curable]

    @property
    def macs(self) -> int:
        """Multiply-accumulates of one inference."""
        return sum(node.macs for node in self.nodes)

    @property
    def share_on_chip(self) -> float:
        """Share of the multiply-accumulates that the chip does, 0..1."""
        on_chip = sum(node.macs for node in self.nodes if node.verdict == "chip")
        return on_chip / self.macs if self.macs else 0.0

    def refusal(self, subject: str) -> str:
        """Why Metis can't run `subject` as it is, in one line; empty when it can."""
        refusals = self.fatal or self.refusals
        if not refusals:
            return ""
        first, count = refusals[0], len(refusals)
        return (
            f"Metis can't run {subject}: "
            + (f"{count} nodes are refused, the first is " if count > 1 else "it refuses ")
            + f"{first.op_type} {first.name}: {first.reason}"
            + (f" ({first.cure})" if first.cure else "")
        )

    def lines(self) -> Iterator[str]:
        """A table for a terminal: one node per line, then what they sum up to."""
        yield f"{'verdict':<9} {'operator':<20} {'output':<16} {'M MACs':>9}  node"
        for node in (*self.nodes, *self.graph):
            yield node.line()
        verdicts = [node.verdict for node in self.nodes]
        refusals, curable = len(self.refusals), len(self.refusals) - len(self.fatal)
        yield (
            f"{verdicts.count('chip')} nodes on the chip, {verdicts.count('host edge')} on the "
            f"host, {refusals} refused ({curable} of them curable); "
            f"{self.macs / 1e6:.1f} M MACs, {100 * self.share_on_chip:.1f} % on the chip"
        )


def check_model(model: onnx.ModelProto) -> OperatorReport:
    """Judge every node of a model, and the model as a whole, by the published rules.

    A batch that is not fixed is taken as 1, and reported.
    """
    graph = read_graph(model)
    nodes = tuple(_judge_node(Node(graph, proto)) for proto in graph.nodes)
    return OperatorReport(nodes, tuple(_judge_graph(model, graph, nodes)))


def read_graph(model: onnx.ModelProto) -> Graph:
    """A model with what its nodes can be asked: shapes, constants, neighbours."""
    return Graph(model, is_listed)


def count_macs(model: onnx.ModelProto) -> int:
    """Multiply-accumulates of one inference: convolutions and matrix products."""
    graph = read_graph(model)
    return sum(node_macs(Node(graph, proto)) for proto in graph.nodes)


def _judge_node(node: Node) -> NodeReport:
    proto = node.proto
    findings = judge(node)
    broken = [f for f in findings if not f.doubt]
    verdict: Verdict = "refused" if broken else "chip"
    if broken and not is_listed(proto) and node.graph.on_host(proto):
        verdict = "host edge"
    default_rule = ELSEWHERE.get(proto.op_type, UNLISTED)
    cures = dict.fromkeys(REWRITES[f.rewrite] if f.rewrite else f.cure for f in findings)
    has_cure = bool(broken) and all(f.rewrite for f in broken)
    asking = broken if has_cure else [] if broken else findings  # to a doubt a rewrite may help too
    return NodeReport(
        name=proto.name or proto.output[0],
        op_type=proto.op_type,
        shape=node.graph.shape(proto.output[0]) or (),
        macs=node_macs(node),
        verdict=verdict,
        rule=RULES[proto.op_type][0] if proto.op_type in RULES else default_rule,
        reason="; ".join(f.reason for f in findings),
        cure="; ".join(cure for cure in cures if cure),
        rewrites=tuple(dict.fromkeys(f.rewrite for f in asking if f.rewrite)),
        curable=verdict == "refused" and has_cure,
    )


def node_macs(node: Node) -> int:
    """Multiply-accumulates of one node; 0 where a shape is not fixed."""
    op_type = node.proto.op_type
    try:
        if op_type == "Conv":  # (M, C / group, kH, kW): per output value, one kernel
            return prod(node.out) * prod(node.shape(1)[1:])
        if op_type == "ConvTranspose":  # (C, M / group, kH, kW): per input value, one kernel
            return prod(node.shape(0)) * prod(node.shape(1)[1:])
        if op_type in ("Gemm", "MatMul"):
            return prod(node.out) * node.shape(0)[-2 if node.attribute("transA", 0) else -1]
    except UnknownShapeError:
        pass  # check_model says so
    return 0


def _judge_graph(
    model: onnx.ModelProto, graph: Graph, nodes: tuple[NodeReport, ...]
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
        opset = f"opset {versions[0]}" if versions else "no opset"
        yield refuse("opset", f"{opset}, not 14 to 17", "export with opset 17")
    for value in graph.inputs:
        shape = graph.shape(value.name)
        if value.name in graph.free_batch:
            cure = REWRITES["batch to 1"]
            yield refuse(value.name, "the batch is not fixed", cure, "batch to 1", shape or ())
        elif shape is None or not all(shape):
            yield refuse(value.name, "the shape is not fixed", "export with fixed shapes")
        elif shape and shape[0] != 1:
            yield refuse(value.name, f"batch {shape[0]}", "export with batch 1", shape=shape)
    if nodes and not any(n.verdict == "chip" or n.rewrites for n in nodes):
        yield refuse("nodes", "nothing in it is for the chip", "choose another network")
