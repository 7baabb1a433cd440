"""A second reading of a QDQ graph: every operator in plain integers.

It shares nothing with onnxruntime. Tensors between QuantizeLinear and DequantizeLinear are codes
with their grid; an operator gets codes and gives codes.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from onnx import helper, numpy_helper
from scipy.special import expit

from metis.quantize import arithmetic as int8

SHIFT = 128

#: Of the ONNX specification.
SELU_ALPHA, SELU_GAMMA = 1.67326319217681884765625, 1.05070102214813232421875

FUNCTIONS = {
    "HardSwish": lambda x: x * np.clip(x * np.float32(1 / 6) + np.float32(0.5), 0, 1),
    "HardSigmoid": lambda x: np.clip(x * np.float32(1 / 6) + np.float32(0.5), 0, 1),
    "Sigmoid": lambda x: expit(x.astype(np.float32)),
    "Tanh": np.tanh,
    "LeakyRelu": lambda x: np.where(x >= 0, x, np.float32(0.01) * x),
    "Relu": lambda x: np.maximum(x, 0),
    "Clip": lambda x: np.clip(x, -1, 1),
    "Selu": lambda x: np.where(
        x > 0, np.float32(SELU_GAMMA) * x, np.float32(SELU_GAMMA * SELU_ALPHA) * (np.exp(x) - 1)
    ),
}


def quantize(x, scale, zero):
    """Real values to codes, `clip(rint(x / scale) + zero, -128, 127)`."""
    steps = np.rint(np.asarray(x, np.float32) / np.float32(scale))
    return np.clip(steps + zero, -128, 127).astype(np.int64)


def dequantize(codes, scale, zero):
    return (codes - zero).astype(np.float32) * np.float32(scale)


def table(function, grid, out):
    """A non-linearity as 256 codes; entry i is the answer to code i - 128."""
    return quantize(function(dequantize(np.arange(-128, 128), *grid)), *out)


def sum_codes(left, right, grids, out):
    """The sum of two tensors of codes on grids of their own, on the grid `out`."""
    return quantize(dequantize(left, *grids[0]) + dequantize(right, *grids[1]), *out)


@dataclass
class Tensor:
    codes: np.ndarray
    scale: float
    zero: int

    @property
    def grid(self):
        return self.scale, self.zero


def run(model, frames):
    """float32 NCHW in, float32 out: what the integer network computes."""
    graph = model.graph
    constants = {i.name: numpy_helper.to_array(i) for i in graph.initializer}
    makers = {name: node for node in graph.node for name in node.output}
    readers = {name: node for node in graph.node for name in node.input}
    tensors = {}

    def grid_of(node):
        return float(constants[node.input[1]]), int(constants[node.input[2]]) - SHIFT

    for node in graph.node:
        if node.op_type == "QuantizeLinear":
            if node.input[0] == graph.input[0].name:
                scale, zero = grid_of(node)
                tensors[node.output[0]] = Tensor(quantize(frames, scale, zero), scale, zero)
            else:  # an operator before it has made the codes already
                tensors[node.output[0]] = tensors[node.input[0]]
        elif node.op_type == "DequantizeLinear":
            if node.input[0] in tensors:
                tensors[node.output[0]] = tensors[node.input[0]]
            elif constants[node.input[0]].dtype == np.uint8:  # a constant operand
                scale, zero = grid_of(node)
                codes = constants[node.input[0]].astype(np.int64) - SHIFT
                tensors[node.output[0]] = Tensor(codes, scale, zero)
        else:
            grids = [grid_of(readers[name]) for name in node.output]
            made = operator(node, tensors, constants, makers, grids[0])
            parts = made if isinstance(made, list) else [made]
            for name, codes, grid in zip(node.output, parts, grids, strict=True):
                tensors[name] = Tensor(codes, *grid)
    last = tensors[graph.output[0].name]
    return dequantize(last.codes, *last.grid)


@dataclass
class Call:
    """One operator with what it gets, and the grid of what it gives."""

    node: Any
    given: list  # Tensor, or None for a constant
    constants: dict
    makers: dict
    out: tuple[float, int]

    @property
    def x(self):
        return self.given[0]

    @property
    def grids(self):
        return [tensor.grid for tensor in self.given]

    @property
    def attributes(self):
        return {a.name: helper.get_attribute_value(a) for a in self.node.attribute}

    def constant(self, number):
        return self.constants.get(self.node.input[number])

    def weight(self):
        """Codes, and scales per output channel."""
        codes, scales, _ = (self.constants[n] for n in self.makers[self.node.input[1]].input)
        return codes.astype(np.int64), scales

    def bias(self):
        if len(self.node.input) < 3:
            return None
        return self.constants[self.makers[self.node.input[2]].input[0]].astype(np.int64)

    def requantized(self, acc, scales):
        factor = (np.float32(self.x.scale) * scales) / np.float32(self.out[0])
        return int8.requantize(acc, factor, self.out[1])


def operator(node, tensors, constants, makers, out):
    call = Call(node, [tensors.get(name) for name in node.input], constants, makers, out)
    if node.op_type in FUNCTIONS:
        return table(FUNCTIONS[node.op_type], call.x.grid, out)[call.x.codes + 128]
    return OPERATORS[node.op_type](call)


def conv(call):
    weight, scales = call.weight()
    names = ("strides", "pads", "dilations", "group")
    options = {n: call.attributes[n] for n in names if n in call.attributes}
    acc = int8.convolve(call.x.codes, call.x.zero, weight, call.bias(), **options)
    return call.requantized(acc, scales)


def gemm(call):
    weight, scales = call.weight()
    acc, bias = (call.x.codes - call.x.zero) @ weight.T, call.bias()
    return call.requantized(acc if bias is None else acc + bias, scales)


def conv_transpose(call):
    """A convolution of the input with zeros between its pixels, and the kernel turned."""
    weight, scales = call.weight()
    (sh, sw), (kh, kw) = call.attributes["strides"], weight.shape[2:]
    n, c, h, w = call.x.codes.shape
    spread = np.full((n, c, (h - 1) * sh + 1, (w - 1) * sw + 1), call.x.zero)
    spread[:, :, ::sh, ::sw] = call.x.codes
    kernel = weight[:, :, ::-1, ::-1].transpose(1, 0, 2, 3)
    pads = [kh - 1, kw - 1, kh - 1, kw - 1]
    return call.requantized(int8.convolve(spread, call.x.zero, kernel, None, pads=pads), scales)


def add(call):
    return sum_codes(call.x.codes, call.given[1].codes, call.grids, call.out)


def sub(call):
    other = call.given[1]
    negative = 2 * other.zero - other.codes  # around the same zero point
    return sum_codes(call.x.codes, negative, call.grids, call.out)


def mul(call):
    left, right = call.x, call.given[1]
    factor = np.float32(np.float32(left.scale) * np.float32(right.scale)) / np.float32(call.out[0])
    product = (left.codes - left.zero) * (right.codes - right.zero)
    return int8.requantize(product, factor, call.out[1])


def concat(call):
    parts = [quantize(dequantize(t.codes, *t.grid), *call.out) for t in call.given]
    return np.concatenate(parts, axis=call.attributes["axis"])


def prelu(call):
    real = dequantize(call.x.codes, *call.x.grid)
    return quantize(np.where(real >= 0, real, call.constant(1) * real), *call.out)


def global_average(call):
    """An int32 sum, one multiplication; (N, C, 1, 1)."""
    pixels = np.float32(np.prod(call.x.codes.shape[2:]))
    total = (call.x.codes - call.x.zero).sum(axis=(2, 3), keepdims=True)
    factor = np.float32(call.x.scale) / (np.float32(call.out[0]) * pixels)
    return int8.requantize(total, factor, call.out[1])


def average_pool(call):
    """Windows with padding counted, as the chip wants it: an int32 sum, one multiplication."""
    kernel = call.attributes["kernel_shape"]
    total = windows(call, call.x.codes - call.x.zero, 0).sum(axis=(4, 5))
    steps = np.float32(call.out[0]) * np.float32(np.prod(kernel))
    return int8.requantize(total, np.float32(call.x.scale) / steps, call.out[1])


def max_pool(call):
    return windows(call, call.x.codes, -128).max(axis=(4, 5))


def windows(call, values, fill):
    (kh, kw), (sh, sw) = call.attributes["kernel_shape"], call.attributes["strides"]
    top, left, bottom, right = call.attributes.get("pads", [0, 0, 0, 0])
    pads = ((0, 0), (0, 0), (top, bottom), (left, right))
    padded = np.pad(values, pads, constant_values=fill)
    view = np.lib.stride_tricks.sliding_window_view(padded, (kh, kw), axis=(2, 3))
    return view[:, :, ::sh, ::sw]


def pad(call):
    pairs = list(zip(*np.split(call.constant(1), 2), strict=True))
    return np.pad(call.x.codes, pairs, constant_values=call.x.zero)


def cut(call):
    start, end, axis = (int(call.constant(number).item()) for number in (1, 2, 3))
    return call.x.codes.take(range(start, end), axis=axis)


def resize(call):
    """Twice the height and width, linear, half_pixel: weights 3/4 and 1/4, edges repeated."""
    real = dequantize(call.x.codes, *call.x.grid)
    for axis in (2, 3):
        pads = [(1, 1) if a == axis else (0, 0) for a in range(4)]
        padded = np.pad(real, pads, mode="edge")
        size = real.shape[axis]
        before, here, after = (padded.take(range(i, i + size), axis=axis) for i in range(3))
        pair = [0.75 * here + 0.25 * before, 0.75 * here + 0.25 * after]
        shape = list(real.shape)
        shape[axis] *= 2
        real = np.stack(pair, axis=axis + 1).reshape(shape).astype(np.float32)
    return quantize(real, *call.out)


OPERATORS = {
    "Add": add,
    "AveragePool": average_pool,
    "Concat": concat,
    "Conv": conv,
    "ConvTranspose": conv_transpose,
    "Flatten": lambda call: call.x.codes.reshape(len(call.x.codes), -1),
    "Gemm": gemm,
    "GlobalAveragePool": global_average,
    "GlobalMaxPool": lambda call: call.x.codes.max(axis=(2, 3), keepdims=True),
    "MaxPool": max_pool,
    "Mul": mul,
    "PRelu": prelu,
    "Pad": pad,
    "Resize": resize,
    "Slice": cut,
    "Split": lambda call: np.split(call.x.codes, 2, axis=call.attributes["axis"]),
    "Sub": sub,
}
