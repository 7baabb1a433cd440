"""The legaliser on graphs that nobody wrote by hand, and on corners of the format."""

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from metis.operators.legalizer import legalize
from metis.operators.report import check_model

SIZE = 8


def answers(model, x):
    options = ort.SessionOptions()
    options.log_severity_level = 3
    session = ort.InferenceSession(model.SerializeToString(), options)
    return session.run(None, {session.get_inputs()[0].name: x})


def scalar(value, rank=0):
    return np.full((1,) * rank, value, np.float32)


def hard(kind, divide, rank):
    """A hand-written HardSigmoid or HardSwish; constants of rank 0 to 4."""

    def write(draw, x):
        shifted = draw.node("Add", *draw.either(x, scalar(3, rank)))
        clipped = draw.node("Clip", shifted, scalar(0), scalar(6))
        if kind == "HardSwish":
            clipped = draw.node("Mul", *draw.either(clipped, x))
        if divide:
            return draw.node("Div", clipped, scalar(6, rank))
        return draw.node("Mul", *draw.either(clipped, scalar(1 / 6, rank)))

    return write


def convolution(**attributes):
    def write(draw, x):
        return draw.node("Conv", x, draw.normal(4, 4, 3, 3), **attributes)

    return write


def gate(axes, opset18):
    def write(draw, x):
        if opset18:
            mean = draw.node("ReduceMean", x, np.array(axes, np.int64))
        else:
            mean = draw.node("ReduceMean", x, axes=axes)
        return draw.node("Mul", x, draw.node("Sigmoid", mean))

    return write


def no_op_reshape(target, **attributes):
    return lambda draw, x: draw.node("Reshape", x, np.array(target, np.int64), **attributes)


def affine(kind, shape):
    return lambda draw, x: draw.node(kind, *draw.either(x, draw.normal(*shape)))


def cut(steps):
    """Height and width lose their first row and column, then get zeros there."""

    def write(draw, x):
        ends = [np.iinfo(np.int64).max] * len(steps)
        bounds = [np.array(v, np.int64) for v in ([-SIZE + 1] * 2, ends, [-1, 2], steps)]
        smaller = draw.node("Slice", x, *bounds)
        return draw.node("Pad", smaller, np.array([0, 0, 1, 1, 0, 0, 0, 0], np.int64))

    return write


def simple(kind, **attributes):
    return lambda draw, x: draw.node(kind, x, **attributes)


PIECES = [
    *(
        hard(k, d, r)
        for k in ("HardSigmoid", "HardSwish")
        for d in (True, False)
        for r in (0, 1, 4)
    ),
    convolution(auto_pad="SAME_UPPER"),
    convolution(auto_pad="SAME_LOWER", kernel_shape=[3, 3]),
    convolution(pads=[2, 0, 0, 2]),
    simple("MaxPool", kernel_shape=[2, 2], strides=[1, 1], auto_pad="SAME_LOWER"),
    no_op_reshape([0, -1, SIZE, SIZE]),
    no_op_reshape([1, 4, SIZE, SIZE], allowzero=1),
    affine("Add", (4, 1, 1)),
    affine("Mul", (1, 1, 1)),
    affine("Sub", (1, 4, 1, 1)),
    affine("Sub", (1,)),
    simple("Identity"),
    simple("Dropout"),
    simple("Transpose", perm=[0, 1, 2, 3]),
    simple("Relu"),
    simple("HardSwish"),
]
GATES = [[2, 3], [-1, -2], [3, -2]]


