"""Every rewrite on a small graph: refused before, accepted after, equal outputs."""

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from metis.operators import legalizer
from metis.operators.legalizer import EXTRA_REWRITES, TOLERANCE, RewriteError, legalize
from metis.operators.report import REWRITES, check_model

RANDOM = np.random.default_rng(7)


def normal(*shape):
    return RANDOM.normal(size=shape).astype(np.float32)


CONSTANTS = {
    "w": normal(8, 8, 3, 3),
    "dense": normal(8, 3),
    "wide": normal(2048, 3) / 32,
    "row": normal(1, 3),
    "bias": normal(3),
    "scale": normal(8, 1, 1),
    "one": np.array([2], np.float32),
    "three": np.array(3, np.float32),
    "six": np.array(6, np.float32),
    "sixth": np.array(1 / 6, np.float32),
    "zero": np.array(0, np.float32),
    "double": np.array(6, np.float64),
    "to_row": np.array([1, 2048], np.int64),
    "any_row": np.array([-1, 8], np.int64),
    "same": np.array([1, 8, 16, 16], np.int64),
    "roi": np.array([0, 0, 0, 0, 1, 1, 1, 1], np.float32),
    "twice": np.array([1, 1, 2, 2], np.float32),
    "starts": np.array([1, 2, 3], np.int64),
    "ends": np.array([30, 15, 9], np.int64),
    "axes": np.array([1, 2, -1], np.int64),
    "some": np.array([1, 2], np.int64),
    "pool": np.array([2, 3], np.int64),
}


def net(body, x="1,8,16,16", y="1,8,16,16", opset=17):
    """A graph in ONNX's textual form from x to y, with those of CONSTANTS that it reads."""
    head = f'<ir_version: 8, opset_import: ["" : {opset}]> g'
    model = onnx.parser.parse_model(f"{head} (float[{x}] x) => (float[{y}] y) {{ {body} }}")
    read = {name for node in model.graph.node for name in node.input}
    model.graph.initializer.extend(
        numpy_helper.from_array(value, name) for name, value in CONSTANTS.items() if name in read
    )
    onnx.checker.check_model(model, full_check=True)
    return model


def answers(model, x):
    options = ort.SessionOptions()
    options.log_severity_level = 3
    session = ort.InferenceSession(model.SerializeToString(), options)
    return session.run(None, {session.get_inputs()[0].name: x})[0]


def operators(model):
    return [node.op_type for node in model.graph.node]


POOL = "kernel_shape = [3, 3], strides = [2, 2]"
HARD = "a = Add(x, three)  b = Clip(a, zero, six)"

