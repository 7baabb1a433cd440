"""HardSigmoid and HardSwish written by hand, out of Add, Clip, Mul and Div."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from metis.graph.view import Node


#: Of the factor 1/6, as loose as the rule of HardSigmoid is about its alpha.
_TOLERANCE = 5e-6

#: What is known of x clip(x + 3, 0, 6) / 6, whose operators all keep their rules.
HAND_WRITTEN = "a hand-written HardSigmoid or HardSwish aborted on the chip before SDK 1.8"


def shifted_by_3(clip: Node) -> str | None:
    """The x of a Clip(x + 3, 0, 6), or None."""
    if clip.proto.op_type != "Clip" or (clip.scalar(1), clip.scalar(2)) != (0.0, 6.0):
        return None
    add = clip.producer(0)
    if add is None or add.proto.op_type != "Add":
        return None
    terms = (n for n in (0, 1) if add.scalar(n) == 3.0 and add.shape(1 - n) == add.out)
    return next((add.proto.input[1 - n] for n in terms), None)


def hard_pattern(node: Node) -> tuple[str, str] | None:
    """A Div by 6, or Mul by 1/6, that ends clip(x + 3, 0, 6) / 6, or x clip(x + 3, 0, 6) / 6.

    Returns:
        The rewrite's name and that of the tensor x, or None.
    """
    numerator = _sixfold(node)
    if numerator is None or numerator.out != node.out:
        return None
    source = shifted_by_3(numerator)
    if source is not None:
        return "hard sigmoid", source
    if numerator.proto.op_type == "Mul":
        for clip, x in ((0, 1), (1, 0)):
            producer = numerator.producer(clip)
            if producer is not None and shifted_by_3(producer) == numerator.proto.input[x]:
                return "hard swish", numerator.proto.input[x]
    return None


def _sixfold(node: Node) -> Node | None:
    """What a Div divides by 6, or a Mul multiplies by 1/6."""
    if node.proto.op_type == "Div":
        return node.producer(0) if node.scalar(1) == 6.0 else None
    for factor, operand in ((0, 1), (1, 0)):
        value = node.scalar(factor)
        if value is not None and abs(value - 1 / 6) < _TOLERANCE:
            return node.producer(operand)
    return None
