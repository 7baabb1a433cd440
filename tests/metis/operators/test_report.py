"""The rules for operators on tiny graphs, kept and broken."""

import time

import numpy as np
import onnx
import pytest
import timm
from onnx import TensorProto, helper, numpy_helper

from metis.operators.report import REWRITES, check_model, count_macs
from pipeline.networks.export import export_network

X = (1, 8, 16, 16)
X64 = (1, 64, 16, 16)
ONE_CHANNEL = (1, 1, 16, 16)
GATE = (1, 8, 1, 1)


def one(op, *inputs, outputs=1, opset=17, **attributes):
    """A graph of one node.

    Inputs are shapes (of the graph's inputs a0, a1, ...), arrays (constants) or names ("" leaves
    an optional one out).
    """
    names, sources, constants = [], [], []
    for given in inputs:
        if isinstance(given, str):
            names.append(given)
        elif isinstance(given, tuple):
            names.append(f"a{len(sources)}")
            sources.append(helper.make_tensor_value_info(names[-1], TensorProto.FLOAT, given))
        else:
            names.append(f"c{len(constants)}")
            constants.append(numpy_helper.from_array(given, names[-1]))
    made = [f"y{number}" for number in range(outputs)]
    return helper.make_model(
        helper.make_graph(
            [helper.make_node(op, names, made, name="it", **attributes)],
            "g",
            sources,
            [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in made],
            constants,
        ),
        opset_imports=[helper.make_opsetid("", opset)],
        ir_version=8,
    )


def weights(*shape):
    return np.ones(shape, np.float32)


def ints(*values):
    return np.array(values, np.int64)


def floats(*values):
    return np.array(values, np.float32)


def scalar(value):
    return np.array(value, np.float32)


