"""A second reading of a QDQ graph: every operator in plain integers, by `metis.int8`.

It shares nothing with onnxruntime. Tensors between QuantizeLinear and DequantizeLinear are codes
with their grid; an operator gets codes and gives codes.
"""

from dataclasses import dataclass

import numpy as np
from onnx import helper, numpy_helper
from scipy.special import expit

from metis import int8

SHIFT = 128

FUNCTIONS = {
    "HardSwish": lambda x: x * np.clip(x * np.float32(1 / 6) + np.float32(0.5), 0, 1),
    "HardSigmoid": lambda x: np.clip(x * np.float32(1 / 6) + np.float32(0.5), 0, 1),
    "Sigmoid": lambda x: expit(x.astype(np.float32)),
    "Tanh": np.tanh,
    "LeakyRelu": lambda x: np.where(x >= 0, x, np.float32(0.01) * x),
    "Relu": lambda x: np.maximum(x, 0),
}


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
                tensors[node.output[0]] = Tensor(int8.quantize(frames, scale, zero), scale, zero)
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
            out = grid_of(readers[node.output[0]])
            codes = operator(node, tensors, constants, makers, out)
            tensors[node.output[0]] = Tensor(codes, *out)
    last = tensors[graph.output[0].name]
    return int8.dequantize(last.codes, *last.grid)


def operator(node, tensors, constants, makers, out):
    given = [tensors.get(name) for name in node.input]
    x = given[0]
    attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    kind = node.op_type
    if kind in ("Conv", "Gemm"):
        weight, w_scale, _ = (constants[n] for n in makers[node.input[1]].input)
        bias = constants[makers[node.input[2]].input[0]] if len(node.input) > 2 else None
        weight = weight.astype(np.int64)
        bias = None if bias is None else bias.astype(np.int64)
        if kind == "Gemm":
            acc = int8.multiply(x.codes, x.zero, weight, bias)
        else:
            names = ("strides", "pads", "dilations", "group")
            options = {n: attributes[n] for n in names if n in attributes}
            acc = int8.convolve(x.codes, x.zero, weight, bias, **options)
        return int8.requantize(acc, (np.float32(x.scale) * w_scale) / np.float32(out[0]), out[1])
    if kind == "Add":
        return int8.add(x.codes, given[1].codes, [x.grid, given[1].grid], out)
    if kind == "Mul":
        return int8.scale_by(x.codes, given[1].codes, [x.grid, given[1].grid], out)
    if kind == "Concat":
        parts = [int8.quantize(int8.dequantize(t.codes, *t.grid), *out) for t in given]
        return np.concatenate(parts, axis=attributes["axis"])
    if kind == "GlobalAveragePool":
        return int8.global_average(x.codes, x.grid, out)
    if kind in FUNCTIONS:
        return int8.table(FUNCTIONS[kind], x.grid, out)[x.codes + 128]
    if kind == "MaxPool":
        (kh, kw), (sh, sw) = attributes["kernel_shape"], attributes["strides"]
        windows = np.lib.stride_tricks.sliding_window_view(x.codes, (kh, kw), axis=(2, 3))
        return windows[:, :, ::sh, ::sw].max(axis=(4, 5))
    if kind == "Flatten":
        return x.codes.reshape(len(x.codes), -1)
    raise NotImplementedError(kind)
