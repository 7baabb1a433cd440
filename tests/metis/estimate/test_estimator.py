"""The estimate on graphs worked by hand, its laws, and what it refuses."""

import csv
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from metis.estimate.cost_model import Settings, frame_ms, load_cost_model, published_rows
from metis.estimate.estimator import estimate
from metis.estimate.workload import Window, read_workload

ROOT = Path(__file__).parents[3]


class Network:
    """Builds an ONNX graph node by node; weights are uninitialised memory, as nobody runs it."""

    def __init__(self, channels=3, size=32):
        self.nodes, self.constants, self.size = [], [], size
        self.last, self.channels = "input", channels
        self.inputs = [
            helper.make_tensor_value_info("input", TensorProto.FLOAT, [1, channels, size, size])
        ]

    def constant(self, *shape):
        name = f"w{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.zeros(shape, np.float32), name))
        return name

    def node(self, op_type, *inputs, **attributes):
        name = f"{op_type}{len(self.nodes)}"
        found = list(inputs) or [self.last]
        self.nodes.append(helper.make_node(op_type, found, [name], name, **attributes))
        self.last = name
        return name

    def conv(self, cout, kernel=3, group=1, stride=1):
        weight = self.constant(cout, self.channels // group, kernel, kernel)
        self.channels = cout
        pads = [kernel // 2] * 4
        return self.node("Conv", self.last, weight, group=group, pads=pads, strides=[stride] * 2)

    def model(self):
        output = helper.make_tensor_value_info(self.last, TensorProto.FLOAT, None)
        graph = helper.make_graph(self.nodes, "g", self.inputs, [output], self.constants)
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])


def workload(network):
    return read_workload(network.model())


def of(network, number=0):
    return workload(network).layers[number]


def test_a_convolution_counts_padded_channels_and_tiles_of_512():
    network = Network(channels=100, size=8)
    network.node("Relu")  # so that the convolution is not the network's first
    network.conv(600)
    layer = of(network)
    # 100 channels are padded to 128, 600 to 640: 1152 rows are 3 tiles, 640 columns are 2.
    assert layer.weight_bytes == 128 * 9 * 640
    assert layer.needed_weights == 100 * 9 * 600
    assert layer.tiles == layer.copied_tiles == 64 * 3 * 2
    assert layer.macs == 64 * 100 * 9 * 600


def test_the_networks_input_is_padded_to_four_channels():
    network = Network(channels=3, size=16)
    network.conv(32, kernel=7, stride=2)
    assert of(network).weight_bytes == 4 * 49 * 64
    # 196 rows; 4 copies need 4 * 7 * (7 + 3 * 2) = 364 of 512 rows, 8 would need 588.
    assert of(network).copied_tiles == 8 * 2
    assert of(network).tiles == 64


def test_a_grouped_convolution_is_filled_up_and_a_depthwise_one_is_not():
    dense, grouped, depthwise = (Network(channels=128, size=8) for _ in range(3))
    dense.conv(128)
    grouped.conv(128, group=32)
    depthwise.conv(128, group=128)
    assert of(grouped).weight_bytes == of(dense).weight_bytes
    assert of(grouped).tiles == of(dense).tiles
    assert of(grouped).macs == of(dense).macs / 32
    assert (of(depthwise).tiles, of(depthwise).taps) == (0, 64 * 128 * 9)
    assert of(depthwise).weight_bytes == 128 * 9


def test_an_activation_is_an_operator_unless_it_is_relu():
    plain, silu, relu = (Network(channels=8) for _ in range(3))
    for network in (plain, silu, relu):
        network.conv(8)
    silu.node("Mul", "Conv0", silu.node("Sigmoid"))
    relu.node("Relu")
    assert [layer.op_type for layer in workload(silu).layers] == ["Conv", "activation"]
    assert workload(relu).total == workload(plain).total


def test_maps_beyond_a_cores_memory_spill():
    network = Network(channels=3, size=256)
    network.conv(64)
    assert of(network).spill_bytes == 256 * 256 * (4 + 64) - 3_670_000
    shares = [
        estimate(network.model()).boards[board].shares()["memory"] for board in ("pcie", "m2")
    ]
    assert 0 < shares[0] < shares[1]


def test_a_long_concat_goes_through_memory_once_per_input():
    network = Network(channels=64, size=16)
    network.conv(64)
    network.node("Concat", *["Conv0"] * 9, axis=1)
    network.channels = 9 * 64
    network.conv(64)
    assert workload(network).layers[1].concat_bytes == 9 * (9 * 64) * 256
    assert any("Concat" in miss for miss in estimate(network.model()).misses)


def test_the_formula_by_hand():
    costs = load_cost_model()
    network = Network(channels=512, size=56)
    network.conv(512)
    # 512 * 9 rows are nine tiles, 512 columns one; copies do not fit beside each other.
    tiles, megabytes = 56 * 56 * 9, 512 * 9 * 512 / 1e6
    ms = costs.tiles * tiles / 1e6 + costs.weights * megabytes + costs.operators / 1e3
    found = estimate(network.model()).boards["pcie"]
    assert found.throughput.value == pytest.approx(1000 / ms)
    assert found.latency.value == pytest.approx(4 * ms)  # one frame on one core of four
    assert found.throughput.low == pytest.approx(1000 / ms / costs.error_factor["pcie"])
    assert found.throughput.high == pytest.approx(1000 / ms * costs.error_factor["pcie"])