LINEAR = {"mode": "linear", "coordinate_transformation_mode": "half_pixel"}
NEAREST = {"coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}
TWICE = floats(1, 1, 2, 2)

PASSES = [
    # Two activations of one shape, per channel (a constant or a gate), a scalar.
    one("Add", X, X),
    one("Add", X, "a0"),  # the rule excludes the same tensor for Mul only
    one("Add", X, weights(1, 8, 1, 1)),
    one("Add", weights(1, 8, 1, 1), X),
    one("Add", X, scalar(3)),
    one("Mul", X, X),
    one("Mul", X, GATE),
    one("Mul", scalar(2), X),
    one("Mul", ONE_CHANNEL, scalar(2)),
    one("Sub", X, weights(1, 8, 1, 1)),
    one("Sub", scalar(1), X),
    one("AveragePool", X, kernel_shape=[3, 3]),
    one("AveragePool", X, kernel_shape=[3, 3], pads=[0, 0, 0, 0]),
    one("AveragePool", X, kernel_shape=[3, 3], pads=[1, 1, 1, 1], count_include_pad=1),
    # Asymmetric pads may be wider than half the kernel, by the rule as printed.
    one("AveragePool", X, kernel_shape=[3, 3], pads=[2, 2, 0, 0], count_include_pad=1),
    one("BatchNormalization", X, *[weights(8)] * 4),
    one("Clip", X, scalar(0), scalar(6)),
    one("Clip", X, scalar(-1), scalar(1)),
    one("Concat", X, X, axis=1),
    one("Concat", X, X, axis=-1),
    one("Conv", X, weights(8, 8, 3, 3), auto_pad="NOTSET"),
    one("Conv", X, weights(8, 8, 3, 1), strides=[2, 1]),  # ungrouped ones may be oblong
    one("Conv", X, weights(8, 1, 11, 11), group=8),  # 121 taps
    one("Conv", X, weights(8, 1, 3, 3), group=8, dilations=[5, 5]),  # 11 * 11 effective taps
    one("ConvTranspose", X, weights(8, 4, 2, 2), pads=[1, 1, 1, 1]),
    one("Flatten", X, axis=1),  # at the end
    one("Gemm", (1, 8), weights(8, 3)),
    one("GlobalAveragePool", X),
    one("GlobalMaxPool", X),
    one("HardSigmoid", X, alpha=1 / 6, beta=0.5),
    one("HardSwish", X),
    one("LeakyRelu", X, alpha=0.3),
    one("MaxPool", X, kernel_shape=[3, 3], pads=[1, 1, 1, 1], ceil_mode=1),
    one("PRelu", X, weights(8, 1, 1)),
    one("PRelu", X, weights(1)),
    one("Pad", X, ints(0, 0, 1, 1, 0, 0, 1, 1)),
    one("Pad", X, ints(0, 64, 1, 1, 0, 128, 0, 0), scalar(0)),
    one("Relu", X),
    one("Reshape", X, ints(1, 8, 16, 16)),
    one("Reshape", GATE, ints(1, -1)),
    one("Reshape", GATE, ints(1, 8)),
    one("Resize", X, "", TWICE, **LINEAR),
    one("Resize", X, "", TWICE, **NEAREST),
    # 16 to 33 is one pixel more than twice.
    one("Resize", X, "", "", ints(1, 8, 33, 33), **NEAREST),
    one("Selu", X),
    one("Sigmoid", X),
    one("Slice", X, ints(0), ints(4), ints(1)),
    one("Slice", X, ints(0), ints(8), ints(-3), ints(2)),  # every other channel
    one("Slice", X64, ints(0), ints(8), ints(2)),
    one("Squeeze", GATE, ints(2, 3)),  # at the end
    one("Tanh", X),
    one("Transpose", X, perm=[0, 1, 2, 3]),
]

SAME = {"auto_pad": "SAME_UPPER"}

#: Graph, words of the reason, and the exact rewrite that cures it, if there is one.
BREAKS = [
    (one("Add", X, weights(*X)), "[1, 8, 16, 16]", ""),  # such as a learned position
    (one("Add", X, weights(8, 1, 1)), "[8, 1, 1]", "operand shape"),
    (one("Add", X, weights(1)), "[1]", "operand shape"),
    (one("Add", (1, 8), (1, 1)), "[1, 1]", ""),
    (one("Mul", X, "a0"), "same tensor", ""),
    (one("Mul", X, ONE_CHANNEL), "[1, 1, 16, 16]", ""),  # spatial attention
    (one("Mul", (1, 8), scalar(2)), "[1, 8] and []", ""),
    (one("Sub", X, X), "[1, 8, 16, 16] and [1, 8, 16, 16]", ""),
    # The pads are not 0 (15 steps of 1 and a kernel of 3 need 18), so two rules are broken.
    (one("AveragePool", X, kernel_shape=[3, 3], **SAME), "count_include_pad", ""),
    (one("AveragePool", X, kernel_shape=[2, 2], strides=[2, 2], **SAME), "aut", "explicit pads"),
    (one("AveragePool", X, kernel_shape=[3, 3], pads=[1, 1, 1, 1]), "count_include_pad", ""),
    (
        one("AveragePool", X, kernel_shape=[3, 3], pads=[2, 2, 2, 2], count_include_pad=1),
        "half the kernel",
        "",
    ),
    (one("AveragePool", (1, 8, 16), kernel_shape=[3], pads=[0, 0]), "four numbers", ""),
    (one("Clip", X, scalar(0), scalar(1)), "Clip(0, 6)", ""),
    (one("Clip", X, scalar(0)), "Clip(0, 6)", ""),
    (one("Clip", X, scalar(0), ()), "constants", ""),
    (one("Concat", X, X, axis=0), "axis", ""),
    (one("Concat", (1, 8), (1, 8), axis=1), "rank 4", ""),
    (one("Conv", X, weights(8, 8, 3, 3), **SAME), "auto_pad", "explicit pads"),
    (one("Conv", X, weights(8, 1, 12, 12), group=8), "144 effective taps", ""),
    (one("Conv", X, weights(8, 1, 5, 5), group=8, dilations=[3, 3]), "169 effective taps", ""),
    (one("Conv", X, weights(8, 1, 3, 1), group=8), "kernel 3x1", ""),
    (one("Conv", X, weights(8, 1, 3, 3), group=8, strides=[2, 1]), "strides [2, 1]", ""),
    (one("Conv", X, weights(8, 1, 3, 3), group=8, dilations=[1, 2]), "dilations [1, 2]", ""),
    # Explicit pads do not cure the oblong kernel.
    (one("Conv", X, weights(8, 1, 3, 1), group=8, **SAME), "kernel 3x1", ""),
    (one("ConvTranspose", X, weights(8, 1, 2, 2), group=8), "grouped", ""),
    (one("ConvTranspose", X, weights(8, 4, 2, 2), pads=[0, 0, 1, 1]), "ends", ""),
    (one("ConvTranspose", X, weights(8, 4, 2, 2), output_shape=[18, 18]), "output_shape", ""),
    (one("ConvTranspose", X, weights(8, 4, 2, 2), auto_pad="VALID"), "auto", "explicit pads"),
    (one("ConvTranspose", X, weights(8, 4, 2, 2), **SAME), "auto_pad", ""),
    (one("Flatten", X, axis=-3), "axis is negative", "front axis"),
    (one("Gemm", (8, 1), weights(8, 3), transA=1), "transA", "gemm transpose"),
    (one("HardSigmoid", X), "alpha 0.2", ""),
    (one("MaxPool", X, kernel_shape=[3, 3], **SAME), "auto_pad", "explicit pads"),
    (one("MaxPool", X, kernel_shape=[3, 3], storage_order=1), "storage_order", "storage order"),
    (one("MaxPool", X, kernel_shape=[3, 3], storage_order=1, outputs=2), "storage_order", ""),
    (one("PRelu", X, weights(8, 16, 16)), "slope", ""),
    (one("PRelu", (8,), weights(8)), "slope", ""),
    (one("Pad", X, ints(0, 0, 1, 1, 0, 3, 1, 1)), "channels by 0 and 3", ""),
    (one("Pad", X, ints(1, 0, 0, 0, 0, 0, 0, 0)), "batch", ""),
    (one("Pad", X, ints(0, 0, 1, 1, 0, 0, 1, 1), mode="edge"), "mode is edge", ""),
    (one("Pad", X, ints(0, 0, 1, 1, 0, 0, 1, 1), scalar(1)), "not 0", ""),
    (one("Reshape", X, ints(1, 8, 256)), "[1, 8, 256]", ""),
    (one("Reshape", X, ints(8, 256)), "[8, 256]", ""),
    (one("Reshape", X, ints(1, 2048)), "[1, 2048]", "flatten"),
    (one("Reshape", GATE, ints(1, 8), allowzero=1), "allowzero", "reshape target"),
    # The rule compares the target as it is written: what means the same must be written out.
    (one("Reshape", GATE, ints(0, 8)), "not written as [1, 8]", "reshape target"),
    (one("Reshape", GATE, ints(-1, 8)), "not written as [1, 8]", "reshape target"),
    (one("Reshape", X, ints(0, 0, 16, -1)), "written as [1, 8, 16, 16]", "reshape target"),
    (one("Reshape", X, ints(0, -1)), "[1, 2048]", "flatten"),
    (
        one("Resize", X, "", TWICE, mode="linear", coordinate_transformation_mode="align_corners"),
        "align_corners",
        "",
    ),
    (one("Resize", X, "", TWICE, mode="cubic"), "cubic", ""),
    (one("Resize", X, "", TWICE, nearest_mode="floor"), "nearest, half_pixel, floor", ""),
    (one("Resize", X, "", floats(1, 1, 1.5, 1.5), **LINEAR), "no integer", ""),
    (one("Resize", X, "", floats(1, 1, 2, 4), **LINEAR), "factors differ", ""),
    (one("Resize", X, "", floats(1, 1, 0.5, 0.5), **NEAREST), "16x16 to 8x8", ""),
    (one("Resize", X, floats(), TWICE, **LINEAR), "roi", "resize roi"),
    (one("Resize", X, floats(*[0] * 4, *[1] * 4), TWICE, **NEAREST), "roi", "resize roi"),
    (one("Selu", X, alpha=1.0), "alpha 1", ""),
    (one("Slice", X, ints(0), ints(4), ints(2)), "8 channels", ""),
    (one("Slice", X64, ints(0), ints(8), ints(2), ints(2)), "step 2", ""),
    (one("Slice", X64, ints(0, 0), ints(8, 8), ints(2, 3)), "2 axes", "slice per axis"),
    (one("Slice", X, ints(0, 0), ints(8, 8), ints(2, 3)), "8 channels", ""),
    (one("Slice", (8,), ints(0), ints(4), ints(0)), "no channels", ""),
    (one("Slice", X, ints(), ints(), ints()), "0 axes", ""),
    (one("Split", X, axis=1, outputs=2), "first operator", ""),
]


def checked(model):
    """The report on a model, which is a correct one."""
    shaped = onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True)
    onnx.checker.check_model(shaped)
    return check_model(model)


