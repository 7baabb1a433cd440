"""The emulator against plain int32 arithmetic: every operator, whole networks, every bit."""

from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from integer_network import run
from networks import residual_network, student, weights
from onnx import helper, numpy_helper

from metis.emulator import kernels
from metis.quantize import arithmetic as int8
from metis.quantize.folding import prepare
from metis.quantize.placement import open_observations
from metis.quantize.qdq import quantize_graph
from metis.quantize.ranges import choose

RANDOM = np.random.default_rng


def int8_graph(model, frames, observer="min_max", scheme="per_tensor_min_max"):
    parts = prepare(model)
    seen = open_observations(parts)
    seen.add(frames, lambda n: None)
    return quantize_graph(parts.core, choose(seen, observer), scheme=scheme)


def session(model, options=kernels.EXACT, threads=1):
    chosen = ort.SessionOptions()
    chosen.intra_op_num_threads = threads
    chosen.log_severity_level = 3
    for key, value in options.items():
        chosen.add_session_config_entry(key, value)
    return ort.InferenceSession(model.SerializeToString(), chosen, ["CPUExecutionProvider"])


def on_grid(model, frames):
    """Frames as the first quantizer carries them; see DECISIONS 11."""
    constants = {i.name: numpy_helper.to_array(i) for i in model.graph.initializer}
    first = model.graph.node[0]
    scale, zero = constants[first.input[1]], int(constants[first.input[2]])
    codes = np.clip(np.rint(frames / scale) + zero, 0, 255)
    return ((codes - zero) * scale).astype(np.float32)


def assert_bit_exact(model, frames, observer="min_max"):
    quantized = int8_graph(model, frames, observer)
    fed = on_grid(quantized, frames)
    found = session(quantized).run(None, {"input": fed})[0]
    expected = run(quantized, fed)
    assert len(np.unique(expected)) > 10  # not all saturated
    assert np.array_equal(found.reshape(expected.shape), expected)


