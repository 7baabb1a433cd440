"""A folded float student to int8: where the codes lie, the QDQ graph, and the baked float graph.

The QDQ graph says in plain ONNX what Metis computes, by documented facts and stated assumptions
(`metis.emulator`): activations asymmetric per tensor, weights symmetric per output channel by
min-max, bias int32 with the scale of the accumulator.

The baked graph is an ordinary float student whose weights already lie on that grid and whose biases
make up for what the rounding of the weights shifts. Any quantizer that uses min-max per channel
finds the same codes again, so the gain does not depend on whose quantizer it is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from metis.folding import COMPUTE, attributes_of, constants_of
from metis.ranges import Observer, grid

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping

    from numpy.typing import NDArray

    from metis.folding import Parts
    from metis.ranges import Range, Ranges

#: Activations are stored as uint8 codes with the zero point moved by this much: the same arithmetic
#: as int8, and the only storage for which onnxruntime fuses every convolution (onnxruntime 1.31).
UINT8_SHIFT = 128

#: Operators whose output lies on the grid of their input.
_SAME_GRID = (
    "Flatten",
    "GlobalMaxPool",
    "MaxPool",
    "Pad",
    "Reshape",
    "Slice",
    "Split",
    "Squeeze",
    "Transpose",
)

#: Operators after which a Relu or Clip costs nothing: saturation of the codes does it.
_SATURATING = (*COMPUTE, "Add", "Mul", "Sub", "Concat", "AveragePool", "GlobalAveragePool")

#: Bits of the bias code that stay free, so that the int32 accumulator can't overflow.
_BIAS_BITS = 30


@dataclass(frozen=True)
class Placement:
    """Which tensors of a folded graph are int8, and where one grid serves several."""

    tensors: tuple[str, ...]  # with a grid of their own: these are observed
    root: Mapping[str, str]  # int8 tensor -> the tensor whose grid it has
    fused: Mapping[str, onnx.NodeProto]  # tensor that is never stored -> the activation it enters
    depthwise: tuple[str, ...]  # of `tensors`: read by depthwise convolutions only


def place(core: onnx.ModelProto) -> Placement:
    """Decide where a folded graph is quantized: after every operator, fused activations aside."""
    graph = core.graph
    fixed = {tensor.name for tensor in graph.initializer}
    readers: dict[str, list[onnx.NodeProto]] = {}
    makers: dict[str, onnx.NodeProto] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
        for name in node.output:
            makers[name] = node
    fused = {}
    for node in graph.node:
        if node.op_type in ("Relu", "Clip") and _is_saturation(node, constants_of(core)):
            before = makers.get(node.input[0])
            alone = len(readers[node.input[0]]) == 1 and node.input[0] != graph.output[0].name
            if before is not None and before.op_type in _SATURATING and alone:
                fused[node.input[0]] = node
    root = {graph.input[0].name: graph.input[0].name}
    for node in graph.node:
        for name in node.output:
            if name and name not in fused and name not in fixed:
                root[name] = root[node.input[0]] if node.op_type in _SAME_GRID else name
    own = tuple(name for name, of in root.items() if name == of)
    shared = {of for name, of in root.items() if name != of}
    channels = {t.name: t.dims for t in graph.initializer}
    depthwise = tuple(
        name
        for name in own
        if name not in shared
        and name != graph.input[0].name  # its grid goes to the device's host as two numbers
        and readers.get(name)
        and all(_is_depthwise(node, channels) for node in readers[name])
    )
    return Placement(own, root, fused, depthwise)


def _is_saturation(node: onnx.NodeProto, constants: Mapping[str, Any]) -> bool:
    if node.op_type == "Relu":
        return True
    return len(node.input) > 2 and float(constants[node.input[1]]) == 0


def _is_depthwise(node: onnx.NodeProto, dims: Mapping[str, Any]) -> bool:
    group = attributes_of(node).get("group", 1)
    return bool(node.op_type == "Conv" and group > 1 and dims[node.input[1]][1] == 1)


def weight_scales(
    weight: NDArray[np.float32],
    bias: NDArray[np.float32] | None,
    input_scale: NDArray[np.float32],
    axis: int,
) -> NDArray[np.float32]:
    """Symmetric int8 scale per output channel: max |w| / 127, and large enough for the bias.

    A channel whose weights vanish but whose bias does not would need a bias code beyond int32; its
    scale is raised to |bias| / (2^30 * input scale), which loses nothing.

    Args:
        weight: float32; `axis` runs over the output channels.
        bias: float32, (channels,), or None.
        input_scale: of the activation that comes in: one, or one per output channel.
        axis: of the output channels.

    Returns:
        float32, (channels,).
    """
    others = tuple(i for i in range(weight.ndim) if i != axis)
    scales = np.abs(weight).max(axis=others).astype(np.float64) / 127
    if bias is not None:
        scales = np.maximum(scales, np.abs(bias) / (2.0**_BIAS_BITS * np.float64(input_scale)))
    scales[scales < np.finfo(np.float32).tiny] = 1.0
    result: NDArray[np.float32] = scales.astype(np.float32)
    return result


def on_grid(
    weight: NDArray[np.float32], scales: NDArray[np.float32], axis: int
) -> NDArray[np.int8]:
    """Weights as int8 codes in -127..127, half to even; shape of `weight`."""
    shape = [-1 if i == axis else 1 for i in range(weight.ndim)]
    codes: NDArray[np.int8] = np.clip(np.rint(weight / scales.reshape(shape)), -127, 127).astype(
        np.int8
    )
    return codes


def channel_axis(node: onnx.NodeProto) -> int:
    """Axis of the output channels in the weight of a compute operator."""
    return 1 if node.op_type == "ConvTranspose" else 0


@dataclass(frozen=True)
class Grid:
    """Scale and int8 zero point of a tensor; one entry, or one per channel."""

    scale: NDArray[np.float32]
    zero_point: NDArray[np.int64]


def tensor_grid(found: Range, *, per_channel: bool = False) -> Grid:
    """The grid of a range; `per_channel` uses its channels where it has some."""
    pairs = found.channels if per_channel and found.channels else ((found.lo, found.hi),)
    grids = [grid(lo, hi) for lo, hi in pairs]
    return Grid(
        np.array([scale for scale, _ in grids], np.float32),
        np.array([zero for _, zero in grids], np.int64),
    )


def quantized_graph(
    core: onnx.ModelProto,
    ranges: Ranges,
    *,
    scheme: str,
    only: Collection[str] | None = None,
) -> onnx.ModelProto:
    """Write a folded float graph as QDQ: opset 17, free batch, float ends.

    Args:
        core: of `metis.folding.prepare`.
        ranges: of its tensors.
        scheme: `hybrid_per_tensor_per_channel` gives inputs of depthwise convolutions a grid per
            channel; the others differ in how the ranges were chosen.
        only: names of first outputs of nodes; all others stay float. None: no node stays float.

    Raises:
        RangeError: a tensor has no range.
    """
    return _Writer(core, ranges, scheme, only).write()


class _Writer:
    def __init__(
        self, core: onnx.ModelProto, ranges: Ranges, scheme: str, only: Collection[str] | None
    ) -> None:
        self._core = core
        self._placement = place(core)
        self._constants = constants_of(core)
        hybrid = scheme.startswith("hybrid")
        per_channel = set(self._placement.depthwise) if hybrid else set()
        self._grids = {
            name: tensor_grid(ranges.of(name), per_channel=name in per_channel)
            for name in self._placement.tensors
        }
        self._only = only
        self._nodes: list[onnx.NodeProto] = []
        self._initializers: dict[str, onnx.TensorProto] = {}
        self._only_as_codes: dict[str, str] = {}  # tensor -> its float name after the codes
        self._also_as_codes: dict[str, str] = {}  # the same, where the float tensor is there too
        # Float constants that parametrize an operator are no operands and stay as they are.
        self._parameters = {
            name
            for node in core.graph.node
            if node.op_type not in ("Add", "Mul", "Sub", "Concat")
            for name in node.input
        }

    def write(self) -> onnx.ModelProto:
        graph = self._core.graph
        removed = self._removable()
        renamed = {node.input[0]: node.output[0] for node in removed}
        skipped = {node.output[0] for node in removed}
        for node in graph.node:
            if node.output[0] not in skipped:
                self._add(node, renamed)
        result = helper.make_model(
            helper.make_graph(
                self._nodes,
                "metis_int8",
                graph.input,
                graph.output,
                list(self._initializers.values()),
            ),
            opset_imports=[helper.make_opsetid("", 17)],
        )
        result.ir_version = 8
        return result

    def _removable(self) -> list[onnx.NodeProto]:
        """Activations that saturation does exactly: lo is 0 and hi is not beyond the clip's."""
        found = []
        for node in self._placement.fused.values():
            if not self._is_int8(node.output[0]):
                continue
            here = self._grids[self._placement.root[node.output[0]]]
            top = float(((127 - here.zero_point) * here.scale).max())
            limit = self._constants[node.input[2]] if node.op_type == "Clip" else np.inf
            if (here.zero_point == -128).all() and top <= float(limit) * (1 + 1e-6):
                found.append(node)
        return found

    def _is_int8(self, made: str) -> bool:
        """Whether the node that makes this tensor is quantized, or the one it is fused into."""
        fused = self._placement.fused
        if self._only is None:
            return True
        if made in self._only:
            return True
        return any(n.output[0] == made and n.input[0] in self._only for n in fused.values())

    def _add(self, node: onnx.NodeProto, renamed: Mapping[str, str]) -> None:
        made = [renamed.get(name, name) for name in node.output]
        int8 = self._is_int8(made[0])
        if int8 and node.op_type in COMPUTE:
            inputs = [self._input(node.input[0], int8), *self._weights(node)]
        else:
            inputs = [self._input(name, int8) for name in node.input]
        stored = [int8 and name in self._placement.root for name in made]
        raw = [f"{n}/float" if is_stored else n for n, is_stored in zip(made, stored, strict=True)]
        copied = onnx.NodeProto()
        copied.CopyFrom(node)
        del copied.input[:], copied.output[:]
        copied.input.extend(inputs)
        copied.output.extend(raw)
        self._nodes.append(copied)
        for name, before, is_stored in zip(made, raw, stored, strict=True):
            if is_stored:
                last = name == self._core.graph.output[0].name
                self._only_as_codes[name] = self._pair(before, name, name if last else None)

    def _input(self, name: str, int8: bool) -> str:
        """What a node reads instead of this tensor."""
        if name in self._only_as_codes:
            return self._only_as_codes[name]
        if name in self._constants:
            return self._operand(name) if int8 else self._keep(name, self._constants[name])
        if not int8 or name not in self._placement.root:
            return name
        if name not in self._also_as_codes:  # the graph's input, or made by a node that stays float
            self._also_as_codes[name] = self._pair(name, name, None)
        return self._also_as_codes[name]

    def _operand(self, name: str) -> str:
        """A constant operand of an element-wise operator gets a grid of its own."""
        if f"{name}/codes" in self._initializers:  # another operator has it too
            return f"{name}/int8"
        value = self._constants[name]
        if value.dtype != np.float32 or name in self._parameters:
            return self._keep(name, value)
        scale, zero = grid(float(value.min()), float(value.max()))
        codes = np.clip(np.rint(value / scale) + zero, -128, 127) + UINT8_SHIFT
        self._keep(f"{name}/codes", codes.astype(np.uint8))
        pair = self._scale_and_zero(name, Grid(np.array([scale]), np.array([zero])))
        self._nodes.append(
            helper.make_node("DequantizeLinear", [f"{name}/codes", *pair], [f"{name}/int8"])
        )
        return f"{name}/int8"

    def _pair(self, before: str, tensor: str, after: str | None) -> str:
        """Quantize and dequantize a tensor; the name of the result, which may be given."""
        after = after or f"{tensor}/int8"
        here = self._grids[self._placement.root[tensor]]
        pair = self._scale_and_zero(self._placement.root[tensor], here)
        codes = f"{tensor}/codes"
        for kind, source, made in (
            ("QuantizeLinear", before, codes),
            ("DequantizeLinear", codes, after),
        ):
            self._nodes.append(helper.make_node(kind, [source, *pair], [made], axis=1))
        return after

    def _scale_and_zero(self, name: str, here: Grid) -> tuple[str, str]:
        scale, zero = here.scale, (here.zero_point + UINT8_SHIFT).astype(np.uint8)
        if len(scale) == 1:
            scale, zero = scale[0], zero[0]
        self._keep(f"{name}/scale", np.asarray(scale))
        self._keep(f"{name}/zero", np.asarray(zero))
        return f"{name}/scale", f"{name}/zero"

    def _keep(self, name: str, value: NDArray[Any]) -> str:
        self._initializers[name] = numpy_helper.from_array(np.asarray(value), name)
        return name

    def _weights(self, node: onnx.NodeProto) -> list[str]:
        axis, made = channel_axis(node), node.output[0]
        weight = self._constants[node.input[1]]
        bias = self._constants[node.input[2]] if len(node.input) > 2 and node.input[2] else None
        source = self._grids[self._placement.root[node.input[0]]].scale
        source = np.repeat(source, weight.shape[axis] // len(source))  # one per output channel
        scales = weight_scales(weight, bias, source, axis)
        zeros = np.zeros(len(scales), np.int8)
        names = [
            self._keep(f"{made}/w", on_grid(weight, scales, axis)),
            self._keep(f"{made}/w_scale", scales),
            self._keep(f"{made}/w_zero", zeros),
        ]
        make = helper.make_node
        self._nodes.append(make("DequantizeLinear", names, [f"{made}/w_int8"], axis=axis))
        if bias is None:
            return [f"{made}/w_int8"]
        steps = (source.astype(np.float32) * scales).astype(np.float32)
        names = [
            self._keep(f"{made}/b", np.rint(bias / steps.astype(np.float64)).astype(np.int32)),
            self._keep(f"{made}/b_scale", steps),
            self._keep(f"{made}/b_zero", np.zeros(len(steps), np.int32)),
        ]
        self._nodes.append(make("DequantizeLinear", names, [f"{made}/b_int32"], axis=0))
        return [f"{made}/w_int8", f"{made}/b_int32"]


def compute_nodes(core: onnx.ModelProto) -> Iterator[onnx.NodeProto]:
    """The operators with weights, in the graph's order."""
    return (node for node in core.graph.node if node.op_type in COMPUTE)


def baked(
    parts: Parts,
    seen: Observer,
    ranges: Ranges,
    *,
    correct_bias: bool = True,
    clip_weights: bool = False,
) -> onnx.ModelProto:
    """The whole student, batch 1, that loses nothing more when its weights are rounded to int8.

    Weights lie on the grid of `weight_scales`; weights of dead channels are exactly 0. With
    `correct_bias`, every bias takes up the mean of what rounding changes: `sum(dW * E[x])` over the
    kernel, from the channel means of the layer's input.

    Args:
        parts: of `metis.folding.prepare`.
        seen: the pass over the calibration set, with the means of every layer's input.
        ranges: of its tensors, for the guard of the bias.
        correct_bias: move the biases.
        clip_weights: shrink a channel's range where that lowers the squared error of its weights.

    Source:
        Nagel, van Baalen, Blankevoort, Welling 2019, section 4.2 (bias correction).
    """
    result = _without_initializers(parts.student)
    constants = constants_of(parts.student)
    placement = place(parts.core)
    on_chip = {node.output[0] for node in compute_nodes(parts.core)}
    write = result.graph.initializer.append
    for node in compute_nodes(result):
        if node.output[0] not in on_chip:
            continue
        axis, made = channel_axis(node), node.output[0]
        weight = constants[node.input[1]]
        bias = constants[node.input[2]] if len(node.input) > 2 and node.input[2] else None
        source = tensor_grid(ranges.of(placement.root[node.input[0]])).scale
        kept = _clipped(weight, axis) if clip_weights else weight
        scales = weight_scales(kept, bias, source, axis)
        shape = [-1 if i == axis else 1 for i in range(weight.ndim)]
        rounded = on_grid(kept, scales, axis).astype(np.float32) * scales.reshape(shape)
        names = [node.input[0], f"{made}/baked_w"]
        write(numpy_helper.from_array(rounded, names[1]))
        if correct_bias or bias is not None:
            names.append(f"{made}/baked_b")
            start = np.zeros(len(scales)) if bias is None else bias.astype(np.float64)
            if correct_bias:
                start = start + _lost(node, weight - rounded, seen.means(node.input[0]))
            write(numpy_helper.from_array(start.astype(np.float32), names[2]))
        del node.input[:]
        node.input.extend(names)
    read = {name for node in result.graph.node for name in node.input}
    result.graph.initializer.extend(t for t in parts.student.graph.initializer if t.name in read)
    return result


def _without_initializers(model: onnx.ModelProto) -> onnx.ModelProto:
    graph = model.graph
    bare = helper.make_graph(graph.node, graph.name, graph.input, graph.output)
    return helper.make_model(bare, opset_imports=model.opset_import, ir_version=model.ir_version)


def _lost(
    node: onnx.NodeProto, dw: NDArray[np.float32], means: NDArray[np.float64]
) -> NDArray[Any]:
    """Mean per output channel that the missing part `dw` of the weights would have added."""
    lost: NDArray[Any]
    if node.op_type == "Gemm":
        lost = dw.astype(np.float64) @ means
        return lost
    taps = dw.astype(np.float64).sum(axis=(2, 3))
    if node.op_type == "ConvTranspose":  # weights are (in, out, kh, kw); the chip has no groups
        lost = means @ taps
        return lost
    group = attributes_of(node).get("group", 1)
    parts = taps.reshape(group, -1, taps.shape[1])
    lost = np.einsum("goi,gi->go", parts, means.reshape(group, -1)).ravel()
    return lost


def _clipped(weight: NDArray[np.float32], axis: int) -> NDArray[np.float32]:
    """Every output channel cut at the share of its largest weight that rounds with least error."""
    rows = np.moveaxis(weight, axis, 0).reshape(weight.shape[axis], -1)
    top = np.abs(rows).max(axis=1, keepdims=True)
    best, least = rows, np.full(len(rows), np.inf)
    for share in np.linspace(1.0, 0.5, 26):
        step = np.maximum(top * share / 127, np.finfo(np.float32).tiny)
        cut = np.clip(rows, -top * share, top * share)
        error = np.square(np.rint(cut / step) * step - rows).sum(axis=1)
        best = np.where((error < least)[:, None], cut, best)
        least = np.minimum(error, least)
    moved = np.moveaxis(weight, axis, 0).shape
    result: NDArray[np.float32] = np.moveaxis(best.reshape(moved), 0, axis).astype(np.float32)
    return result


def watch(parts: Parts) -> Observer:
    """An observer of everything that a student's quantization needs to know."""
    placement = place(parts.core)
    return Observer(
        parts.core,
        placement.tensors,
        means_of={node.input[0] for node in compute_nodes(parts.core)},
        channels_of=placement.depthwise,
        preamble=parts.preamble,
    )
