"""A folded student as a torch network, with the emulator's int8 grid in it where that is wanted.

It runs the nodes of the ONNX graph one by one, so tensors and weights have the names they have for
`metis.quantize`, and fake quantization lies where the emulator quantizes, by construction.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from torch import nn

from metis.graph.edit import attributes_of, constants_of, copy_proto, set_array, with_batch
from metis.quantize.folding import COMPUTE, prepare
from metis.quantize.grids import channel_axis, tensor_grid
from metis.quantize.placement import place
from metis.quantize.ranges import Ranges, grid
from pipeline.networks.export import torch_logits
from pipeline.networks.inference import reference_logits
from pipeline.run.errors import InputError
from pipeline.training.folded_operators import OPERATORS

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray
    from torch import Tensor, nn

    from metis.quantize.folding import SplitGraph
    from metis.quantize.ranges import Ranges


#: Operators whose constant operands are int8 too, on a grid of their own.
_ELEMENTWISE = ("Add", "Concat", "Mul", "Sub")

#: Bits of the bias code, see `metis.quantize.grids.weight_scales`.
_BIAS_BITS = 30


@dataclass(frozen=True)
class _Step:
    """One node."""

    operator: str
    attributes: Mapping[str, Any]
    inputs: tuple[str, ...]  # empty: left out
    outputs: tuple[str, ...]
    finished: tuple[str, ...]  # tensors that no later node reads
    weight_axis: int | None  # of the output channels, where weights are int8
    input_scale: float  # of the int8 tensor that comes in, where weights are int8


class FoldedNetwork(nn.Module):
    """The folded student; weights and biases of convolutions and Gemms are its parameters.

    With ranges, activations are rounded to their int8 grid and weights to the per-channel grid of
    the present weights; gradients pass as if they were not, and stop where an activation is outside
    its range.

    Source:
        Jacob et al. 2018, section 3 (simulated quantization).
    """

    def __init__(self, parts: SplitGraph, ranges: Ranges | None = None) -> None:
        """Take the weights of the graph.

        Args:
            parts: of `metis.quantize.folding.prepare`.
            ranges: of the core's tensors; None: everything in float.

        Raises:
            InputError: torch has no word for an operator of the graph.
            RangeError: a tensor has no range.
        """
        super().__init__()
        graph = with_batch(parts.student, "N").graph
        unknown = {node.op_type for node in graph.node} - set(OPERATORS)
        if unknown:
            raise InputError(
                f"distill.quantization_aware can't train {', '.join(sorted(unknown))}; choose "
                "another student, or set distill.quantization_aware.share to 0"
            )
        self._parts = parts
        self._input, self._output = graph.input[0].name, graph.output[0].name
        placement = place(parts.core)
        self._roots = placement.root
        self._grids: dict[str, tuple[float, int]] = {}  # of tensors with a grid of their own
        if ranges is not None:
            grids = {name: tensor_grid(ranges.of(name)) for name in placement.tensors}
            self._grids = {n: (float(g.scale[0]), int(g.zero_point[0])) for n, g in grids.items()}
        self._on_chip = {name for node in parts.core.graph.node for name in node.output}
        self._constants: dict[str, Any] = {}
        self.weights = nn.ParameterDict()
        self._take_constants(graph)
        self._steps = self._steps_of(graph)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, classes, ...) of float32 tensors (N, C, H, W)."""
        tensors = {self._input: self._put_on_grid(self._input, x)}
        for step in self._steps:
            inputs = [self._operand(name, tensors) for name in step.inputs]
            if step.weight_axis is not None:
                inputs[1:] = _round_parameters(step, *inputs[1:])
            outputs = OPERATORS[step.operator](step.attributes, *inputs)
            outputs = outputs if isinstance(outputs, tuple) else (outputs,)
            for name, tensor in zip(step.outputs, outputs, strict=True):
                tensors[name] = self._put_on_grid(name, tensor)
            for name in step.finished:
                del tensors[name]
        logits = tensors[self._output]
        # A network that ends in a single position, such as (N, classes, 1, 1), gives (N, classes).
        return logits.flatten(1) if logits.shape[2:].numel() == 1 else logits

    def export(self) -> onnx.ModelProto:
        """The folded float graph, batch 1, with the present weights and nothing else changed."""
        result = copy_proto(self._parts.student)
        for tensor in result.graph.initializer:
            if (name := _attribute(tensor.name)) in self.weights:
                value = self.weights[name].detach().cpu().numpy()
                set_array(tensor, value)
        return result

    def _take_constants(self, graph: onnx.GraphProto) -> None:
        trainable = {n for node in graph.node if node.op_type in COMPUTE for n in node.input[1:3]}
        int8 = self._int8_operands(graph)
        for name, value in constants_of(self._parts.student).items():
            if name in trainable:
                self.weights[_attribute(name)] = nn.Parameter(torch.from_numpy(value.copy()))
            elif value.dtype == np.float32:
                constant = _operand_on_grid(value) if name in int8 else value
                self.register_buffer(_buffer(name), torch.tensor(constant), persistent=False)
        for tensor in graph.initializer:  # whose targets of Reshape have a free batch
            value = numpy_helper.to_array(tensor)
            if value.dtype != np.float32:
                self._constants[tensor.name] = value.tolist()

    def _int8_operands(self, graph: onnx.GraphProto) -> set[str]:
        """Constants that the emulator rounds: those of element-wise operators alone."""
        if not self._grids:
            return set()
        chip = [node for node in graph.node if node.output[0] in self._on_chip]
        operands = {name for n in chip if n.op_type in _ELEMENTWISE for name in n.input}
        computing = (node for node in chip if node.op_type not in _ELEMENTWISE)
        return operands - {name for node in computing for name in node.input}

    def _steps_of(self, graph: onnx.GraphProto) -> list[_Step]:
        last = {name: i for i, node in enumerate(graph.node) for name in node.input}
        activations = {self._input, *(name for node in graph.node for name in node.output)}
        steps = []
        for i, node in enumerate(graph.node):
            int8 = bool(self._grids) and node.op_type in COMPUTE and node.output[0] in self._on_chip
            outputs = tuple(node.output)
            finished = {n for n in node.input if n in activations and last[n] == i}
            finished |= {n for n in outputs if n not in last and n != self._output}
            steps.append(
                _Step(
                    node.op_type,
                    {**attributes_of(node), "outputs": len(outputs)},
                    tuple(node.input),
                    outputs,
                    tuple(finished),
                    channel_axis(node) if int8 else None,
                    self._grids[self._roots[node.input[0]]][0] if int8 else 1.0,
                )
            )
        return steps

    def _put_on_grid(self, name: str, tensor: Tensor) -> Tensor:
        """An activation as its codes carry it; tensors that share a grid are on it already."""
        if name not in self._grids:
            return tensor
        scale, zero_point = self._grids[name]
        return torch.fake_quantize_per_tensor_affine(tensor, scale, zero_point, -128, 127)

    def _operand(self, name: str, tensors: Mapping[str, Tensor]) -> Any:  # noqa: ANN401 - or numbers
        if not name:
            return None
        if name in tensors:
            return tensors[name]
        if name in self._constants:
            return self._constants[name]
        if (attribute := _attribute(name)) in self.weights:
            return self.weights[attribute]
        return getattr(self, _buffer(name))


