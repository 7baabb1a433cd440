"""The emulator's arithmetic against a reference in plain integers."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from metis.emulator.backend import Emulator


@pytest.mark.parametrize("classes", [7, 64])
def test_a_pointwise_convolution_equals_int32_arithmetic(tmp_path, classes):
    """acc = sum (q_x - z_x) q_w + q_b in int32; q_y = clip(rint(acc * s_x s_w / s_y) + z_y).

    Inputs at the ends of the range and full weights: what saturates in 16 bit would show here.
    """
    random = np.random.default_rng(0)
    features = 96
    weight = random.choice([-1.0, 1.0], (classes, features)) * random.uniform(0.9, 1, (classes, 1))
    bias = random.normal(0, 5, classes)
    graph = helper.make_graph(
        [
            helper.make_node("Conv", ["input", "w", "b"], ["logits"]),
        ],
        "pointwise",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, [1, features, 1, 1])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [1, classes, 1, 1])],
        [
            numpy_helper.from_array(weight.astype(np.float32)[..., None, None], "w"),
            numpy_helper.from_array(bias.astype(np.float32), "b"),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, tmp_path / "student.onnx")
    samples = random.choice([-1.0, 1.0], (40, 1, features, 1, 1)).astype(np.float32)
    samples[::2] = random.uniform(-1, 1, samples[::2].shape)
    np.save(tmp_path / "samples.npy", samples)
    emulator = Emulator()
    quantized = emulator.quantize(
        tmp_path / "student.onnx",
        tmp_path / "samples.npy",
        tmp_path / "int8",
        scheme="per_tensor_min_max",
    )
    graph = onnx.load(quantized.path / quantized.entry).graph
    constants = {i.name: numpy_helper.to_array(i) for i in graph.initializer}
    conv = next(node for node in graph.node if node.op_type == "Conv")
    makers = {out: node for node in graph.node for out in node.output}
    w, w_scale, _ = (constants[name] for name in makers[conv.input[1]].input)
    b = constants[makers[conv.input[2]].input[0]]
    w = w.reshape(classes, features)
    source, sink = quantized.inputs[0], quantized.outputs[0]
    assert w.dtype == np.int8
    assert np.abs(w).max() == 127
    assert b.dtype == np.int32

    tensors = samples[:, 0]
    codes = np.rint(tensors.reshape(-1, features) / np.float32(source.scale) + source.zero_point)
    codes = np.clip(codes, -128, 127).astype(np.int32)
    accumulated = (codes - source.zero_point) @ w.astype(np.int32).T + b
    factor = (np.float32(source.scale) * w_scale) / np.float32(sink.scale)
    out = np.rint(accumulated.astype(np.float32) * factor) + sink.zero_point
    expected = (np.clip(out, -128, 127) - sink.zero_point) * np.float32(sink.scale)
    found = emulator.infer(quantized, tensors).reshape(-1, classes)
    assert np.array_equal(found, expected.astype(np.float32))