def test_weights_beyond_the_share_of_l2_are_streamed_and_more_cores_share_more():
    costs = load_cost_model()
    network = Network(channels=1024, size=4)
    network.conv(1024)
    network.conv(1024)  # 18.9 MB: more than a quarter of 28.1, less than all
    model = network.model()
    one, four = (estimate(model, Settings(cores)).boards["m2"] for cores in (1, 4))
    assert one.slowest(1)[0].term == "memory"
    assert one.shares()["memory"] > 0.5
    assert four.shares()["memory"] == 0
    megabytes = 2 * 1024 * 9 * 1024 / 1e6 - costs.l2 / 4
    assert 1000 / one.throughput.value == pytest.approx(
        ((megabytes / costs.bandwidth) ** 2.5 + (1000 / four.throughput.value) ** 2.5) ** 0.4
    )
    assert "aipu_cores" in json.dumps(estimate(model).facts()["boards"]["m2"]["slowest"][0])


SHAPES = st.fixed_dictionaries(
    {
        "column": st.integers(1, 40).map(lambda n: 64 * n),
        "width": st.integers(1, 7),
        "stride": st.integers(1, 2),
        "outputs": st.integers(1, 20).map(lambda n: 64 * n),
    }
)
PIXELS = st.tuples(st.integers(1, 60), st.integers(1, 60))


@given(SHAPES, PIXELS, st.sampled_from(["column", "width", "outputs", "height", "columns"]))
def test_more_work_in_a_layer_is_never_fewer_tiles(shape, pixels, larger):
    grown = dict(shape)
    height, width = pixels
    if larger in grown:
        grown[larger] += 64 if larger in ("column", "outputs") else 1
    grown_pixels = (height + (larger == "height"), width + (larger == "columns"))
    for count in (Window.tiles, Window.copied_tiles, Window.first_layer):
        assume(
            count is not Window.copied_tiles or pixels != (1, 1)
        )  # a single pixel is never copied
        assert count(Window(**grown), grown_pixels) >= count(Window(**shape), pixels)


@st.composite
def networks(draw):
    network = Network(channels=draw(st.integers(1, 12)), size=draw(st.sampled_from([32, 64])))
    for _ in range(draw(st.integers(1, 4))):
        kernel, channels = draw(st.sampled_from([1, 3, 5])), draw(st.integers(1, 900))
        network.conv(channels, kernel, stride=draw(st.integers(1, 2)))
        if draw(st.booleans()):
            network.conv(channels, 3, group=channels)
        if draw(st.booleans()):
            network.node("HardSwish")
    return network


@given(networks())
def test_more_cores_per_model_never_cost_throughput_and_m2_is_never_faster(network):
    total, costs = workload(network).total, load_cost_model()
    ms = {
        board: [frame_ms(total, Settings(cores), costs, board) for cores in (1, 2, 4)]
        for board in ("pcie", "m2")
    }
    for board in ms:
        assert ms[board] == sorted(ms[board], reverse=True)
    assert all(pcie <= m2 for pcie, m2 in zip(ms["pcie"], ms["m2"], strict=True))


@given(networks(), st.sampled_from([1, 2, 3, 4]), st.booleans())
def test_the_layers_sum_up_to_the_frame(network, cores, replication):
    found = estimate(network.model(), Settings(cores, replication))
    for board in found.boards.values():
        total = sum(time.ms for time in board.layers)
        assert total == pytest.approx(1000 / board.throughput.value)
        assert sum(board.shares().values()) == pytest.approx(1)


def test_three_cores_per_model_leave_one_idle():
    network = Network(channels=64)
    network.conv(64)
    total, costs = workload(network).total, load_cost_model()
    ms = [frame_ms(total, Settings(cores), costs, "pcie") for cores in (3, 4)]
    assert ms[0] == pytest.approx(ms[1] * 4 / 3)


def attention():
    network = Network(channels=8, size=16)
    network.conv(8, stride=1)
    network.node("MatMul", "Conv0", "Conv0")
    network.conv(8)
    return network


def attention_at_the_end():
    network = Network(channels=8, size=16)
    network.conv(8)
    network.node("MatMul", "Conv0", "Conv0")
    return network


def big_input():
    network = Network(size=1024)
    network.conv(16, stride=2)
    return network


def no_convolution():
    network = Network()
    network.node("MaxPool", kernel_shape=[2, 2])
    return network


def free_shape():
    network = Network()
    network.conv(8)
    network.inputs[0].type.tensor_type.shape.dim[2].dim_param = "height"
    return network