def weight_scales(weight: Tensor, bias: Tensor | None, input_scale: float, axis: int) -> Tensor:
    """`metis.quantize.grids.weight_scales` on the weights' device: no copy to the host per step.

    Args:
        weight: float32; `axis` runs over the output channels.
        bias: float32, (channels,), or None.
        input_scale: of the activation that comes in.
        axis: of the output channels.

    Returns:
        float32, (channels,), without a gradient.
    """
    inner_axes = [i for i in range(weight.ndim) if i != axis]
    scales = weight.detach().abs().amax(dim=inner_axes) / 127
    if bias is not None:
        scales = scales.maximum(bias.detach().abs() / (2.0**_BIAS_BITS * input_scale))
    return scales.where(scales >= torch.finfo(torch.float32).tiny, 1.0)


def _on_grid(value: Tensor, step: Tensor, codes: torch.dtype) -> Tensor:
    """The nearest multiple of the step; gradients pass as if nothing were rounded.

    `codes` is the type in which the emulator divides by the step: in another one, a value that lies
    nearly halfway gets the other code.
    """
    rounded = (value.detach().to(codes) / step.to(codes)).round().float() * step
    return value + (rounded - value).detach()


def _round_parameters(step: _Step, weight: Tensor, bias: Tensor | None = None) -> list[Tensor]:
    """Weights on their int8 grid, biases on the int32 grid of the sums."""
    assert step.weight_axis is not None
    scales = weight_scales(weight, bias, step.input_scale, step.weight_axis)
    shape = [-1 if i == step.weight_axis else 1 for i in range(weight.ndim)]
    parameters = [_on_grid(weight, scales.reshape(shape), torch.float32)]
    if bias is not None:
        parameters.append(_on_grid(bias, scales * step.input_scale, torch.float64))
    return parameters


def _operand_on_grid(value: NDArray[np.float32]) -> NDArray[np.float32]:
    """A constant operand as its int8 codes carry it."""
    scale, zero = grid(float(value.min()), float(value.max()))
    codes = np.clip(np.rint(value / scale) + zero, -128, 127)
    result: NDArray[np.float32] = ((codes - zero) * scale).astype(np.float32)
    return result


def _attribute(name: str) -> str:
    """A tensor's name as torch allows it."""
    return name.replace(".", "/")


def _buffer(name: str) -> str:
    return f"constant {_attribute(name)}"


#: Of logits, in shares of the largest: the order of float operations changes less.
_MAX_DIFFERENCE = 1e-4


def folded_network(folded: Path, ranges: Path | None = None) -> FoldedNetwork:
    """The network of a folded student; with ranges on the int8 grid."""
    return FoldedNetwork(
        prepare(onnx.load(folded)), None if ranges is None else Ranges.load(ranges)
    )


def check_trainable(exported: Path) -> None:
    """Refuse a student whose graph torch does not run as onnxruntime does, before it is trained.

    Raises:
        InputError: an operator is not there, or answers differ.
        BackendError: the chip can't run the student.
    """
    parts = prepare(onnx.load(exported))
    network = FoldedNetwork(parts)
    shape = [d.dim_value for d in parts.student.graph.input[0].type.tensor_type.shape.dim]
    frame = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    expected = reference_logits(exported, frame)
    difference = np.abs(torch_logits(network, frame) - expected).max()
    if not difference <= _MAX_DIFFERENCE * max(1.0, float(np.abs(expected).max())):
        raise InputError(
            f"distill.quantization_aware: torch and onnxruntime differ by {difference:.2g} on the "
            "folded student; choose another student, or set distill.quantization_aware.share to 0"
        )


def export_folded(network: nn.Module, path: Path) -> None:
    """Write a folded network with its present weights as float ONNX, batch 1."""
    assert isinstance(network, FoldedNetwork)
    model = network.export()
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, path)
