"""The rules for operators on tiny graphs, kept and broken, and on networks that people pick."""

import numpy as np
import onnx
import pytest
import timm
from onnx import TensorProto, helper, numpy_helper

from metis.operators import check_model, count_macs
from pipeline.students import export_student
from preprocessing.contract import StudentInput

X = (1, 8, 16, 16)


def graph(op, inputs=("x",), shape=X, constants=None, opset=17, outputs=("y",), **attributes):
    """One node between x (and z, of the same shape) and y."""
    tensors = [numpy_helper.from_array(np.asarray(v), k) for k, v in (constants or {}).items()]
    sources = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
        for name in ("x", "z")
        if name in inputs
    ]
    model = helper.make_model(
        helper.make_graph(
            [helper.make_node(op, list(inputs), list(outputs), name="it", **attributes)],
            "g",
            sources,
            [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs],
            tensors,
        ),
        opset_imports=[helper.make_opsetid("", opset)],
        ir_version=8,
    )
    return model


def weights(*shape):
    return np.ones(shape, np.float32)


def ints(*values):
    return np.array(values, np.int64)


def floats(value):
    return np.array(value, np.float32)


CONV = {"inputs": ("x", "w"), "constants": {"w": weights(8, 8, 3, 3)}}
DEPTHWISE = {"inputs": ("x", "w"), "group": 8}
POOL = {"kernel_shape": [3, 3]}

PASSES = [
    ("Conv", CONV),
    ("Conv", {**DEPTHWISE, "constants": {"w": weights(8, 1, 11, 11)}}),
    ("Conv", {"inputs": ("x", "w"), "constants": {"w": weights(8, 8, 3, 1)}}),
    ("Add", {"inputs": ("x", "z")}),
    ("Add", {"inputs": ("x", "c"), "constants": {"c": weights(1, 8, 1, 1)}}),
    ("Mul", {"inputs": ("x", "c"), "constants": {"c": floats(2.0)}}),
    ("Mul", {"inputs": ("x", "z")}),
    ("Sub", {"inputs": ("x", "c"), "constants": {"c": weights(1, 8, 1, 1)}}),
    ("Clip", {"inputs": ("x", "a", "b"), "constants": {"a": floats(0), "b": floats(6)}}),
    ("Clip", {"inputs": ("x", "a", "b"), "constants": {"a": floats(-1), "b": floats(1)}}),
    ("AveragePool", POOL),
    ("AveragePool", {**POOL, "pads": [1, 1, 1, 1], "count_include_pad": 1}),
    ("MaxPool", {**POOL, "pads": [1, 1, 1, 1]}),
    ("Concat", {"inputs": ("x", "z"), "axis": 1}),
    ("ConvTranspose", {"inputs": ("x", "w"), "constants": {"w": weights(8, 4, 2, 2)}}),
    ("HardSigmoid", {"alpha": 1 / 6, "beta": 0.5}),
    ("HardSwish", {}),
    ("Flatten", {"axis": 1}),
    ("Gemm", {"inputs": ("x", "w"), "shape": (1, 8), "constants": {"w": weights(8, 3)}}),
    ("PRelu", {"inputs": ("x", "s"), "constants": {"s": weights(8, 1, 1)}}),
    ("Pad", {"inputs": ("x", "p"), "constants": {"p": ints(0, 0, 1, 1, 0, 64, 1, 1)}}),
    ("Reshape", {"inputs": ("x", "s"), "shape": (1, 8, 1, 1), "constants": {"s": ints(1, -1)}}),
    (
        "Resize",
        {
            "inputs": ("x", "", "s"),
            "constants": {"s": np.array([1, 1, 2, 2], np.float32)},
            "mode": "linear",
            "coordinate_transformation_mode": "half_pixel",
        },
    ),
    (
        "Slice",
        {
            "inputs": ("x", "a", "b", "c"),
            "constants": {"a": ints(0), "b": ints(4), "c": ints(1)},
        },
    ),
    ("Transpose", {"perm": [0, 1, 2, 3]}),
]