def overflowing():
    network = Network(size=640)
    for _ in range(3):
        network.conv(64)
    return network


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (attention, "MatMul1 multiplies two activations"),
        (big_input, "the input is 1024x1024; above 640"),
        (no_convolution, "no convolution"),
        (free_shape, "fixed"),
        (overflowing, "MB of maps per frame do not fit"),
    ],
)
def test_no_figure_is_given_for_what_the_model_can_not_price(build, words):
    found = estimate(build().model())
    assert words in found.obstacle
    facts = found.facts()
    assert facts["obstacle"] == found.obstacle
    assert facts["boards"] == facts["by_aipu_cores"] == {}
    assert "frames/s" not in "\n".join(found.lines())


def padded_pool():
    network = Network(channels=8, size=54)
    network.conv(8)
    network.node("MaxPool", kernel_shape=[3, 3], strides=[2, 2], ceil_mode=1)
    network.conv(8)
    return network


def hard_swish():
    network = Network(channels=8)
    network.conv(8)
    network.node("HardSwish")
    network.conv(8)
    return network


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (padded_pool, "SqueezeNet 1.0"),
        (hard_swish, "HardSwish"),
        (attention_at_the_end, "MatMul1 is left to the host"),
    ],
)
def test_a_kind_that_the_model_misses_has_no_band_and_says_why(build, words):
    found = estimate(build().model())
    assert any(words in miss for miss in found.misses)
    for figure in (found.boards["pcie"].throughput, found.boards["m2"].latency):
        assert figure.value > 0
        assert figure.low is figure.high is None
    assert words in "\n".join(found.lines())


def test_a_pool_that_rounds_up_without_padding_is_no_miss():
    network = padded_pool()
    network.inputs[0].type.tensor_type.shape.dim[2].dim_value = 55
    network.inputs[0].type.tensor_type.shape.dim[3].dim_value = 55
    assert not any("SqueezeNet" in miss for miss in estimate(network.model()).misses)


def test_what_is_faster_than_anything_published_has_no_band():
    network = Network(channels=8)
    network.conv(8)
    found = estimate(network.model())
    assert found.boards["pcie"].throughput.low is None
    assert any("faster than 7298" in miss for miss in found.misses)


def test_every_figure_is_labelled_as_an_estimate():
    network = Network()
    network.conv(64)

    def labels(value):
        if isinstance(value, dict):
            if "value" in value:
                yield value.get("measured_on")
            for inner in value.values():
                yield from labels(inner)
        elif isinstance(value, list):
            for inner in value:
                yield from labels(inner)

    found = estimate(network.model(), Settings(2))
    assert set(labels(json.loads(json.dumps(found.facts())))) == {"estimate"}
    labelled = [line for line in found.lines() if line.endswith("[estimate]")]
    assert len(labelled) == 4  # two boards, and what one and four cores would give


def test_advice_follows_from_what_dominates():
    network = Network(channels=64, size=8)
    network.conv(2048, group=2)  # 1.2 M weights as 2.4 M
    network.node("HardSwish")
    advice = {
        time["op_type"]: time["advice"]
        for time in estimate(network.model()).facts()["boards"]["pcie"]["slowest"]
    }
    assert "groups are filled up to 2.0 times" in advice["grouped Conv"]
    assert "ReLU costs nothing" in advice["activation"]


def test_published_rows_are_those_of_the_vendors_table():
    rows = {row.network: row for row in published_rows()}
    assert len(rows) == 26
    assert rows["resnet50"].fps == {"pcie": 1946, "m2": 1756}
    assert rows["densenet121"].fps == {"pcie": 281, "m2": 156}
    assert not rows["efficientnet_b4"].replication
    assert {f["measured_on"] for f in rows["resnet18"].facts()["boards"].values()} == {"published"}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet18", "mobilenetv2_100", "efficientnet_b0", "regnety_004"])
def test_a_published_network_is_within_a_fifth(tmp_path, name):
    from pipeline.networks.build import create_network
    from pipeline.networks.export import export_network

    row = next(row for row in published_rows() if row.network == name)
    shape = (3, row.size, row.size)
    network = create_network(name, shape, 1000, seed=0)
    graph = export_network(network, shape, tmp_path / "network.onnx").model
    found = estimate(graph, Settings(row.aipu_cores, row.replication))
    for board, fps in row.fps.items():
        assert found.boards[board].throughput.value == pytest.approx(fps, rel=0.2)
    # The committed features, from which the constants come, are those of this graph.
    lines = (ROOT / "benchmarks" / "estimator_features.csv").read_text().splitlines()
    features = {r["network"]: r for r in csv.DictReader(x for x in lines if x[0] != "#")}
    total = read_workload(graph).total
    for quantity, value in features[name].items():
        if quantity != "network":
            assert getattr(total, quantity) == int(value), quantity


def test_other_constants_give_other_figures():
    network = Network()
    network.conv(64)
    costs = load_cost_model()
    slower = replace(costs, operators=1000 * costs.operators)
    before, after = (
        estimate(network.model(), costs=each).boards["pcie"].throughput.value
        for each in (costs, slower)
    )
    assert after < before / 2


def test_an_unreadable_batch_is_one():
    network = Network()
    network.conv(64)
    fixed = estimate(network.model())
    network.inputs[0].type.tensor_type.shape.dim[0].dim_param = "N"
    free = estimate(onnx.ModelProto.FromString(network.model().SerializeToString()))
    assert free.facts() == fixed.facts()