#: Rewrite, graph that needs it and no other, shape of x, and the operators that are left.
CASES = [
    ("batch to 1", net("y = Conv(x, w)", "N,8,16,16", "N,8,14,14"), ["Conv"]),
    (
        "clip bounds",
        net("top = Cast <to = 1> (double)  a = Clip(x, zero, top)  y = Relu(a)"),
        ["Clip", "Relu"],
    ),
    (
        "constants",
        net("f = Cast <to = 1> (double)  g = Mul(f, three)  y = Mul(x, g)"),
        ["Mul"],
    ),
    (
        # The shape of a tensor is a constant where it is fixed.
        "constants",
        net(
            "a = Relu(x)  s = Shape <start = 1, end = 2> (a)  f = Cast <to = 1> (s)  "
            "z = ReduceSum <keepdims = 0> (f)  y = Mul(a, z)"
        ),
        ["Relu", "Mul"],
    ),
    ("explicit pads", net('y = Conv <auto_pad = "SAME_UPPER"> (x, w)'), ["Conv"]),
    (
        "explicit pads",
        net(f'y = MaxPool <auto_pad = "SAME_LOWER", {POOL}> (x)', y="1,8,8,8"),
        ["MaxPool"],
    ),
    (
        "explicit pads",
        net('y = ConvTranspose <auto_pad = "VALID"> (x, w)', y="1,8,18,18"),
        ["ConvTranspose"],
    ),
    (
        "flatten",
        net("a = Reshape(x, to_row)  y = Gemm(a, wide)", y="1,3"),
        ["Flatten", "Gemm"],
    ),
    (
        "front axis",
        net("a = Flatten <axis = -3> (x)  y = Gemm(a, wide)", y="1,3"),
        ["Flatten", "Gemm"],
    ),
    (
        "front axis",
        net("a = Relu(x)  b, c = Split <axis = -3> (a)  y = Concat <axis = 1> (c, b)"),
        ["Relu", "Split", "Concat"],
    ),
    (
        "gemm",
        net("a = Flatten(x)  b = MatMul(a, wide)  y = Add(bias, b)", y="1,3"),
        ["Flatten", "Gemm"],
    ),
    (
        "gemm transpose",
        net("a = Flatten <axis = 2> (x)  y = Gemm <transA = 1> (a, dense)", "1,8,1,1", "1,3"),
        ["Flatten", "Gemm"],
    ),
    (
        "gemm transpose",
        net("a = Relu(x)  y = Gemm <transA = 1> (a, row)", "1,8", "8,3"),
        ["Relu", "Flatten", "Gemm"],
    ),
    (
        "gemm transpose",
        net("y = Gemm <transA = 1, transB = 1> (dense, x)", "1,8", "3,1"),
        ["Gemm"],
    ),
    (
        "global pool",
        net("a = Relu(x)  b = ReduceMean <axes = [-1, 2]> (a)  c = Sigmoid(b)  y = Mul(a, c)"),
        ["Relu", "GlobalAveragePool", "Sigmoid", "Mul"],
    ),
    (
        "global pool",
        net("a = ReduceMean <axes = [2, 3], keepdims = 0> (x)  y = Gemm(a, dense)", y="1,3"),
        ["GlobalAveragePool", "Flatten", "Gemm"],
    ),
    ("hard sigmoid", net(f"{HARD}  c = Div(b, six)  y = Relu(c)"), ["HardSigmoid", "Relu"]),
    (
        "hard swish",
        net(f"{HARD}  c = Mul(b, x)  d = Div(c, six)  y = Relu(d)"),
        ["HardSwish", "Relu"],
    ),
    # As Keras writes it. Each operator keeps its rule, but the compiler has stumbled over it.
    (
        "hard swish",
        net(f"{HARD}  c = Mul(x, b)  d = Mul(sixth, c)  y = Relu(d)"),
        ["HardSwish", "Relu"],
    ),
    (
        "hard sigmoid",
        net(f"{HARD}  c = Mul(b, sixth)  y = Mul(x, c)"),
        ["HardSigmoid", "Mul"],
    ),
    ("identity", net("a = Relu(x)  b = Identity(a)  y = Sigmoid(b)"), ["Relu", "Sigmoid"]),
    ("identity", net("a = Relu(x)  b = Dropout(a)  y = Sigmoid(b)"), ["Relu", "Sigmoid"]),
    # Nothing else is in it, so the host could do it all.
    ("gemm", net("y = MatMul(x, dense)", "1,8", "1,3"), ["Gemm"]),
    # At the end of the graph, where the host could do it too.
    ("identity", net("a = Relu(x)  b = Dropout(a)  y = Identity(b)"), ["Relu"]),
    (
        "identity",
        net(
            "a = Relu(x)  b = Flatten(a)  c = Transpose <perm = [0, 1]> (b)  y = Gemm(c, wide)",
            y="1,3",
        ),
        ["Relu", "Flatten", "Gemm"],
    ),
    ("operand shape", net("y = Mul(x, scale)"), ["Mul"]),
    ("operand shape", net("y = Sub(one, x)"), ["Sub"]),
    (
        "reshape target",
        net("a = GlobalAveragePool(x)  b = Reshape(a, any_row)  y = Gemm(b, dense)", y="1,3"),
        ["GlobalAveragePool", "Reshape", "Gemm"],
    ),
    (
        "reshape target",
        net("a = Relu(x)  b = Reshape <allowzero = 1> (a, same)  y = Relu(b)"),
        ["Relu", "Reshape", "Relu"],
    ),
    (
        "resize roi",
        net('y = Resize <mode = "linear"> (x, roi, twice)', y="1,8,32,32"),
        ["Resize"],
    ),
    # Channels last: 29 channels would not let height and width be sliced.
    (
        "slice per axis",
        net("y = Slice(x, starts, ends, axes)", "1,64,16,16", "1,29,13,6"),
        ["Slice"] * 3,
    ),
    (
        "storage order",
        net("y, i = MaxPool <kernel_shape = [3, 3], storage_order = 1> (x)", y="1,8,14,14"),
        ["MaxPool"],
    ),
    (
        "opset",
        net("a = Conv(x, w)  y = ReduceMax(a, pool)", y="1,8,1,1", opset=18),
        ["Conv", "ReduceMax"],
    ),
    (
        "opset",
        net("a = Conv(x, w)  y = Softsign(a)", y="1,8,14,14", opset=11),
        ["Conv", "Softsign"],
    ),
    (
        "trailing softmax",
        net("a = Flatten(x)  b = Gemm(a, wide)  y = Softmax(b)", y="1,3"),
        ["Flatten", "Gemm"],
    ),
    (
        "trailing softmax",
        net("a = Flatten(x)  b = Gemm(a, wide)  y = LogSoftmax <axis = 1> (b)", y="1,3"),
        ["Flatten", "Gemm"],
    ),
]