def identified(cases):
    """Cases with an operator and a number as their names."""
    models = [case[0] if isinstance(case, tuple) else case for case in cases]
    return [f"{model.graph.node[0].op_type}-{i}" for i, model in enumerate(models)]


@pytest.mark.parametrize("model", PASSES, ids=identified(PASSES))
def test_what_the_rules_allow_is_for_the_chip(model):
    report = checked(model)
    (node,) = report.nodes
    assert (node.verdict, node.reason, node.curable) == ("chip", "", False)
    assert node.rule
    assert report.refusals == []


@pytest.mark.parametrize(("model", "words", "rewrite"), BREAKS, ids=identified(BREAKS))
def test_what_breaks_a_rule_is_refused_with_the_rule(model, words, rewrite):
    report = check_model(model)
    (node,) = report.nodes
    assert node.verdict == "refused"
    assert words in node.reason
    assert node.rule
    assert node.rewrites == ((rewrite,) if rewrite else ())
    assert (node in report.fatal) == (not rewrite)
    assert node in report.refusals
    assert REWRITES.get(rewrite, "") in node.cure


def net(body, x="1,8,16,16", y="1,8,16,16", opset=17):
    """A graph in ONNX's own textual form, from x to y."""
    head = f'<ir_version: 8, opset_import: ["" : {opset}]> g'
    return onnx.parser.parse_model(f"{head} (float[{x}] x) => (float[{y}] y) {body}")


