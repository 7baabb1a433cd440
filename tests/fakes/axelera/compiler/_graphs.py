"""Graphs of the stand-in: int8 by onnxruntime, then the padded NHWC tensors of a device.

The first convolution's padding becomes the host's, and rows get a few more columns: the public
documentation has a 640 x 640 network with an input of 644 x 656.
"""

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from axelera.compiler._release import RELEASE
from axelera.compiler.exceptions import QtoolsError
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import (
    CalibrationDataReader,
    CalibrationMethod,
    QuantFormat,
    QuantType,
    quantize_static,
)

_LISTED = {
    "Add", "AveragePool", "BatchNormalization", "Clip", "Concat", "Conv", "Flatten", "Gemm",
    "GlobalAveragePool", "HardSigmoid", "HardSwish", "MaxPool", "Mul", "Relu", "Reshape",
    "Sigmoid", "Softmax", "Squeeze",
}  # fmt: skip

_METHODS = {
    "per_tensor_histogram": CalibrationMethod.Percentile,
    "per_tensor_min_max": CalibrationMethod.MinMax,
    "hybrid_per_tensor_per_channel": CalibrationMethod.Entropy,
}


@dataclass(frozen=True)
class Spec:
    shape: list[int]  # NHWC, padding included
    pads: list[int]  # low, high for N, H, W, C
    scale: float
    zero_point: int


class _Reader(CalibrationDataReader):
    def __init__(self, name, samples):
        self._items = iter([{name: sample} for sample in samples])

    def get_next(self):
        return next(self._items, None)


def refuse_unlisted(graph):
    for node in graph.node:
        if node.op_type not in _LISTED:
            raise QtoolsError(
                f"{node.op_type} {node.name or node.output[0]}: not in the list of operators"
            )
        for attribute in node.attribute:
            if attribute.name == "auto_pad" and attribute.s not in (b"", b"NOTSET"):
                raise QtoolsError(
                    f"{node.op_type} {node.name or node.output[0]}: attr(auto_pad) must be NOTSET"
                )


def quantize_graph(model, samples, config):
    model, postamble = _cut(model)
    graph = model.graph
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "float.onnx", Path(folder) / "qdq.onnx"
        onnx.save(model, source)
        quantize_static(
            source,
            target,
            _Reader(graph.input[0].name, samples),
            quant_format=QuantFormat.QDQ,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            per_channel=True,
            calibrate_method=_METHODS[config.meaning("quantization_scheme")],
        )
        data = target.read_bytes()
    info = {"input": _shape(graph.input[0]), "output": _shape(graph.output[0])}
    return {"qdq": data, "info": info, "postamble": postamble}


def _cut(model):
    """Cut a Softmax off the end; the host does it in float, from (N, C, 1, 1)."""
    last = model.graph.node[-1]
    if last.op_type != "Softmax":
        return model, b""
    after = helper.make_graph(
        [
            helper.make_node("Flatten", ["x"], ["flat"]),
            helper.make_node("Softmax", ["flat"], ["y"]),
        ],
        "postamble",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", "C", 1, 1])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", "C"])],
    )
    core = onnx.ModelProto()
    core.CopyFrom(model)
    del core.graph.node[-1]
    core.graph.output[0].name = last.input[0]
    opset = [helper.make_opsetid("", 17)]
    made = helper.make_model(after, opset_imports=opset, ir_version=8)
    return core, made.SerializeToString()


def _shape(info):
    return [d.dim_value for d in info.type.tensor_type.shape.dim]


