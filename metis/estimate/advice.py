"""What to change in a network, by the term of the cost model that dominates a layer."""

from __future__ import annotations

from metis.estimate.workload import Layer

#: Padded weights over needed ones, from which on padding is worth a word.
_WASTE = 1.5

_OF_OPERATORS = {
    "activation": "ReLU costs nothing, this activation costs an operator",
    "Add": "fewer, wider blocks have fewer sums",
    "BatchNormalization": "normalize right after a convolution, where it is folded",
    "Concat": "Concats are rewritten as sums of padded maps; add instead",
    "Mul": "squeeze-excite costs five operators; leave it out",
}


def advise(layer: Layer, term: str, *, streams_weights: bool) -> str:
    """One clause of advice.

    Args:
        layer: the layer.
        term: one of estimator.TERMS.
        streams_weights: whether weights make most of its traffic, not maps.
    """
    if term == "memory":
        return _about_memory(layer, streams_weights)
    if term == "depthwise":
        return "a smaller kernel, map or expansion"
    if term == "operators":
        words = "every operator costs as much, however small; fewer, wider layers"
        return _OF_OPERATORS.get(layer.op_type, words)
    padding = _about_padding(layer)
    if term == "weights":
        return padding or "fewer channels"
    if layer.op_type == "grouped Conv":
        return padding
    # A step of the matrix takes a pixel of up to 512 inputs and outputs, however few there are.
    return "fewer pixels: a stride earlier, or a smaller input"


def _about_memory(layer: Layer, streams_weights: bool) -> str:
    if streams_weights:
        padding = _about_padding(layer)
        return "weights do not fit on the chip: more aipu_cores, or fewer weights" + (
            f"; {padding}" if padding else ""
        )
    if layer.concat_bytes:
        return "a long Concat goes through external memory; join fewer maps"
    return "its maps do not fit on the chip: a smaller input, or a stride earlier"


def _about_padding(layer: Layer) -> str:
    waste = layer.weight_bytes / layer.needed_weights if layer.needed_weights else 1.0
    if layer.op_type == "grouped Conv":
        return f"groups are filled up to {waste:.1f} times the weights; make it dense or depthwise"
    if waste > _WASTE:
        return f"channels are padded to {waste:.1f} times the weights; use multiples of 64"
    return ""
