"""The published rules of the listed operators, each as a predicate on a node.

Source:
    Voyager SDK, docs/reference/compiler/onnx-opset17-support.md (after release 1.6.1), whose rules
    are said to be the same for opsets 14 to 17. They are written for NCHW, static shapes, batch 1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from math import prod

from metis.graph.view import Node, Shape
from metis.operators.hard_activations import HAND_WRITTEN, hard_pattern, shifted_by_3

#: Effective taps of a grouped or depthwise convolution must be fewer.
_MAX_GROUPED_TAPS = 128

#: Pads along channels, and channels of maps whose height or width is sliced, come in this many.
_CHANNEL_WORD = 64

#: Parameters of activations are compared as loosely as the vendor does.
_TOLERANCE = 5e-6

#: Changes of a graph that leave what it computes as it is, up to the order of float operations.
REWRITES = {
    "batch to 1": "fix the batch to 1",
    "clip bounds": "fold the bounds into constants",
    "constants": "fold the constants",
    "explicit pads": "write explicit pads",
    "flatten": "a Flatten does the same",
    "front axis": "count the axis from the front",
    "gemm": "a Gemm computes the same",
    "gemm transpose": "transpose the first operand beforehand",
    "global pool": "a GlobalAveragePool computes the same",
    "hard sigmoid": "a HardSigmoid computes the same",
    "hard swish": "a HardSwish computes the same",
    "identity": "remove it",
    "operand shape": "reshape the constant to [1, C, 1, 1] or a scalar",
    "reshape target": "write out the target shape",
    "resize roi": "drop the roi that nobody reads",
    "slice per axis": "one Slice per axis",
    "storage order": "nobody reads the indices: set storage_order to 0",
}


@dataclass(frozen=True)
class Finding:
    """What a rule has to say about a node."""

    reason: str
    cure: str = ""
    rewrite: str = ""  # a name in REWRITES; it makes this finding go away
    doubt: bool = False  # by the rule as printed the node passes


Findings = Iterator[Finding]

_Check = Callable[[Node], Findings]

#: Operator -> its rule in words, and as a predicate; without one any configuration runs.
RULES: dict[str, tuple[str, _Check | None]] = {}

_ANY = "any configuration"

for _name in (
    "BatchNormalization",
    "GlobalAveragePool",
    "GlobalMaxPool",
    "HardSwish",
    "LeakyRelu",
    "Relu",
    "Sigmoid",
    "Tanh",
):
    RULES[_name] = (_ANY, None)


def _rule(op_type: str, words: str) -> Callable[[_Check], _Check]:
    def register(check: _Check) -> _Check:
        RULES[op_type] = (words, check)
        return check

    return register


def _auto_pad(node: Node) -> Findings:
    mode = node.attribute("auto_pad", "NOTSET")
    if mode == "NOTSET":
        return
    # Where strides skip pixels at the end, onnxruntime crops at both ends; ONNX has no word on it.
    if mode.startswith("SAME") and min(same_padding(node)) < -1:
        yield Finding("auto_pad must be NOTSET", "export with explicit pads")
    else:
        yield Finding("auto_pad must be NOTSET", rewrite="explicit pads")


def same_padding(node: Node) -> list[int]:
    """Pixels per axis that auto_pad SAME adds; fewer than none where strides skip the last ones."""
    kernel = node.shape(1)[2:] if "Conv" in node.proto.op_type else node.attribute("kernel_shape")
    ones = [1] * len(kernel)
    strides, dilations = (node.attribute(name) or ones for name in ("strides", "dilations"))
    axes = zip(node.shape()[2:], kernel, strides, dilations, strict=True)
    return [(-(-size // step) - 1) * step + (k - 1) * d + 1 - size for size, k, step, d in axes]


@_rule(
    "AveragePool",
    "auto_pad NOTSET; four pads, if symmetric at most half the kernel; count_include_pad 1 with "
    "any padding",
)
def _average_pool(node: Node) -> Findings:
    yield from _auto_pad(node)
    kernel, pads = node.attribute("kernel_shape"), node.attribute("pads")
    has_padding = any(pads or ())
    if node.attribute("auto_pad", "").startswith("SAME"):
        has_padding = max(same_padding(node)) > 0
    if pads and len(pads) != 4:
        yield Finding("pads must be four numbers")
    elif pads and pads[:2] == pads[2:] and (2 * pads[0] > kernel[0] or 2 * pads[1] > kernel[1]):
        yield Finding("symmetric pads must be at most half the kernel")
    if has_padding and node.attribute("count_include_pad", 0) != 1:
        yield Finding("with padding, count_include_pad must be 1", "use count_include_pad=True")
    if node.attribute("ceil_mode", 0):
        yield Finding(
            "the rule is silent on ceil_mode, and the vendor's zoo switches it off",
            "use ceil_mode=False where height and width divide evenly",
            doubt=True,
        )


@_rule("Clip", "min 0 and max 6, or min -1 and max 1")
def _clip(node: Node) -> Findings:
    bounds = [node.value(number) for number in (1, 2)]
    if any(node.has(n) and bounds[n - 1] is None for n in (1, 2)):
        if all(node.is_fixed(n) for n in (1, 2)):
            yield Finding("min and max must be constants", rewrite="clip bounds")
        else:
            yield Finding("min and max must be constants", "use ReLU6 or Hardtanh")
    elif (node.scalar(1), node.scalar(2)) not in ((0.0, 6.0), (-1.0, 1.0)):
        yield Finding("only Clip(0, 6) and Clip(-1, 1)", "use ReLU6 or Hardtanh")
    elif shifted_by_3(node) is not None:
        yield Finding(HAND_WRITTEN, "use torch's Hardsigmoid or Hardswish", doubt=True)


@_rule("Concat", "inputs of rank 4; along channels, height or width")
def _concat(node: Node) -> Findings:
    if any(len(node.shape(number)) != 4 for number in range(len(node.proto.input))):
        yield Finding("an input is not of rank 4")
    if node.attribute("axis") not in (-3, -2, -1, 1, 2, 3):
        yield Finding("the axis is not channels, height or width")


@_rule(
    "Conv",
    "auto_pad NOTSET; grouped: square kernel, dilations and strides, and fewer than "
    f"{_MAX_GROUPED_TAPS} effective taps",
)
def _conv(node: Node) -> Findings:
    yield from _auto_pad(node)
    if node.attribute("group", 1) == 1:
        return
    kernel = node.shape(1)[2:]
    if len(kernel) != 2:
        yield Finding("grouped: only in two dimensions")
        return
    dilations = node.attribute("dilations") or [1, 1]
    strides = node.attribute("strides") or [1, 1]
    if any(pair[0] != pair[1] for pair in (kernel, dilations, strides)):
        shape = "x".join(map(str, kernel))
        yield Finding(f"grouped: kernel {shape}, dilations {dilations}, strides {strides}")
    taps = prod((k - 1) * d + 1 for k, d in zip(kernel, dilations, strict=True))
    if taps >= _MAX_GROUPED_TAPS:
        yield Finding(f"grouped: {taps} effective taps", "an effective kernel of side 11 or less")


@_rule("ConvTranspose", "auto_pad NOTSET; not grouped; equal pads at both ends; no output_shape")
def _conv_transpose(node: Node) -> Findings:
    if node.attribute("auto_pad", "NOTSET") == "VALID":
        yield from _auto_pad(node)
    elif node.attribute("auto_pad", "NOTSET") != "NOTSET":
        yield Finding("auto_pad must be NOTSET", "export with explicit, symmetric pads")
    if node.attribute("group", 1) != 1:
        yield Finding("it is grouped")
    pads = node.attribute("pads") or []
    if pads[: len(pads) // 2] != pads[len(pads) // 2 :]:
        yield Finding("pads differ at the two ends")
    if node.attribute("output_shape") is not None:
        yield Finding("output_shape is given", "give pads instead")


def in_its_place(node: Node) -> bool:
    """Whether a Gemm, what becomes one, or nothing on the chip reads it."""
    return all(
        proto.op_type == "Gemm" or node.graph.on_host(proto) or _passes(Node(node.graph, proto))
        for proto in node.graph.consumers(node.proto.output[0])
    )


def _passes(reader: Node) -> bool:
    """Whether a reader is a dense layer, or is removed and read by one."""
    if reader.proto.op_type == "MatMul":
        return is_dense(reader)
    is_removed = reader.proto.op_type in ("Identity", "Dropout") or keeps_order(reader)
    return is_removed and in_its_place(reader)


def keeps_order(node: Node) -> bool:
    """Whether it is a Transpose that does nothing."""
    perm = list(node.attribute("perm") or ())
    return node.proto.op_type == "Transpose" and perm == list(range(len(node.shape())))


@_rule("Flatten", "in particular places such as before a Gemm or at the end; axis 0 or more")
def _flatten(node: Node) -> Findings:
    if node.attribute("axis", 1) < 0:
        yield Finding("the axis is negative", rewrite="front axis")
    if not in_its_place(node):
        yield Finding("neither before a Gemm nor at the end")


@_rule("Gemm", "transA 0")
def _gemm(node: Node) -> Findings:
    if node.attribute("transA", 0):
        # What turns a row into a column is a Flatten; other activations would need a Transpose.
        easy = node.is_fixed(0) or 1 in node.shape(0)
        yield Finding("transA is 1", rewrite="gemm transpose" if easy else "")


@_rule("HardSigmoid", "alpha 1/6, beta 0.5")
def _hard_sigmoid(node: Node) -> Findings:
    alpha, beta = node.attribute("alpha", 0.2), node.attribute("beta", 0.5)
    if abs(alpha - 0.166667) >= _TOLERANCE or abs(beta - 0.5) >= _TOLERANCE:
        yield Finding(f"alpha {alpha:g}, beta {beta:g}", "use torch's Hardsigmoid")


@_rule("MaxPool", "auto_pad NOTSET; storage_order 0")
def _max_pool(node: Node) -> Findings:
    yield from _auto_pad(node)
    if node.attribute("storage_order", 0):
        indices = node.proto.output[1] if len(node.proto.output) > 1 else ""
        unread = not node.graph.consumers(indices) and indices not in node.graph.outputs
        yield Finding("storage_order is 1", rewrite="storage order" if unread else "")


def is_channelwise(partner: Shape, feature_map: Shape) -> bool:
    """Whether `partner` broadcasts over the map `feature_map` as a scalar or as [1, C, 1, 1]."""
    shape = (1,) * (4 - len(partner)) + partner
    return shape in ((1, 1, 1, 1), (1, feature_map[1], 1, 1))


def _with_map(node: Node, *, scalar_on_one_channel: bool) -> Findings:
    """The rule of Add, Mul and Sub for a map of rank 4 and a smaller partner."""
    shapes = (node.shape(0), node.shape(1))
    cure = ""
    for number in (0, 1):
        feature_map, partner = shapes[number], shapes[1 - number]
        if len(feature_map) != 4:
            continue
        channels = feature_map[1]
        if partner == () and (scalar_on_one_channel or channels != 1):
            return
        if partner == ():
            # As printed the shape is compared with the number 0, which never holds.
            yield Finding("the printed rule for a scalar on one channel is garbled", doubt=True)
            return
        if channels != 1 and partner == (1, channels, 1, 1):
            return
        if node.is_fixed(1 - number) and is_channelwise(partner, feature_map):
            cure = "operand shape"
    yield Finding(f"the shapes are {list(shapes[0])} and {list(shapes[1])}", rewrite=cure)


def is_dense(node: Node) -> bool:
    """Whether a MatMul is a dense layer: two matrices, the second one fixed."""
    return node.is_fixed(1) and len(node.shape(0)) == len(node.shape(1)) == 2


def _two_activations(node: Node) -> bool:
    return node.shape(0) == node.shape(1) and not node.is_fixed(0) and not node.is_fixed(1)


@_rule("Add", "two activations of one shape; or rank 4 with a scalar or a [1, C, 1, 1]")
def _add(node: Node) -> Findings:
    if _two_activations(node):
        return
    for term, bias in ((0, 1), (1, 0)):
        maker = node.producer(term)
        matmul = maker if maker is not None and maker.proto.op_type == "MatMul" else None
        if matmul and node.is_fixed(bias) and node.out == matmul.out and is_dense(matmul):
            yield Finding("it adds to a MatMul", rewrite="gemm")
            return
    yield from _with_map(node, scalar_on_one_channel=False)


@_rule("Mul", "two activations of one shape, not the same; or rank 4 with a scalar or [1, C, 1, 1]")
def _mul(node: Node) -> Findings:
    if node.proto.input[0] == node.proto.input[1]:
        yield Finding("both operands are the same tensor")
    elif not _two_activations(node):
        yield from _with_map(node, scalar_on_one_channel=True)
    pattern = hard_pattern(node)
    if pattern is not None:
        yield Finding(HAND_WRITTEN, rewrite=pattern[0], doubt=True)


@_rule("Sub", "rank 4 with a scalar or a [1, C, 1, 1]; not two activations of one shape")
def _sub(node: Node) -> Findings:
    yield from _with_map(node, scalar_on_one_channel=True)


@_rule("PRelu", "a slope of one element, or of one per channel")
def _prelu(node: Node) -> Findings:
    slope = [size for size in node.shape(1) if size != 1]
    if slope and slope != list(node.shape(0)[1:2]):
        yield Finding(f"the slope has shape {list(node.shape(1))}")


@_rule(
    "Pad",
    f"constant 0; not reflect or edge; not the batch; channels by multiples of {_CHANNEL_WORD}",
)
def _pad(node: Node) -> Findings:
    mode, pads, rank = node.attribute("mode", "constant"), node.value(1), len(node.shape())
    if mode in ("reflect", "edge"):
        yield Finding(f"the mode is {mode}", "use zero padding")
    if node.has(2) and node.scalar(2) != 0:
        yield Finding("the padding is not 0", "use zero padding")
    if pads is None or rank < 2 or len(pads) != 2 * rank:
        yield Finding("pads must be constants, for both ends of every axis")
        return
    if pads[0] or pads[rank]:
        yield Finding("it pads the batch")
    if pads[1] % _CHANNEL_WORD or pads[rank + 1] % _CHANNEL_WORD:
        yield Finding(f"it pads channels by {pads[1]} and {pads[rank + 1]}")


@_rule("Reshape", "allowzero 0; a no-op, or to two dimensions: [N, C, ...] to [N, C] or [N, -1]")
def _reshape(node: Node) -> Findings:
    old, new, target = node.shape(), node.out, node.integers(1)
    changes = f"{list(old)} to {list(new)}"
    rows = len(new) == 2 and len(old) > 1 and new[0] == old[0]
    place = "flatten" if rows and in_its_place(node) else ""
    # By the rule as printed the target itself is compared, so a 0 or -1 that means the same fails.
    flat = [*old[:1], -1]
    literal = target == list(old) or (rows and target in ([*new], flat))
    if new == old or (rows and new[1] == old[1]):
        if node.attribute("allowzero", 0) or not literal:
            words = "allowzero is 1" if literal else f"the target is not written as {list(new)}"
            yield Finding(words, rewrite="reshape target")
    elif node.attribute("allowzero", 0) or target != flat or not rows:
        yield Finding(changes, rewrite=place)
    else:
        yield Finding(
            f"{changes} passes as printed; the vendor's note is about [1, N, 1, 1] only",
            REWRITES[place] if place else "",
            doubt=True,
        )


#: (mode, coordinate_transformation_mode, nearest_mode) that run; linear ignores the last.
_HALF = ("half_pixel", "pytorch_half_pixel")

_ROUND = ("round_prefer_floor", "round_prefer_ceil")

_RESIZES = {
    ("nearest", "asymmetric", "floor"),
    *product(("nearest",), _HALF, _ROUND),
    *product(("linear",), _HALF, (*_ROUND, "floor")),
}


@_rule(
    "Resize",
    "no roi; linear with half_pixel and one integer factor; nearest with half_pixel and rounding, "
    "or asymmetric and floor, by integer factors up to one pixel",
)
def _resize(node: Node) -> Findings:
    mode = node.attribute("mode", "nearest")
    coordinates = node.attribute("coordinate_transformation_mode", "half_pixel")
    rounding = node.attribute("nearest_mode", "round_prefer_floor")
    old, new = node.shape(), node.out
    if node.has(1):
        roi = node.value(1)
        is_unused = roi is not None and coordinates != "tf_crop_and_resize"
        yield Finding("a roi is given", rewrite="resize roi" if is_unused else "")
    if (mode, coordinates, rounding) not in _RESIZES:
        cure = "use align_corners=False" if coordinates == "align_corners" else ""
        yield Finding(f"{mode}, {coordinates}, {rounding}", cure)
    if len(old) != 4:
        yield Finding("the input is not of rank 4")
        return
    sides = list(zip(old[2:], new[2:], strict=True))
    change = f"{old[2]}x{old[3]} to {new[2]}x{new[3]}"
    if mode == "linear" and len({y // x for x, y in sides}) > 1:
        yield Finding(f"{change}: the factors differ")
    elif any(y % x not in ((0,) if mode == "linear" else (0, 1, x - 1)) for x, y in sides):
        yield Finding(f"{change}: no integer factors")


@_rule("Selu", "the default alpha and gamma")
def _selu(node: Node) -> Findings:
    alpha, gamma = node.attribute("alpha", 1.67326), node.attribute("gamma", 1.0507)
    if abs(alpha - 1.67326) >= _TOLERANCE or abs(gamma - 1.0507) >= _TOLERANCE:
        yield Finding(f"alpha {alpha:g}, gamma {gamma:g}")


@_rule(
    "Slice",
    "one axis, given; steps other than 1 along channels only; along height and width only with "
    f"channels a multiple of {_CHANNEL_WORD}",
)
def _slice(node: Node) -> Findings:
    shape, starts, axes, steps = node.shape(), node.value(1), node.value(3), node.value(4)
    if starts is None or (node.has(3) and axes is None) or (node.has(4) and steps is None):
        yield Finding("starts, axes and steps must be constants")
        return
    numbers = range(starts.size) if axes is None else axes
    slice_axes = [int(number) % len(shape) for number in numbers]
    if axes is None or len(slice_axes) != 1:
        rewrite = "slice per axis" if slice_axes else ""
        yield Finding(f"it slices {len(slice_axes)} axes at once", rewrite=rewrite)
    for axis, step in zip(slice_axes, [1] * len(numbers) if steps is None else steps, strict=True):
        if axis != 1 and step != 1:
            yield Finding(f"step {step} along axis {axis}")
        channels = shape[1] if len(shape) > 1 else 0
        if axis != 1 and (channels % _CHANNEL_WORD or not channels):
            yield Finding(f"along axis {axis} with {channels or 'no'} channels")


@_rule("Split", "axis above 0; not the first operator")
def _split(node: Node) -> Findings:
    axis = node.attribute("axis", 0)
    if axis == 0 or axis == -len(node.shape()):
        yield Finding("it splits the batch")
    elif axis < 0:
        yield Finding("the axis is negative", rewrite="front axis")
    if node.proto.input[0] in {value.name for value in node.graph.inputs}:
        yield Finding("it is the first operator")


@_rule("Squeeze", "in particular places, such as before a Gemm or at the end")
def _squeeze(node: Node) -> Findings:
    if not in_its_place(node):
        yield Finding("neither before a Gemm nor at the end")
