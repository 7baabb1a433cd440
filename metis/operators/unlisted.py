"""Operators that the vendor's list lacks: what cures them, if anything does."""

from __future__ import annotations

from collections.abc import Callable

import onnx

from metis.graph.edit import attributes_of
from metis.graph.view import Node, UnknownShapeError
from metis.operators.hard_activations import hard_pattern
from metis.operators.rules import RULES, Finding, in_its_place, is_dense, keeps_order

#: Listed, but for places that no classifier of ours has: judged like those that are not listed.
ELSEWHERE = {
    "MatMul": "only inside YOLO11's attention",
    "Softmax": "only inside YOLO11's attention",
    "Transpose": "only no-ops",
}

UNLISTED = "not listed: host, at the edges of the graph only"


def _is_noop(node: onnx.NodeProto) -> bool:
    return node.op_type == "Transpose" and attributes_of(node).get("perm") == [0, 1, 2, 3]


def is_listed(node: onnx.NodeProto) -> bool:
    """Whether the vendor's list has a rule for this operator, in this use of it."""
    return node.domain in ("", "ai.onnx") and (node.op_type in RULES or _is_noop(node))


def _global_pool(node: Node) -> str:
    """A mean over height and width; without them kept, a Flatten must be able to follow."""
    axes = node.attribute("axes") if node.attribute("axes") is not None else node.value(1)
    if axes is None or len(node.shape()) != 4 or {int(axis) % 4 for axis in axes} != {2, 3}:
        return ""
    return "global pool" if node.attribute("keepdims", 1) or in_its_place(node) else ""


def _identity(node: Node) -> str:
    """What hands on its input can go, unless both are outputs of the graph."""
    source, result, graph = node.proto.input[0], node.proto.output[0], node.graph
    has_name = source in graph.outputs or graph.producer(source) is None
    is_needed = result in graph.outputs and has_name
    return "" if is_needed else "identity"


def _nothing_dropped(node: Node) -> str:
    masks = node.proto.output[1:]
    is_used = any(node.graph.consumers(mask) or mask in node.graph.outputs for mask in masks)
    drops = node.has(2) and node.scalar(2) != 0
    return "" if is_used or drops else _identity(node)


_REWRITES: dict[str, Callable[[Node], str]] = {
    "Div": lambda node: (hard_pattern(node) or ("",))[0],
    "Dropout": _nothing_dropped,
    "Identity": _identity,
    "MatMul": lambda node: "gemm" if is_dense(node) else "",
    "ReduceMean": _global_pool,
    "Transpose": lambda node: _identity(node) if keeps_order(node) else "",
}

_ADVICE = {
    "ArgMax": "leave it to the host program",
    "Erf": "use ReLU or Hardswish instead of GELU and train again",
    "Gelu": "use ReLU or Hardswish and train again",
    "LayerNormalization": "use BatchNorm and train again",
    "Softmax": "leave it out of the graph: the host program does it",
    "Transpose": "keep the graph NCHW",
}


def _judge_unlisted(node: Node) -> Finding:
    op_type = node.proto.op_type
    rewrite = _REWRITES[op_type](node) if op_type in _REWRITES else ""
    reason = ELSEWHERE.get(op_type, "not in the list of operators")
    return Finding(reason, _ADVICE.get(op_type, ""), rewrite)


def judge(node: Node) -> list[Finding]:
    """What the rules have to say about a node; nothing when it simply runs on the chip."""
    if all(node.graph.is_fixed(name) for name in node.proto.output):
        return [Finding("it computes a constant", rewrite="constants")]
    try:
        if not is_listed(node.proto):
            return [_judge_unlisted(node)]
        check = RULES[node.proto.op_type][1] if node.proto.op_type in RULES else None
        return list(check(node)) if check is not None else []
    except UnknownShapeError as unknown:
        return [Finding(str(unknown), "export with fixed shapes")]