BREAKS = [
    ("Conv", {**CONV, "auto_pad": "SAME_UPPER"}, "auto_pad", True),
    ("Conv", {**DEPTHWISE, "constants": {"w": weights(8, 1, 12, 12)}}, "144 effective taps", False),
    ("Conv", {**DEPTHWISE, "constants": {"w": weights(8, 1, 3, 1)}}, "must be square", False),
    (
        "Conv",
        {**DEPTHWISE, "constants": {"w": weights(8, 1, 5, 5)}, "dilations": [3, 3]},
        "169 effective taps",
        False,
    ),
    ("Add", {"inputs": ("x", "c"), "constants": {"c": weights(*X)}}, "partner", False),
    ("Add", {"inputs": ("x", "c"), "constants": {"c": weights(8, 1, 1)}}, "partner", False),
    ("Mul", {"inputs": ("x", "x")}, "same tensor", False),
    ("Sub", {"inputs": ("x", "z")}, "partner", False),
    (
        "Clip",
        {"inputs": ("x", "a", "b"), "constants": {"a": floats(0), "b": floats(1)}},
        "Clip",
        False,
    ),
    ("AveragePool", {**POOL, "pads": [1, 1, 1, 1]}, "count_include_pad", False),
    (
        "AveragePool",
        {**POOL, "pads": [2, 2, 2, 2], "count_include_pad": 1},
        "half the kernel",
        False,
    ),
    ("MaxPool", {**POOL, "storage_order": 1}, "storage_order", False),
    ("Concat", {"inputs": ("x", "z"), "axis": 0}, "rank 4", False),
    (
        "ConvTranspose",
        {"inputs": ("x", "w"), "constants": {"w": weights(8, 1, 2, 2)}, "group": 8},
        "grouped",
        False,
    ),
    (
        "ConvTranspose",
        {"inputs": ("x", "w"), "constants": {"w": weights(8, 4, 2, 2)}, "pads": [0, 0, 1, 1]},
        "same at both ends",
        False,
    ),
    ("HardSigmoid", {}, "alpha 0.2", False),
    ("Flatten", {"axis": -3}, "axis", True),
    (
        "Gemm",
        {"inputs": ("x", "w"), "shape": (8, 1), "constants": {"w": weights(8, 3)}, "transA": 1},
        "transA",
        True,
    ),
    ("PRelu", {"inputs": ("x", "s"), "constants": {"s": weights(8, 16, 16)}}, "slope", False),
    (
        "Pad",
        {"inputs": ("x", "p"), "constants": {"p": ints(0, 0, 1, 1, 0, 3, 1, 1)}},
        "multiples of 64",
        False,
    ),
    (
        "Pad",
        {"inputs": ("x", "p"), "constants": {"p": ints(0, 0, 1, 1, 0, 0, 1, 1)}, "mode": "edge"},
        "constant padding",
        False,
    ),
    ("Reshape", {"inputs": ("x", "s"), "constants": {"s": ints(1, 8, 256)}}, "no-ops", False),
    (
        "Resize",
        {
            "inputs": ("x", "", "s"),
            "constants": {"s": np.array([1, 1, 2, 2], np.float32)},
            "mode": "linear",
            "coordinate_transformation_mode": "align_corners",
        },
        "align_corners",
        False,
    ),
    (
        "Resize",
        {
            "inputs": ("x", "", "s"),
            "constants": {"s": np.array([1, 1, 1.5, 1.5], np.float32)},
            "mode": "linear",
            "coordinate_transformation_mode": "half_pixel",
        },
        "integer factor",
        False,
    ),
    (
        "Slice",
        {
            "inputs": ("x", "a", "b", "c"),
            "constants": {"a": ints(0), "b": ints(4), "c": ints(2)},
        },
        "multiple of 64",
        False,
    ),
    ("Split", {"axis": 1, "outputs": ("y", "y2")}, "first operator", False),
    ("Transpose", {"perm": [0, 2, 3, 1]}, "transposes", False),
    ("Selu", {"alpha": 1.0}, "default", False),
]


@pytest.mark.parametrize(("op", "options"), PASSES)
def test_what_the_rules_allow_is_for_the_chip(op, options):
    report = check_model(graph(op, **options))
    assert [node.verdict for node in report.nodes] == ["chip"]
    assert report.graph == ()


@pytest.mark.parametrize(("op", "options", "words", "curable"), BREAKS)
def test_what_breaks_a_rule_is_refused_with_the_rule(op, options, words, curable):
    (node,) = check_model(graph(op, **options)).nodes
    assert node.verdict == "refused"
    assert words in node.reason
    assert node.curable == curable
    assert bool(check_model(graph(op, **options)).fatal) != curable