class Drawn:
    """A graph that grows by what hypothesis draws."""

    def __init__(self, data, opset):
        self.data, self.opset = data, opset
        self.nodes, self.constants, self.alive = [], {}, ["x"]
        self.random = np.random.default_rng(data.draw(st.integers(0, 99), "weights"))

    def node(self, kind, *inputs, **attributes):
        names = [one if isinstance(one, str) else self.constant(one) for one in inputs]
        made = f"t{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, names, [made], **attributes))
        return made

    def constant(self, value):
        same = [n for n, v in self.constants.items() if np.array_equal(v, value)]
        if same and same[0].startswith("shared"):
            return same[0]
        name = f"{'shared' if value.size == 1 else 'own'}{len(self.constants)}"
        self.constants[name] = np.asarray(value)
        return name

    def normal(self, *shape):
        return (self.random.normal(size=shape) / 2).astype(np.float32)

    def either(self, one, other):
        return (one, other) if self.data.draw(st.booleans(), "order") else (other, one)

    def model(self, last):
        gone = helper.make_node("Flatten", [last], ["flat"], axis=-3)
        dense = [
            gone,
            helper.make_node("MatMul", ["flat", "dense"], ["product"]),
            helper.make_node("Add", ["bias", "product"], ["y"]),
        ]
        self.constants |= {"dense": self.normal(4 * SIZE**2, 3), "bias": self.normal(3)}
        read = {name for node in [*self.nodes, *dense] for name in node.input}
        sides = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 4, SIZE, SIZE])]
        made = [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 3])]
        tensors = [numpy_helper.from_array(v, n) for n, v in self.constants.items() if n in read]
        graph = helper.make_graph([*self.nodes, *dense], "g", sides, made, tensors)
        return helper.make_model(
            graph, opset_imports=[helper.make_opsetid("", self.opset)], ir_version=8
        )


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_any_curable_graph_becomes_legal_and_computes_the_same(data):
    opset = data.draw(st.sampled_from([14, 17, 18]), "opset")
    graph = Drawn(data, opset)
    pieces = PIECES + [gate(axes, opset >= 18) for axes in GATES]
    if opset < 18:  # the converter has no word for a Pad of opset 18
        pieces = [*pieces, cut([1, 1])]
    for _ in range(data.draw(st.integers(1, 5), "length")):
        made = data.draw(st.sampled_from(pieces))(graph, graph.alive[-1])
        if data.draw(st.booleans(), "skip"):
            made = graph.node("Add", made, data.draw(st.sampled_from(graph.alive)))
        graph.alive.append(made)
    model = graph.model(graph.alive[-1])
    onnx.checker.check_model(model, full_check=True)
    legalized = legalize(model)
    # A map of 4 channels can't be sliced along height and width.
    assert {entry.op_type for entry in legalized.report.refusals} <= {"Slice"}
    onnx.checker.check_model(legalized.model, full_check=True)
    x = np.random.default_rng(1).normal(0, 3, (1, 4, SIZE, SIZE)).astype(np.float32)
    (expected,), (found,) = answers(model, x), answers(legalized.model, x)
    assert np.abs(found - expected).max() <= 1e-5 * max(1, np.ptp(expected), np.abs(expected).max())
    assert legalize(legalized.model).rewrites == ()


def graph_of(text, tensors, ir_version=8):
    model = onnx.parser.parse_model(text)
    model.ir_version = ir_version
    model.graph.initializer.extend(numpy_helper.from_array(v, n) for n, v in tensors.items())
    return model


W = np.random.default_rng(2).normal(size=(8, 8, 3, 3)).astype(np.float32)
HEAD = '<ir_version: 8, opset_import: ["" : 17]> g (float[1,8,8,8] x) => '
CONV = "Conv <pads = [1, 1, 1, 1]>"


def test_an_identity_between_two_outputs_stays_and_is_refused():
    """Both names are asked for, so nothing can be removed; the chip reads it, so no edge either."""
    outputs = "(float[1,8,8,8] a, float[1,8,8,8] b, float[1,8,8,8] y)"
    model = graph_of(
        f"{HEAD} {outputs} {{ a = Relu(x)  b = Identity(a)  y = {CONV} (b, w) }}", {"w": W}
    )
    legalized = legalize(model)
    assert legalized.rewrites == ()
    assert legalized.refusal("it").startswith("Metis can't run it: it refuses Identity b")


def with_branches(then_reads, else_reads):
    def branch(name, source):
        node = helper.make_node("Neg", [source], [name])
        made = helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 8, 8, 8])
        return helper.make_graph([node], name, [], [made])

    model = graph_of(
        f"{HEAD} (float[1,8,8,8] y) "
        f'{{ a = Relu(x)  b = Identity(a)  y = Conv <auto_pad = "SAME_UPPER"> (i, w) }}',
        {"w": W, "which": np.array(True)},
    )
    chosen = helper.make_node(
        "If",
        ["which"],
        ["i"],
        then_branch=branch("t", then_reads),
        else_branch=branch("e", else_reads),
    )
    model.graph.node.insert(2, chosen)
    onnx.checker.check_model(model)
    return model


def test_branches_read_what_a_removed_node_handed_on():
    model = with_branches("b", "a")
    legalized = legalize(model)
    assert [r.name for r in legalized.rewrites] == ["identity", "explicit pads"]
    x = np.random.default_rng(0).normal(size=(1, 8, 8, 8)).astype(np.float32)
    np.testing.assert_array_equal(answers(legalized.model, x), answers(model, x))