def device_core(parts, batch):
    """The int8 core with a device's tensors, serialized, and its two Specs."""
    model = onnx.load_from_string(parts["qdq"])
    graph = model.graph
    del graph.value_info[:]
    constants = {i.name: numpy_helper.to_array(i) for i in graph.initializer}
    first = next(n for n in graph.node if graph.input[0].name in n.input)
    last = next(n for n in graph.node if graph.output[0].name in n.output)
    assert (first.op_type, last.op_type) == ("QuantizeLinear", "DequantizeLinear")
    _, channels, height, width = parts["info"]["input"]
    classes = parts["info"]["output"][1]
    top, left, bottom, right = _take_padding(graph, first)
    spare = -(width + left + right) % 4
    source = Spec(
        [batch, height + top + bottom, width + left + right + spare, channels + -channels % 4],
        [0, 0, top, bottom, left, right + spare, 0, -channels % 4],
        float(constants[first.input[1]]),
        int(constants[first.input[2]]) - 128,
    )
    sink = Spec(
        [batch, 1, 1, classes + -classes % 64],
        [0, 0, 0, 0, 0, 0, 0, -classes % 64],
        float(constants[last.input[1]]),
        int(constants[last.input[2]]) - 128,
    )
    extra = {
        "starts": np.zeros(2, np.int64),
        "ends": np.array([width + left + right, channels], np.int64),
        "axes": np.array([2, 3], np.int64),
        "middle": np.array(128, np.int32),
        "device_shape": np.array([batch, 1, 1, classes], np.int64),
        "pads": np.array([0, 0, 0, 0, 0, 0, 0, -classes % 64], np.int64),
        "zero": np.array(sink.zero_point, np.int8),
    }
    make = helper.make_node
    before = [
        make("Slice", ["input", "starts", "ends", "axes"], ["sliced"]),
        make("Transpose", ["sliced"], ["nchw"], perm=[0, 3, 1, 2]),
        make("Cast", ["nchw"], ["wide"], to=TensorProto.INT32),
        make("Add", ["wide", "middle"], ["shifted"]),
        make("Cast", ["shifted"], [first.output[0]], to=TensorProto.UINT8),
    ]
    after = [
        make("Cast", [last.input[0]], ["wide_out"], to=TensorProto.INT32),
        make("Sub", ["wide_out", "middle"], ["unshifted"]),
        make("Cast", ["unshifted"], ["codes"], to=TensorProto.INT8),
        make("Reshape", ["codes", "device_shape"], ["nhwc"]),
        make("Pad", ["nhwc", "pads", "zero"], ["output"]),
    ]
    middle = [n for n in graph.node if n not in (first, last)]
    made = helper.make_graph(
        [*before, *middle, *after],
        "core",
        [helper.make_tensor_value_info("input", TensorProto.INT8, source.shape)],
        [helper.make_tensor_value_info("output", TensorProto.INT8, sink.shape)],
        [*_free_batch(graph), *(numpy_helper.from_array(v, k) for k, v in extra.items())],
    )
    lowered = helper.make_model(made, opset_imports=model.opset_import, ir_version=8)
    return lowered.SerializeToString(), (source, sink)


def _take_padding(graph, first):
    """Give the first convolution's padding to the host, where nobody else reads the input."""
    readers = [n for n in graph.node if first.output[0] in n.input]
    users = [n for n in graph.node for r in readers if r.output[0] in n.input]
    if len(users) != 1 or users[0].op_type != "Conv":
        return [0, 0, 0, 0]
    for attribute in users[0].attribute:
        if attribute.name == "pads":
            pads = list(attribute.ints)
            attribute.ints[:] = [0, 0, 0, 0]
            return pads
    return [0, 0, 0, 0]


def _free_batch(graph):
    """Initializers, with the 1 that begins a Reshape's target made "as it is"."""
    targets = {n.input[1] for n in graph.node if n.op_type == "Reshape"}
    for tensor in graph.initializer:
        if tensor.name in targets:
            shape = numpy_helper.to_array(tensor).copy()
            shape[0] = 0
            tensor = numpy_helper.from_array(shape, tensor.name)
        yield tensor


def lower(model, cores):
    """The files of a compiled model, by name."""
    core, (source, sink) = device_core(model.parts, cores)
    after = model.parts["postamble"]
    manifest = {
        "manifest_version": "1.1",
        "model_lib_file": "model.json",
        "quantized_model_file": "quantized_model.json",
        "preprocess_graph": None,
        "postprocess_graph": "postprocess_graph.onnx" if after else None,
        "input_shapes": [source.shape],
        "output_shapes": [sink.shape],
        "quantize_params": [[source.scale, source.zero_point]],
        "dequantize_params": [[sink.scale, sink.zero_point]],
        "n_padded_ch_inputs": [source.pads],
        "n_padded_ch_outputs": [sink.pads],
        "input_tensor_layout": "NHWC",
    }
    files = {
        "model.json": json.dumps({"axmodel": 4 if RELEASE < (1, 8) else 5}).encode(),
        "manifest.json": json.dumps(manifest, indent=1).encode(),
        "quantized_model.json": json.dumps(model.parts["info"]).encode(),
        "core.onnx": core,
    }
    if after:
        files["postprocess_graph.onnx"] = after
    return files
