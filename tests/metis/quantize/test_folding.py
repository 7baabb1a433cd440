import numpy as np
import onnx
import pytest
from networks import plain_network, residual_network, student, weights
from onnx import helper

from metis.backend import BackendError
from metis.emulator.execute import run_graphs
from metis.quantize.equalization import equalize
from metis.quantize.folding import prepare

RANDOM = np.random.default_rng


def frames(model, count=6):
    shape = [d.dim_value for d in model.graph.input[0].type.tensor_type.shape.dim][1:]
    return RANDOM(4).normal(size=(count, *shape)).astype(np.float32)


def one_by_one(model, batch):
    return np.concatenate([run_graphs([(model, {})], frame[None]) for frame in batch])


@pytest.mark.parametrize("relu", [True, False])
def test_folding_keeps_what_the_student_computes(relu):
    model = plain_network(0, relu=relu)
    batch = frames(model)
    parts = prepare(model)
    kinds = [node.op_type for node in parts.core.graph.node]
    assert "BatchNormalization" not in kinds
    assert kinds.count("Conv") == 4
    expected = one_by_one(model, batch)
    assert np.allclose(run_graphs([(parts.core, {})], batch), expected, atol=1e-5)
    assert np.allclose(one_by_one(parts.student, batch), expected, atol=1e-5)
    assert parts.preamble is None
    assert parts.postamble is None


def test_a_batchnorm_of_its_own_becomes_a_convolution():
    random = RANDOM(0)
    model = student(
        [
            helper.make_node("BatchNormalization", ["input", "g", "h", "m", "v"], ["n"]),
            helper.make_node("Relu", ["n"], ["r"]),
            helper.make_node("Conv", ["r", "w"], ["logits"]),
        ],
        (4, 6, 6),
        {
            "g": random.uniform(0.5, 2, 4).astype(np.float32),
            "h": weights(random, 4),
            "m": weights(random, 4),
            "v": random.uniform(0.5, 2, 4).astype(np.float32),
            "w": weights(random, 3, 4, 1, 1),
        },
    )
    parts = prepare(model)
    assert [n.op_type for n in parts.core.graph.node] == ["Conv", "Relu", "Conv"]
    batch = frames(model)
    assert np.allclose(run_graphs([(parts.core, {})], batch), one_by_one(model, batch), atol=1e-5)


def test_ends_that_the_chip_lacks_go_to_the_host():
    random = RANDOM(1)
    model = student(
        [
            helper.make_node("Exp", ["input"], ["e"]),
            helper.make_node("Conv", ["e", "w"], ["c"]),
            helper.make_node("GlobalAveragePool", ["c"], ["p"]),
            helper.make_node("Flatten", ["p"], ["f"]),
            helper.make_node("Exp", ["f"], ["x"]),
            helper.make_node("Log", ["x"], ["logits"]),
        ],
        (4, 6, 6),
        {"w": weights(random, 3, 4, 1, 1)},
        out_rank=2,
    )
    parts = prepare(model)
    assert parts.host_operators == ["Exp", "Exp", "Log"]
    assert [n.op_type for n in parts.core.graph.node] == ["Conv", "GlobalAveragePool", "Flatten"]
    batch = frames(model)
    found = run_graphs([(parts.preamble, {}), (parts.core, {}), (parts.postamble, {})], batch)
    assert np.allclose(found, one_by_one(model, batch), atol=1e-5)


def test_constants_may_be_numbers_in_a_node():
    nodes = [
        helper.make_node("Constant", [], ["two"], value_float=2.0),
        helper.make_node("Mul", ["input", "two"], ["double"]),
        helper.make_node("Relu", ["double"], ["logits"]),
    ]
    model = student(nodes, (4, 6, 6), {})
    parts, batch = prepare(model), frames(model)
    assert np.allclose(run_graphs([(parts.core, {})], batch), one_by_one(model, batch))


def test_an_operator_in_the_middle_is_refused_by_name():
    random = RANDOM(1)
    model = student(
        [
            helper.make_node("Conv", ["input", "w"], ["c"]),
            helper.make_node("Exp", ["c"], ["e"], name="exp_in_the_middle"),
            helper.make_node("Conv", ["e", "w"], ["logits"]),
        ],
        (4, 6, 6),
        {"w": weights(random, 4, 4, 1, 1)},
    )
    with pytest.raises(BackendError, match="can't run Exp exp_in_the_middle: not in the list"):
        prepare(model)


@pytest.mark.parametrize("seed", range(3))
def test_equalization_changes_the_weights_and_not_the_network(seed):
    model = prepare(plain_network(seed, spread=20.0)).student
    moved, pairs = equalize(model)
    assert pairs == 3  # dense-dense, dense-depthwise, depthwise-dense
    batch = frames(model)
    expected = one_by_one(model, batch)
    assert np.allclose(one_by_one(moved, batch), expected, rtol=1e-4, atol=1e-4)
    assert unevenness(moved) < 0.6 * unevenness(model)


def unevenness(model):
    """Mean spread of log2 of the channels' largest weights."""
    constants = {i.name: onnx.numpy_helper.to_array(i) for i in model.graph.initializer}
    convolutions = [n for n in model.graph.node if n.op_type == "Conv"]
    spreads = [
        np.log2(np.abs(constants[n.input[1]]).max(axis=(1, 2, 3))).std() for n in convolutions[:-1]
    ]
    return float(np.mean(spreads))


def test_what_several_layers_read_is_not_equalized():
    model = prepare(residual_network(0)).student
    moved, pairs = equalize(model)
    assert pairs == 2  # w2-w3 over a Relu, w5-w6; not over HardSwish, Clip, or into the Add
    batch = frames(model)
    assert np.allclose(one_by_one(moved, batch), one_by_one(model, batch), atol=1e-4)