CONVOLUTIONS = {
    "3x3 stem, stride 2": (3, 32, 3, 1, 2),
    "1x1 wide": (192, 32, 1, 1, 1),
    "1x1 very wide": (1152, 64, 1, 1, 1),
    "3x3": (64, 64, 3, 1, 1),
    "depthwise 3x3": (48, 48, 3, 48, 1),
    "depthwise 5x5, stride 2": (48, 48, 5, 48, 2),
    "grouped": (64, 64, 3, 4, 1),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
@pytest.mark.parametrize("bias", [True, False])
def test_convolutions(name, bias):
    channels, out, kernel, group, stride = CONVOLUTIONS[name]
    random = RANDOM(len(name))
    # Full range everywhere: what saturates in 16 bit would show here.
    w = random.choice([-1.0, 1.0], (out, channels // group, kernel, kernel))
    w = (w * random.uniform(0.9, 1, (out, 1, 1, 1))).astype(np.float32)
    constants = {"w": w, **({"b": weights(random, out) * 50} if bias else {})}
    node = helper.make_node(
        "Conv",
        ["input", "w", "b"] if bias else ["input", "w"],
        ["logits"],
        group=group,
        pads=[kernel // 2] * 4,
        strides=[stride, stride],
    )
    frames = random.choice([-1.0, 1.0], (4, channels, 9, 9)).astype(np.float32)
    frames[::2] = random.uniform(-1, 1.7, frames[::2].shape)
    assert_bit_exact(student([node], (channels, 9, 9), constants), frames)


@pytest.mark.parametrize(
    "kind", ["HardSwish", "HardSigmoid", "Sigmoid", "Tanh", "LeakyRelu", "Relu"]
)
@pytest.mark.parametrize("reach", [0.7, 4.0, 11.0])
def test_tables(kind, reach):
    """Every one of the 256 codes."""
    options = {"alpha": 1 / 6, "beta": 0.5} if kind == "HardSigmoid" else {}
    node = helper.make_node(kind, ["input"], ["logits"], **options)
    frames = np.linspace(-reach, 1.3 * reach, 4 * 256, dtype=np.float32).reshape(4, 4, 8, 8)
    assert_bit_exact(student([node], (4, 8, 8), {}), frames)


@pytest.mark.parametrize("kind", ["Add", "Mul"])
@pytest.mark.parametrize("partner", ["tensor", "channels", "scalar"])
def test_element_wise(kind, partner):
    random = RANDOM(3)
    shape = {"channels": (1, 6, 1, 1), "scalar": ()}.get(partner)
    nodes = [helper.make_node(kind, ["input", "other"], ["logits"])]
    constants = {"other": np.asarray(random.normal(1, 1, shape or (1,)), np.float32)}
    if partner == "tensor":
        nodes.insert(0, helper.make_node("HardSwish", ["input"], ["other"]))
        constants = {}
    frames = random.normal(0, 2, (5, 6, 7, 7)).astype(np.float32)
    assert_bit_exact(student(nodes, (6, 7, 7), constants), frames)


MAKE = helper.make_node

#: Operators that the tests above leave out: nodes after a HardSwish, and constants.
OTHERS = {
    "AveragePool": (
        [MAKE("AveragePool", ["h"], ["logits"], kernel_shape=[2, 2], strides=[2, 2])],
        {},
    ),
    "AveragePool, padded": (
        [
            MAKE(
                "AveragePool",
                ["h"],
                ["logits"],
                kernel_shape=[3, 3],
                strides=[2, 2],
                pads=[1] * 4,
                count_include_pad=1,
            )
        ],
        {},
    ),
    "Sub": ([MAKE("Sub", ["h", "c"], ["logits"])], {"c": weights(RANDOM(2), 1, 8, 1, 1)}),
    "Clip": (
        [MAKE("Clip", ["h", "lo", "hi"], ["logits"])],
        {"lo": np.float32(-1), "hi": np.float32(1)},
    ),
    "a constant of two operators": (
        [MAKE("Mul", ["h", "c"], ["a"]), MAKE("Add", ["c", "a"], ["logits"])],
        {"c": np.float32(0.7)},
    ),
    "GlobalMaxPool": ([MAKE("GlobalMaxPool", ["h"], ["logits"])], {}),
    "Pad": (
        [MAKE("Pad", ["h", "pads"], ["logits"])],
        {"pads": np.array([0, 0, 1, 1, 0, 0, 2, 0], np.int64)},
    ),
    "Slice": (
        [MAKE("Slice", ["h", "start", "end", "axis"], ["logits"])],
        {n: np.array([v], np.int64) for n, v in (("start", 2), ("end", 6), ("axis", 1))},
    ),
    "Split": (
        [MAKE("Split", ["h"], ["a", "b"], axis=1), MAKE("Add", ["a", "b"], ["logits"])],
        {},
    ),
    "Resize": (
        [
            MAKE(
                "Resize",
                ["h", "", "scales"],
                ["logits"],
                mode="linear",
                coordinate_transformation_mode="half_pixel",
            )
        ],
        {"scales": np.array([1, 1, 2, 2], np.float32)},
    ),
    "Selu": ([MAKE("Selu", ["h"], ["logits"])], {}),
    "PRelu": (
        [MAKE("PRelu", ["h", "slope"], ["logits"])],
        {"slope": np.linspace(0.1, 0.5, 8, dtype=np.float32).reshape(8, 1, 1)},
    ),
    "ConvTranspose": (
        [MAKE("ConvTranspose", ["h", "w"], ["logits"], strides=[2, 2], kernel_shape=[3, 3])],
        {"w": weights(RANDOM(1), 8, 8, 3, 3)},
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_operators(name):
    nodes, constants = OTHERS[name]
    first = MAKE("HardSwish", ["input"], ["h"])
    frames = RANDOM(0).normal(0.3, 2, (4, 8, 10, 10)).astype(np.float32)
    assert_bit_exact(student([first, *nodes], (8, 10, 10), constants), frames)


@pytest.mark.parametrize("bias", [(), (1,), (1, 5), (5,)])
@pytest.mark.parametrize("options", [{}, {"alpha": 0.5, "beta": 2.0}, {"transB": 1}])
def test_dense_layers(bias, options):
    """Whatever form a Gemm has: a bias of one value, a row, or a vector."""
    random = RANDOM(5)
    shape = (5, 8) if options.get("transB") else (8, 5)
    nodes = [
        MAKE("GlobalAveragePool", ["input"], ["pooled"]),
        MAKE("Flatten", ["pooled"], ["flat"]),
        MAKE("Gemm", ["flat", "w", "b"], ["logits"], **options),
    ]
    constants = {"w": weights(random, *shape), "b": np.asarray(weights(random, *bias, 1)[..., 0])}
    frames = random.normal(0.3, 2, (16, 8, 4, 4)).astype(np.float32)
    assert_bit_exact(student(nodes, (8, 4, 4), constants, out_rank=2), frames)


@pytest.mark.parametrize("observer", ["min_max", "mse", "percentile", "entropy"])
@pytest.mark.parametrize("seed", range(3))
def test_whole_networks(seed, observer):
    frames = RANDOM(seed + 9).normal(0, 1.5, (16, 3, 12, 12)).astype(np.float32)
    assert_bit_exact(residual_network(seed), frames, observer)


def test_threads_and_batches_change_no_bit():
    frames = RANDOM(1).normal(0, 1.5, (24, 3, 12, 12)).astype(np.float32)
    quantized = int8_graph(residual_network(0), frames)
    fed = on_grid(quantized, frames)
    results = {
        (threads, batch): np.concatenate(
            [
                session(quantized, threads=threads).run(None, {"input": fed[i : i + batch]})[0]
                for i in range(0, 24, batch)
            ]
        ).tobytes()
        for threads in (1, 2)
        for batch in (1, 8, 24)
    }
    assert len(set(results.values())) == 1


def test_every_convolution_runs_as_an_integer_kernel(tmp_path):
    """A graph that onnxruntime would not fuse would pass for slow floats."""
    frames = RANDOM(1).normal(0, 1.5, (4, 3, 12, 12)).astype(np.float32)
    quantized = int8_graph(residual_network(0), frames)
    chosen = ort.SessionOptions()
    chosen.log_severity_level = 3
    for key, value in kernels.EXACT.items():
        chosen.add_session_config_entry(key, value)
    chosen.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    ort.InferenceSession(quantized.SerializeToString(), chosen, ["CPUExecutionProvider"])
    kinds = [node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node]
    assert kinds.count("QLinearConv") == 6
    assert "Conv" not in kinds
    assert "Gemm" not in kinds


def test_a_saturating_kernel_fails_the_self_test():
    """onnxruntime's default kernels saturate where the CPU lacks VNNI; the test must see that."""
    assert kernels.self_test(kernels.EXACT)
    if any(word in Path("/proc/cpuinfo").read_text() for word in ("vnni", "amx")):
        pytest.skip("this CPU does not saturate")
    assert not kernels.self_test({})


def test_the_self_test_sees_one_wrong_code(monkeypatch):
    def nearly(acc, multiplier, zero, right=int8.requantize):
        codes = right(acc, multiplier, zero)
        codes.flat[7] -= 1
        return codes

    monkeypatch.setattr(int8, "requantize", nearly)
    assert not kernels.self_test(kernels.EXACT)


def test_a_wrong_kernel_falls_back_to_the_float_simulation(monkeypatch):
    monkeypatch.setattr(kernels, "kernels_are_exact", lambda: False)
    words, options = kernels.arithmetic("per_tensor_histogram")
    assert "failed the self-test" in words
    frames = RANDOM(1).normal(0, 1.5, (8, 3, 12, 12)).astype(np.float32)
    quantized = int8_graph(residual_network(0), frames)
    fed = on_grid(quantized, frames)
    simulated = session(quantized, options).run(None, {"input": fed})[0]
    exact = session(quantized).run(None, {"input": fed})[0]
    step = np.diff(np.unique(exact)).min()
    assert np.abs(simulated - exact).max() <= 4 * step
    assert (simulated.argmax(1) == exact.argmax(1)).all()


def test_a_dead_channel_does_not_overflow():
    """Weights that vanish and a bias that does not: its code would need 2^43."""
    random = RANDOM(2)
    w, b = weights(random, 8, 4, 1, 1), weights(random, 8)
    w[3], b[3] = 1e-12, 5.0
    w[4], b[4] = 0.0, -2.0
    node = helper.make_node("Conv", ["input", "w", "b"], ["logits"])
    model = student([node], (4, 6, 6), {"w": w, "b": b})
    frames = random.normal(size=(8, 4, 6, 6)).astype(np.float32)
    quantized = int8_graph(model, frames)
    found = session(quantized).run(None, {"input": on_grid(quantized, frames)})[0]
    constants = {i.name: numpy_helper.to_array(i) for i in quantized.graph.initializer}
    step = float(constants["logits/scale"])
    assert np.abs(found[:, 3] - 5.0).max() <= step
    assert np.abs(found[:, 4] + 2.0).max() <= step
    assert_bit_exact(model, frames)


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**16),
    channels=st.integers(1, 40),
    out=st.integers(1, 24),
    kernel=st.sampled_from([1, 3, 5]),
    stride=st.sampled_from([1, 2]),
    spread=st.floats(0.01, 100),
    shift=st.floats(-3, 3),
)
def test_any_convolution(seed, channels, out, kernel, stride, spread, shift):
    random = RANDOM(seed)
    node = helper.make_node(
        "Conv", ["input", "w", "b"], ["logits"], pads=[kernel // 2] * 4, strides=[stride, stride]
    )
    constants = {"w": weights(random, out, channels, kernel, kernel), "b": weights(random, out)}
    frames = ((random.normal(size=(3, channels, 8, 8)) + shift) * spread).astype(np.float32)
    model = student([node], (channels, 8, 8), constants)
    quantized = int8_graph(model, frames)
    fed = on_grid(quantized, frames)
    assert np.array_equal(session(quantized).run(None, {"input": fed})[0], run(quantized, fed))