@pytest.mark.parametrize(
    ("name", "model", "left"), CASES, ids=[f"{c[0]}-{i}" for i, c in enumerate(CASES)]
)
def test_a_rewrite_cures_what_asks_for_it_and_computes_the_same(name, model, left):
    before = check_model(model)
    original = model.SerializeToString()
    legalized = legalize(model)
    assert model.SerializeToString() == original
    assert {rewrite.name for rewrite in legalized.rewrites} == {name}
    assert all(rewrite.words and rewrite.node for rewrite in legalized.rewrites)
    assert legalized.report == check_model(legalized.model)
    assert legalized.report.refusals == []
    if name in REWRITES and before.refusals:
        assert before.fatal == []
        assert name in {n for entry in before.refusals for n in entry.rewrites}
    assert operators(legalized.model) == left
    onnx.checker.check_model(legalized.model, full_check=True)
    shape = [d.dim_value or 1 for d in model.graph.input[0].type.tensor_type.shape.dim]
    x = (np.random.default_rng(0).normal(size=shape)).astype(np.float32)
    expected, found = answers(model, x), answers(legalized.model, x)
    if name == "trailing softmax":
        found = np.exp(found) / np.exp(found).sum(axis=1)
        if operators(model)[-1] == "LogSoftmax":
            found = np.log(found)
    assert np.ptp(expected) > 0
    assert found == pytest.approx(expected, rel=1e-5, abs=1e-5)
    assert legalized.max_abs_difference <= TOLERANCE * np.ptp(expected)


def test_every_rewrite_has_its_case():
    assert {name for name, _, _ in CASES} == {*REWRITES, *EXTRA_REWRITES}