def verdicts(model):
    return [(n.op_type, n.verdict) for n in checked(model).nodes]


def test_what_is_not_listed_runs_on_the_host_at_the_edges_and_nowhere_else():
    model = net("""{
        a = Exp(x)
        b = Neg(a)
        c = Relu(b)
        d = Erf(c)
        e = Sigmoid(d)
        f = Softmax(e)
        y = Log(f)
    }""")
    report = checked(model)
    assert verdicts(model) == [
        ("Exp", "host edge"),
        ("Neg", "host edge"),
        ("Relu", "chip"),
        ("Erf", "refused"),
        ("Sigmoid", "chip"),
        ("Softmax", "host edge"),
        ("Log", "host edge"),
    ]
    assert [node.op_type for node in report.fatal] == ["Erf"]
    assert "Hardswish" in report.fatal[0].cure
    lines = list(report.lines())
    assert lines[4].startswith("refused   Erf")
    assert "2 nodes on the chip, 4 on the host, 1 refused (0 of them curable)" in lines[-1]


def test_an_edge_ends_where_the_chip_reads_it_again():
    """A skip around the chip's part from a host node is no edge: the chip reads its end."""
    model = net("{ a = Exp(x)  b = Relu(a)  c = Neg(a)  y = Add(b, c) }")
    # Neg is reached from the input through Exp alone: the host does both before the chip starts.
    assert verdicts(model)[2] == ("Neg", "host edge")
    model = net("{ a = Relu(x)  b = Neg(a)  y = Add(a, b) }")
    assert verdicts(model)[1] == ("Neg", "refused")


def test_a_network_with_nothing_for_the_chip_is_refused():
    report = checked(net("{ a = Exp(x)  y = Log(a) }"))
    assert [node.verdict for node in report.nodes] == ["host edge"] * 2
    assert "nothing" in report.fatal[0].reason


PLACES = [
    # Before a Gemm, also with what is removed in between.
    ("{ a = Flatten(x)  b = Dropout(a)  y = Gemm(b, w) }", ["chip", "refused", "chip"]),
    # Before what the host does.
    ("{ a = Flatten(x)  y = Softmax(a) }", ["chip", "host edge"]),
    ("{ a = Flatten(x)  b = Relu(a)  y = Gemm(b, w) }", ["refused", "chip", "chip"]),
    ("{ a = Squeeze(x, at)  y = Gemm(a, w) }", ["chip", "chip"]),
    ("{ a = Squeeze(x, at)  b = Relu(a)  y = Gemm(b, w) }", ["refused", "chip", "chip"]),
]


@pytest.mark.parametrize(("body", "expected"), PLACES)
def test_flatten_and_squeeze_have_their_places(body, expected):
    model = net(body, x="1,8,1,1", y="1,8")
    model.graph.initializer.extend(
        [numpy_helper.from_array(weights(8, 8), "w"), numpy_helper.from_array(ints(2, 3), "at")]
    )
    assert [node.verdict for node in check_model(model).nodes] == expected


CONSTANTS = """
    three = Constant <value_float = 3.0> ()
    six = Constant <value_float = 6.0> ()
    zero = Constant <value_float = 0.0> ()
"""
HARD = "a = Add(x, three)  b = Clip(a, zero, six)"