def test_a_branch_that_reads_from_the_chip_is_no_edge():
    verdicts = {node.op_type: node.verdict for node in check_model(with_branches("a", "a")).nodes}
    assert verdicts["If"] == "refused"
    verdicts = {node.op_type: node.verdict for node in check_model(with_branches("x", "x")).nodes}
    assert verdicts["If"] == "host edge"


def test_new_names_are_not_those_of_inputs():
    scale = np.linspace(1, 2, 8, dtype=np.float32).reshape(8, 1, 1)
    text = HEAD.replace(" x)", " k_shaped)") + "(float[1,8,8,8] y) { y = Mul(k_shaped, k) }"
    legalized = legalize(graph_of(text, {"k": scale}))
    assert [r.name for r in legalized.rewrites] == ["operand shape"]


def test_constants_of_a_higher_rank_make_no_hard_pattern():
    """The 3 has five dimensions, so what follows has too."""
    text = f"{HEAD} (float[1,1,8,8,8] y) {{ a = Add(x, t)  b = Clip(a, z, s)  y = Div(b, s) }}"
    tensors = {"t": scalar(3, 5), "z": scalar(0), "s": scalar(6)}
    assert legalize(graph_of(text, tensors)).rewrites == ()


@pytest.mark.parametrize("opset", [9, 10, 11, 12, 13, 18, 19, 20, 21])
def test_files_of_any_age_are_written_so_that_others_read_them(opset):
    """Up to format 3 every constant was an input too; a Constant may hold numbers or a tensor."""
    constants = {"w": W, "k": np.ones((8, 1, 1), np.float32)}
    text = (
        f'<ir_version: 8, opset_import: ["" : {opset}]> g (float[N,8,8,8] x) => (float[N,8,8,8] y) '
        '{ a = Conv <auto_pad = "SAME_UPPER"> (x, w)  b = Mul(a, k)  c = Relu(b)  '
        + (
            "at = Constant <value_ints = [2, 3]> ()  d = ReduceMean(c, at)"
            if opset >= 18
            else "d = ReduceMean <axes = [2, 3]> (c)"
        )
        + "  e = Sigmoid(d)  y = Mul(c, e) }"
    )
    model = graph_of(text, constants, ir_version=3 if opset < 13 else 8)
    if opset < 13:
        model.graph.input.extend(
            helper.make_tensor_value_info(n, TensorProto.FLOAT, v.shape)
            for n, v in constants.items()
        )
    onnx.checker.check_model(model)
    legalized = legalize(model)
    assert legalized.report.refusals == []
    names = ["batch to 1", "explicit pads", "global pool", "opset", "operand shape"]
    assert sorted(r.name for r in legalized.rewrites) == sorted(names)
    onnx.checker.check_model(legalized.model, full_check=True)
    x = np.random.default_rng(0).normal(size=(1, 8, 8, 8)).astype(np.float32)
    np.testing.assert_allclose(answers(legalized.model, x), answers(model, x), 1e-5, 1e-5)


@pytest.mark.parametrize(
    ("node", "words"),
    [
        ("b, c = Split <axis = 1, num_outputs = 2> (a)  y = Concat <axis = 1> (c, b)", "for Split"),
        ("b = Mish(a)  y = Relu(b)", "No Previous Version of Mish exists"),
    ],
)
def test_an_opset_that_does_not_convert_says_why_without_the_converters_own_files(node, words):
    text = HEAD.replace("17", "18") + f"(float[1,8,8,8] y) {{ a = Relu(x)  {node} }}"
    (entry,) = legalize(graph_of(text, {})).report.graph
    assert entry.reason.startswith("opset 18, not 14 to 17; opset 18 can't be converted: No ")
    assert entry.reason.endswith(words)
    assert "/" not in entry.reason


def test_what_onnxruntime_can_not_run_is_refused_although_a_rewrite_could_cure_it():
    """It has no Conv with dilations and auto_pad, so nothing can be proven."""
    text = f"{HEAD} (float[1,8,8,8] y) "
    model = graph_of(
        f'{text} {{ y = Conv <auto_pad = "SAME_UPPER", dilations = [2, 2]> (x, w) }}', {"w": W}
    )
    legalized = legalize(model)
    assert legalized.rewrites == ()
    refusal = legalized.refusal("it")
    assert refusal.startswith("Metis can't run it: it refuses Conv y: auto_pad must be NOTSET")
    assert "nothing was rewritten: onnxruntime can't run the graph" in refusal