@given(
    auto=st.sampled_from(["SAME_UPPER", "SAME_LOWER", "VALID"]),
    kernel=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    stride=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    size=st.tuples(st.integers(9, 17), st.integers(9, 17)),
    operator=st.sampled_from(["Conv", "MaxPool"]),
)
def test_explicit_pads_are_what_auto_pad_means(auto, kernel, stride, size, operator):
    # onnxruntime runs no MaxPool that skips pixels and pads.
    stride = tuple(map(min, stride, kernel)) if operator == "MaxPool" else stride
    x = np.random.default_rng(0).normal(size=(1, 2, *size)).astype(np.float32)
    weights = [numpy_helper.from_array(normal(2, 2, *kernel), "w")] if operator == "Conv" else []
    node = helper.make_node(
        operator,
        ["x", "w"][: 1 + len(weights)],
        ["y"],
        kernel_shape=kernel,
        strides=stride,
        auto_pad=auto,
    )
    model = helper.make_model(
        helper.make_graph(
            [node],
            "g",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, x.shape)],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
            weights,
        ),
        opset_imports=[helper.make_opsetid("", 17)],
        ir_version=8,
    )
    legalized = legalize(model)
    axes = zip(size, kernel, stride, strict=True)
    skipped = max(n - k - (-(-n // step) - 1) * step for n, k, step in axes)
    if auto != "VALID" and skipped > 1:  # onnxruntime crops at both ends then
        assert "auto_pad must be NOTSET" in {entry.reason for entry in legalized.report.fatal}
        return
    assert legalized.report.refusals == []
    np.testing.assert_array_equal(answers(legalized.model, x), answers(model, x))


def test_rewrites_lead_to_others_until_nothing_is_left_to_do():
    """The Identity hides a Gemm, the Dropout a Flatten, and the batch is free."""
    model = net(
        "a = Conv(x, w)  b = Identity(a)  c = ReduceMean <axes = [2, 3]> (b)  "
        "d = Flatten <axis = -3> (c)  e = Dropout(d)  f = MatMul(e, dense)  g = Add(f, bias)  "
        "y = Softmax(g)",
        x="N,8,16,16",
        y="N,3",
    )
    legalized = legalize(model)
    assert operators(legalized.model) == ["Conv", "GlobalAveragePool", "Flatten", "Gemm"]
    assert legalized.report.refusals == []
    assert legalized.report.share_on_chip == 1.0
    assert legalized.rewrites[0].name == "batch to 1"
    last = legalized.rewrites[-1]
    assert (last.name, last.node) == ("trailing softmax", "y")
    assert "Softmax along axis -1 is the host's" in last.words
    shape = legalized.model.graph.output[0].type.tensor_type.shape
    assert [dim.dim_value for dim in shape.dim] == [1, 3]
    assert legalize(legalized.model).rewrites == ()


def test_what_no_rewrite_cures_stays_and_the_rest_is_done():
    model = net("a = Identity(x)  b = Relu(a)  c = Identity(b)  d = Erf(c)  y = Relu(d)")
    legalized = legalize(model)
    assert operators(legalized.model) == ["Relu", "Erf", "Relu"]
    assert [entry.op_type for entry in legalized.report.fatal] == ["Erf"]


def test_real_inputs_are_tried_too(monkeypatch):
    """A rewrite that is wrong for large values only, which random inputs do not have."""

    def capped(draft, node):
        cap = draft.constant("cap", np.array(50, np.float32))
        draft.replace(node, helper.make_node("Min", [node.input[0], cap], node.output, "capped"))
        return "capped at 50"

    monkeypatch.setitem(legalizer.REWRITERS, "identity", capped)
    model = net("a = Relu(x)  b = Identity(a)  y = Relu(b)")
    assert legalize(model).inputs_tried == 4
    with pytest.raises(RewriteError, match="'identity' of b changes"):
        legalize(model, [np.full((1, 8, 16, 16), 60, np.float32)])


POOLED = "a = Relu(x)  b = ReduceMean <axes = [2, 3]> (a)  c = Sigmoid(b)  y = Mul(a, c)"


def test_a_rewrite_that_changes_what_is_computed_is_an_error_that_names_it(monkeypatch):
    def wrong(draft, node):
        draft.replace(node, helper.make_node("GlobalMaxPool", node.input, node.output))
        return "a maximum for a mean"

    monkeypatch.setitem(legalizer.REWRITERS, "global pool", wrong)
    with pytest.raises(RewriteError, match=r"'global pool' of b changes .* of their range"):
        legalize(net(POOLED))


def test_a_rewrite_that_makes_no_graph_or_cures_nothing_is_an_error(monkeypatch):
    monkeypatch.setitem(legalizer.REWRITERS, "global pool", lambda draft, node: "nothing done")
    with pytest.raises(RewriteError, match="'global pool' of b does not cure"):
        legalize(net(POOLED))
    monkeypatch.setitem(legalizer.REWRITERS, "global pool", lambda draft, node: None)
    with pytest.raises(RewriteError, match="'global pool' of b can't be done"):
        legalize(net(POOLED))

    def broken(draft, node):
        node.op_type = "NoSuchOperator"
        return "broken"

    monkeypatch.setitem(legalizer.REWRITERS, "global pool", broken)
    with pytest.raises(RewriteError, match="'global pool' of b makes a graph that does not run"):
        legalize(net(POOLED))


def test_an_opset_that_does_not_convert_is_refused_with_the_reason():
    """Mish came with opset 18 and means nothing to 17."""
    model = net("a = Conv(x, w)  y = Mish(a)", y="1,8,14,14", opset=18)
    legalized = legalize(model)
    assert legalized.rewrites == ()
    assert legalized.model.SerializeToString() == model.SerializeToString()
    (entry,) = legalized.report.graph
    assert "opset 18" in entry.reason
    assert "Mish" in entry.reason
    assert entry.cure == "export with opset 17"


def test_a_graph_that_ignores_its_input_proves_little():
    model = net("a = Relu(x)  b = Identity(a)  c = Mul(b, zero)  y = Relu(c)")
    assert "answers the same to all inputs" in legalize(model).note
    assert legalize(net("a = Relu(x)  b = Identity(a)  y = Relu(b)")).note == ""


def test_what_can_not_be_run_is_left_as_it_is():
    free = legalize(net("y = Identity(x)", x="1,8,16,W", y="1,8,16,W"))
    assert "the shape of x is not fixed" in free.note
    foreign = net("a = Relu(x)  b = Identity(a)  y = Relu(b)")
    foreign.graph.node[0].domain = "com.example"
    foreign.opset_import.append(helper.make_opsetid("com.example", 1))
    assert "onnxruntime can't run" in legalize(foreign).note
    assert legalize(foreign).rewrites == ()