#: Body, the operator that is refused, the exact rewrite that cures it; y is x in shape.
CURES = [
    ("{ a = Relu(x)  b = Identity(a)  y = Relu(b) }", "Identity", "identity"),
    ("{ a = Relu(x)  b = Dropout(a)  y = Relu(b) }", "Dropout", "identity"),
    (
        "{ a = Relu(x)  b = ReduceMean <axes = [2, 3]> (a)  c = Sigmoid(b)  y = Mul(x, c) }",
        "ReduceMean",
        "global pool",
    ),
    (
        "{ a = Relu(x)  b = ReduceMean <axes = [-1, -2]> (a)  c = Sigmoid(b)  y = Mul(x, c) }",
        "ReduceMean",
        "global pool",
    ),
    (f"{{ {CONSTANTS} {HARD}  c = Div(b, six)  y = Relu(c) }}", "Div", "hard sigmoid"),
    (f"{{ {CONSTANTS} {HARD}  c = Mul(x, b)  d = Div(c, six)  y = Relu(d) }}", "Div", "hard swish"),
    (f"{{ {CONSTANTS} {HARD}  c = Mul(b, x)  d = Div(c, six)  y = Relu(d) }}", "Div", "hard swish"),
    # Mean over other axes, division by another number, dropout at work: nothing cures these.
    (
        "{ a = Relu(x)  b = ReduceMean <axes = [1]> (a)  c = Sigmoid(b)  d = Mul(x, c)  "
        "y = Relu(d) }",
        "ReduceMean",
        "",
    ),
    (f"{{ {CONSTANTS} {HARD}  c = Div(b, three)  y = Relu(c) }}", "Div", ""),
    # Clip(x + 3, 0, 6) times something else than x is no HardSwish.
    (
        f"{{ {CONSTANTS} {HARD}  z = Tanh(x)  c = Mul(z, b)  d = Div(c, six)  y = Relu(d) }}",
        "Div",
        "",
    ),
    (f"{{ {CONSTANTS} a = Clip(x, zero, six)  c = Div(a, six)  y = Relu(c) }}", "Div", ""),
]


@pytest.mark.parametrize(("body", "op_type", "rewrite"), CURES)
def test_exact_rewrites_that_cure_an_unlisted_operator_are_named(body, op_type, rewrite):
    report = checked(net(body))
    (node,) = (node for node in report.refusals if node.op_type == op_type)
    assert node.rewrites == ((rewrite,) if rewrite else ())
    assert (node in report.fatal) == (not rewrite)


def test_a_mean_without_its_axes_is_a_pool_where_a_flatten_can_follow():
    for then, curable in (("y = Gemm(b, w)", True), ("c = Relu(b)  y = Gemm(c, w)", False)):
        body = f"{{ a = Relu(x)  b = ReduceMean <axes = [2, 3], keepdims = 0> (a)  {then} }}"
        model = net(body, y="1,8")
        model.graph.initializer.append(numpy_helper.from_array(weights(8, 8), "w"))
        (node,) = checked(model).refusals
        assert (node.op_type, node.curable) == ("ReduceMean", curable)


def test_a_dense_layer_written_as_matmul_and_add_is_a_gemm():
    model = net("{ a = Flatten(x)  b = MatMul(a, w)  c = Add(b, v)  y = Relu(c) }", y="1,3")
    model.graph.initializer.extend(
        [numpy_helper.from_array(weights(2048, 3), "w"), numpy_helper.from_array(weights(3), "v")]
    )
    report = checked(model)
    assert [(n.op_type, n.rewrites) for n in report.refusals if n.op_type != "Flatten"] == [
        ("MatMul", ("gemm",)),
        ("Add", ("gemm",)),
    ]


def test_inputs_that_are_left_out_read_nothing():
    """The indices of the pool have no name here, and neither has the lower bound of the Clip."""
    model = net("{ a = MaxPool <kernel_shape = [1, 1], storage_order = 1> (x)  y = Relu(a) }")
    model.graph.node.append(helper.make_node("Clip", ["y", "", "top"], ["z"]))
    model.graph.initializer.append(numpy_helper.from_array(scalar(6), "top"))
    pool = check_model(model).nodes[0]
    assert pool.rewrites == ("storage order",)


def test_bounds_and_other_constants_that_are_computed_can_be_folded():
    cast = "hi = Constant <value = double {6.0}> ()  top = Cast <to = 1> (hi)"
    model = net(f"{{ {CONSTANTS} {cast}  a = Clip(x, zero, top)  y = Relu(a) }}")
    report = check_model(model)
    assert [(n.op_type, n.rewrites) for n in report.refusals] == [
        ("Cast", ("constants",)),
        ("Clip", ("clip bounds",)),
    ]
    assert report.fatal == []


