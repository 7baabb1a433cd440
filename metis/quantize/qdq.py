"""A folded float student to int8: where the codes lie, the QDQ graph, and the baked float graph.

The QDQ graph says in plain ONNX what Metis computes, by documented facts and stated assumptions
(`metis.emulator`): activations asymmetric per tensor, weights symmetric per output channel by
min-max, bias int32 with the scale of the accumulator.

The baked graph is an ordinary float student whose weights already lie on that grid and whose biases
make up for what the rounding of the weights shifts. Any quantizer that uses min-max per channel
finds the same codes again, so the gain does not depend on whose quantizer it is.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from metis.graph.edit import constants_of, copy_proto, set_inputs
from metis.quantize.folding import COMPUTE, bias_of
from metis.quantize.grids import (
    UINT8_SHIFT,
    Grid,
    channel_axis,
    on_grid,
    tensor_grid,
    weight_scales,
)
from metis.quantize.placement import place
from metis.quantize.ranges import grid

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from numpy.typing import NDArray

    from metis.quantize.ranges import Ranges


def quantize_graph(
    core: onnx.ModelProto,
    ranges: Ranges,
    *,
    scheme: str,
    int8_nodes: Collection[str] | None = None,
) -> onnx.ModelProto:
    """Write a folded float graph as QDQ: opset 17, free batch, float ends.

    Args:
        core: of `metis.quantize.folding.prepare`.
        ranges: of its tensors.
        scheme: `hybrid_per_tensor_per_channel` gives inputs of depthwise convolutions a grid per
            channel; the others differ in how the ranges were chosen.
        int8_nodes: names of first outputs of nodes; all others stay float. None: none stays float.

    Raises:
        RangeError: a tensor has no range.
    """
    return _QdqWriter(core, ranges, scheme, int8_nodes).write()


class _QdqWriter:
    def __init__(
        self, core: onnx.ModelProto, ranges: Ranges, scheme: str, int8_nodes: Collection[str] | None
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
        self._int8_nodes = int8_nodes
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
        removable = []
        for node in self._placement.fused.values():
            if not self._is_int8(node.output[0]):
                continue
            own_grid = self._grids[self._placement.root[node.output[0]]]
            top = float(((127 - own_grid.zero_point) * own_grid.scale).max())
            limit = self._constants[node.input[2]] if node.op_type == "Clip" else np.inf
            if (own_grid.zero_point == -128).all() and top <= float(limit) * (1 + 1e-6):
                removable.append(node)
        return removable

    def _is_int8(self, name: str) -> bool:
        """Whether the node that makes this tensor is quantized, or the one it is fused into."""
        fused = self._placement.fused
        if self._int8_nodes is None:
            return True
        if name in self._int8_nodes:
            return True
        return any(n.output[0] == name and n.input[0] in self._int8_nodes for n in fused.values())

    def _add(self, node: onnx.NodeProto, renamed: Mapping[str, str]) -> None:
        outputs = [renamed.get(name, name) for name in node.output]
        int8 = self._is_int8(outputs[0])
        if int8 and node.op_type in COMPUTE:
            inputs = [self._input(node.input[0], int8), *self._weights(node)]
        else:
            inputs = [self._input(name, int8) for name in node.input]
        stored = [name for name in outputs if int8 and name in self._placement.root]
        copy = copy_proto(node)
        set_inputs(copy, inputs)
        del copy.output[:]
        copy.output.extend(f"{name}/float" if name in stored else name for name in outputs)
        self._nodes.append(copy)
        for name in stored:
            is_last = name == self._core.graph.output[0].name
            pair = self._pair(f"{name}/float", name, name if is_last else None)
            self._only_as_codes[name] = pair

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

    def _pair(self, source: str, tensor: str, result: str | None) -> str:
        """Quantize and dequantize a tensor; the name of the result, which may be given."""
        result = result or f"{tensor}/int8"
        root = self._placement.root[tensor]
        pair = self._scale_and_zero(root, self._grids[root])
        codes = f"{tensor}/codes"
        make = helper.make_node
        self._nodes.append(make("QuantizeLinear", [source, *pair], [codes], axis=1))
        self._nodes.append(make("DequantizeLinear", [codes, *pair], [result], axis=1))
        return result

    def _scale_and_zero(self, name: str, own_grid: Grid) -> tuple[str, str]:
        scale, zero = own_grid.scale, (own_grid.zero_point + UINT8_SHIFT).astype(np.uint8)
        if len(scale) == 1:
            scale, zero = scale[0], zero[0]
        self._keep(f"{name}/scale", np.asarray(scale))
        self._keep(f"{name}/zero", np.asarray(zero))
        return f"{name}/scale", f"{name}/zero"

    def _keep(self, name: str, value: NDArray[Any]) -> str:
        self._initializers[name] = numpy_helper.from_array(np.asarray(value), name)
        return name

    def _weights(self, node: onnx.NodeProto) -> list[str]:
        axis, output = channel_axis(node), node.output[0]
        weight = self._constants[node.input[1]]
        bias = bias_of(node, self._constants)
        grid_scale = self._grids[self._placement.root[node.input[0]]].scale
        repeats = weight.shape[axis] // len(grid_scale)
        input_scale = np.repeat(grid_scale, repeats)  # one per output channel
        scales = weight_scales(weight, bias, input_scale, axis)
        zeros = np.zeros(len(scales), np.int8)
        names = [
            self._keep(f"{output}/w", on_grid(weight, scales, axis)),
            self._keep(f"{output}/w_scale", scales),
            self._keep(f"{output}/w_zero", zeros),
        ]
        make = helper.make_node
        self._nodes.append(make("DequantizeLinear", names, [f"{output}/w_int8"], axis=axis))
        if bias is None:
            return [f"{output}/w_int8"]
        steps = (input_scale.astype(np.float32) * scales).astype(np.float32)
        names = [
            self._keep(f"{output}/b", np.rint(bias / steps.astype(np.float64)).astype(np.int32)),
            self._keep(f"{output}/b_scale", steps),
            self._keep(f"{output}/b_zero", np.zeros(len(steps), np.int32)),
        ]
        self._nodes.append(make("DequantizeLinear", names, [f"{output}/b_int32"], axis=0))
        return [f"{output}/w_int8", f"{output}/b_int32"]