def chain(*ops):
    """x through some operators without parameters."""
    names = ["x", *(f"t{i}" for i in range(1, len(ops))), "y"]
    nodes = [
        helper.make_node(op, [names[i]], [names[i + 1]], name=f"n{i}") for i, op in enumerate(ops)
    ]
    value = helper.make_tensor_value_info
    body = helper.make_graph(
        nodes, "g", [value("x", TensorProto.FLOAT, X)], [value("y", TensorProto.FLOAT, X)]
    )
    return helper.make_model(body, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def test_what_is_not_listed_runs_on_the_host_at_the_edges_and_nowhere_else():
    report = check_model(chain("Exp", "Neg", "Relu", "Erf", "Sigmoid", "Softmax", "Log"))
    assert [node.verdict for node in report.nodes] == [
        "host edge",
        "host edge",
        "chip",
        "refused",
        "chip",
        "host edge",
        "host edge",
    ]
    assert [node.op_type for node in report.fatal] == ["Erf"]
    assert "refused   Erf" in "\n".join(report.lines())


def test_the_graph_as_a_whole_has_one_opset_and_fixed_shapes():
    assert "opset 18" in check_model(graph("Relu", opset=18)).graph[0]
    assert "batch 4" in check_model(graph("Relu", shape=(4, 8, 16, 16))).graph[0]
    assert "free dimensions" in check_model(graph("Relu", shape=("N", 8, 16, 16))).graph[0]


def test_macs_are_counted():
    assert count_macs(graph("Conv", **CONV)) == 8 * 14 * 14 * 8 * 9
    assert count_macs(graph("Conv", **DEPTHWISE, constants={"w": weights(8, 1, 3, 3)})) == (
        8 * 14 * 14 * 9
    )
    gemm = {"inputs": ("x", "w"), "shape": (1, 8), "constants": {"w": weights(8, 3)}}
    assert count_macs(graph("Gemm", **gemm)) == 24


def exported(name, path, size):
    given = StudentInput(
        modality="optical",
        bands=(0, 1, 2),
        patch_hw=(4, 4),
        size_hw=(size, size),
        interpolation="nearest",
        half_pixel_centers=False,
        device_resize=False,
        encoding="contract",
        grey_lo=(0.0,) * 3,
        grey_hi=(255.0,) * 3,
        mean=(0.0,) * 3,
        std=(1.0,) * 3,
        contract="0" * 64,
    )
    export_student(timm.create_model(name, num_classes=17), given, path)
    return onnx.load(path)


#: Written by hand from the rules: what of a network is refused, and what of that can't be cured.
FAMILIES = [
    ("resnet18", 64, set(), set()),
    ("mobilenetv4_conv_small", 64, set(), set()),
    # Squeeze-and-excitation averages by ReduceMean, which a GlobalAveragePool replaces.
    ("mobilenetv3_small_100", 64, {"ReduceMean"}, set()),
    pytest.param("efficientnet_b0", 224, {"ReduceMean"}, set(), marks=pytest.mark.slow),
    pytest.param("efficientnet_lite0", 224, set(), set(), marks=pytest.mark.slow),
    pytest.param("mobilenetv4_conv_medium", 224, set(), set(), marks=pytest.mark.slow),
    pytest.param("regnetx_002", 224, set(), set(), marks=pytest.mark.slow),
    pytest.param("repvgg_a0", 224, set(), set(), marks=pytest.mark.slow),
    pytest.param("densenet121", 224, set(), set(), marks=pytest.mark.slow),
    pytest.param("mobilenetv2_100", 224, set(), set(), marks=pytest.mark.slow),
    pytest.param("ghostnet_100", 224, {"ReduceMean"}, set(), marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("name", "size", "refused", "fatal"), FAMILIES)
def test_networks_that_people_pick(tmp_path, name, size, refused, fatal):
    report = check_model(exported(name, tmp_path / "n.onnx", size))
    assert {node.op_type for node in report.refused} == refused
    assert {node.op_type for node in report.fatal} == fatal
    assert report.share_on_chip == 1.0


@pytest.mark.filterwarnings("ignore")  # of torch's tracer, about attention
@pytest.mark.parametrize("name", ["test_vit"])
def test_transformers_are_refused(tmp_path, name):
    """Attention multiplies matrices, transposes, and normalizes by layer: none of it is listed."""
    report = check_model(exported(name, tmp_path / "n.onnx", 160))
    assert {"MatMul", "Transpose", "LayerNormalization"} <= {n.op_type for n in report.fatal}
    assert report.share_on_chip < 1