DOUBTS = [
    (one("AveragePool", X, kernel_shape=[2, 2], strides=[2, 2], ceil_mode=1), "ceil_mode"),
    (one("Add", ONE_CHANNEL, scalar(1)), "garbled"),
    (one("Reshape", X, ints(1, -1)), "[1, N, 1, 1]"),
    (net(f"{{ {CONSTANTS} {HARD}  y = Relu(b) }}"), "before SDK 1.8"),
]


@pytest.mark.parametrize(("model", "words"), DOUBTS)
def test_what_passes_as_printed_but_is_uncertain_says_so(model, words):
    report = checked(model)
    assert report.refusals == []
    (node,) = (n for n in report.nodes if n.verdict == "chip" and n.reason)
    assert words in node.reason


def test_the_graph_as_a_whole_has_one_opset_and_fixed_shapes():
    def only(model):
        (refusal,) = check_model(model).graph
        assert refusal in check_model(model).refusals
        return refusal

    for opset in (13, 18):
        assert f"opset {opset}" in only(one("Relu", X, opset=opset)).reason
    for opset in (14, 15, 16, 17):
        assert check_model(one("Relu", X, opset=opset)).refusals == []
    assert "batch 4" in only(one("Relu", (4, 8, 16, 16))).reason
    wide = only(one("Relu", (1, 8, 16, "width")))
    assert "not fixed" in wide.reason
    assert not wide.curable


def test_a_free_batch_is_taken_as_one():
    model = one("Mul", ("N", 8, 16, 16), weights(1, 8, 1, 1))
    report = check_model(model)
    assert report.nodes[0].verdict == "chip"
    assert report.nodes[0].shape == X
    (refusal,) = report.refusals
    assert refusal.rewrites == ("batch to 1",)
    assert report.fatal == []


def test_a_rule_that_needs_a_shape_is_refused_without_one():
    report = check_model(one("Mul", (1, 8, "H", 16), (1, 8, "H", 16)))
    assert "a0 is not fixed" in report.nodes[0].reason
    assert report.nodes[0] in report.fatal


def test_operators_of_another_domain_are_not_the_chips():
    model = one("Relu", X)
    model.graph.node[0].domain = "com.example"
    model.opset_import.append(helper.make_opsetid("com.example", 1))
    assert check_model(model).nodes[0].verdict == "host edge"


def test_macs_are_counted():
    assert count_macs(one("Conv", X, weights(8, 8, 3, 3))) == 8 * 14 * 14 * 8 * 9
    assert count_macs(one("Conv", X, weights(8, 1, 3, 3), group=8)) == 8 * 14 * 14 * 9
    # Each of the 8 * 16 * 16 inputs meets 4 kernels of 2 x 2.
    assert count_macs(one("ConvTranspose", X, weights(8, 4, 2, 2))) == 8 * 16 * 16 * 4 * 4
    assert count_macs(one("Gemm", (1, 8), weights(8, 3))) == 24
    assert count_macs(one("Gemm", (8, 2), weights(8, 3), transA=1)) == 48
    assert count_macs(one("MatMul", (1, 4, 5, 6), (1, 4, 6, 7))) == 4 * 5 * 6 * 7
    assert count_macs(one("Relu", X)) == 0


def test_the_share_of_macs_on_the_chip():
    model = net("{ a = Conv(x, w)  b = Flatten(a)  y = MatMul(b, v) }", y="1,4")
    model.graph.initializer.extend(
        [
            numpy_helper.from_array(weights(2, 8, 1, 1), "w"),
            numpy_helper.from_array(weights(512, 4), "v"),
        ]
    )
    report = checked(model)
    conv, matmul = 2 * 16 * 16 * 8, 512 * 4
    assert report.macs == conv + matmul
    assert report.share_on_chip == pytest.approx(conv / (conv + matmul))


def test_a_check_takes_a_small_part_of_the_time_that_the_export_takes(tmp_path):
    """On this processor, and of its time; measured 1/215."""
    path = tmp_path / "n.onnx"
    started = time.process_time()
    export_network(timm.create_model("mobilenetv4_conv_small"), (3, 64, 64), path)
    exported = time.process_time()
    check_model(onnx.load(path))
    assert time.process_time() - exported < (exported - started) / 20
