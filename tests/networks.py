"""Small float networks as ONNX, with the operators of real students, for tests of the int8 side."""

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper


def weights(random, *shape):
    """Normal, of the size that keeps activations as they are."""
    return random.normal(0, 1 / np.sqrt(np.prod(shape[1:])), shape).astype(np.float32)


def student(nodes, shape, constants, out_rank=4):
    """A float graph from `input`, (1, *shape), to `logits`."""
    graph = helper.make_graph(
        nodes,
        "student",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, [1, *shape])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [None] * out_rank)],
        [numpy_helper.from_array(np.asarray(v), n) for n, v in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return onnx.shape_inference.infer_shapes(model, strict_mode=True)


def residual_network(seed, channels=8, side=12, classes=7):
    """Stem, inverted residual with squeeze and excite, concat, pools, classifier."""
    random = np.random.default_rng(seed)
    c, wide = channels, 3 * channels
    constants = {
        "w1": weights(random, c, 3, 3, 3),
        "b1": weights(random, c),
        "w2": weights(random, wide, c, 1, 1),
        "b2": weights(random, wide),
        "w3": weights(random, wide, 1, 3, 3),
        "b3": weights(random, wide),
        "w4": weights(random, c, wide, 1, 1),
        "b4": weights(random, c),
        "w5": weights(random, c, wide, 1, 1),
        "b5": weights(random, c),
        "w6": weights(random, wide, c, 1, 1),
        "w7": weights(random, classes, 2 * c),
        "b7": weights(random, classes),
        "zero": np.float32(0),
        "six": np.float32(6),
    }
    make = helper.make_node
    nodes = [
        make("Conv", ["input", "w1", "b1"], ["c1"], pads=[1, 1, 1, 1], strides=[2, 2]),
        make("HardSwish", ["c1"], ["a1"]),
        make("Conv", ["a1", "w2", "b2"], ["c2"]),
        make("Relu", ["c2"], ["a2"]),
        make("Conv", ["a2", "w3", "b3"], ["c3"], pads=[1, 1, 1, 1], group=wide),
        make("Clip", ["c3", "zero", "six"], ["a3"]),
        make("GlobalAveragePool", ["a3"], ["pooled"]),
        make("Conv", ["pooled", "w5", "b5"], ["c5"]),
        make("Relu", ["c5"], ["a5"]),
        make("Conv", ["a5", "w6"], ["c6"]),
        make("HardSigmoid", ["c6"], ["gate"], alpha=1 / 6, beta=0.5),
        make("Mul", ["a3", "gate"], ["gated"]),
        make("Conv", ["gated", "w4", "b4"], ["c4"]),
        make("Add", ["c4", "a1"], ["sum"]),
        make("Concat", ["sum", "a1"], ["both"], axis=1),
        make("MaxPool", ["both"], ["small"], kernel_shape=[2, 2], strides=[2, 2]),
        make("GlobalAveragePool", ["small"], ["mean"]),
        make("Flatten", ["mean"], ["flat"]),
        make("Gemm", ["flat", "w7", "b7"], ["logits"], transB=1),
    ]
    return student(nodes, (3, side, side), constants, out_rank=2)


def plain_network(seed, *, norm=True, relu=True, spread=1.0, classes=5):
    """Convolutions with BatchNorm, depthwise and dense, as torch exports them in training form.

    `spread` makes the channels' weights unequal, which is what equalization is for.
    """
    random = np.random.default_rng(seed)
    constants, nodes, last, channels = {}, [], "input", 3
    for i, (out, group) in enumerate([(8, 1), (16, 1), (16, 16), (8, 1)]):
        uneven = spread ** random.normal(size=(out, 1, 1, 1))
        w = weights(random, out, channels // group, 3, 3) * uneven.astype(np.float32)
        constants[f"w{i}"] = w
        constants[f"b{i}"] = weights(random, out)
        nodes.append(
            helper.make_node("Conv", [last, f"w{i}", f"b{i}"], [f"c{i}"], pads=[1] * 4, group=group)
        )
        last = f"c{i}"
        if norm:
            for name, values in (
                ("g", random.uniform(0.5, 2, out)),
                ("h", random.normal(0, 0.3, out)),
                ("m", random.normal(0, 0.3, out)),
                ("v", random.uniform(0.5, 2, out)),
            ):
                constants[f"{name}{i}"] = values.astype(np.float32)
            names = [f"{n}{i}" for n in "ghmv"]
            nodes.append(helper.make_node("BatchNormalization", [last, *names], [f"n{i}"]))
            last = f"n{i}"
        if relu:
            nodes.append(helper.make_node("Relu", [last], [f"r{i}"]))
            last = f"r{i}"
        channels = out
    constants["wl"] = weights(random, channels, classes)
    nodes += [
        helper.make_node("GlobalAveragePool", [last], ["pooled"]),
        helper.make_node("Flatten", ["pooled"], ["flat"]),
        helper.make_node("Gemm", ["flat", "wl"], ["logits"], alpha=0.5),
    ]
    return student(nodes, (3, 10, 10), constants, out_rank=2)
