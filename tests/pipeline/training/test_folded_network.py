"""The torch network of a folded graph against onnxruntime: in float, and on the emulator's grid."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest.mock import patch

import numpy as np
import onnx
import pytest
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st
from networks import residual_network
from onnx import TensorProto, helper, numpy_helper
from rounding import UNIT, assert_codes, widest

from metis.emulator.device_tensors import device_specs
from metis.emulator.execute import int8_network, put_on_grid, run_graphs
from metis.emulator.kernels import arithmetic
from metis.graph.edit import constants_of, show_tensors, with_batch
from metis.graph.sessions import open_session
from metis.quantize import grids
from metis.quantize.folding import prepare
from metis.quantize.grids import UINT8_SHIFT
from metis.quantize.placement import open_observations
from metis.quantize.qdq import quantize_graph
from metis.quantize.ranges import choose
from pipeline.networks.export import export_network
from pipeline.run.errors import InputError
from pipeline.training.folded_network import FoldedNetwork, check_trainable, weight_scales
from pipeline.training.folded_operators import OPERATORS
from preprocessing.int8 import dequantize

SCHEME = "per_tensor_histogram"
LANDSAT = Path(__file__).parents[3] / "examples" / "landsat" / "landsat_satellite.npz"


def patches(count, size):
    """Real patches, three bands, nearest to a size, mean 0 and deviation 1."""
    with np.load(LANDSAT) as archive:
        images = archive["images"][:count, :, :, :3].astype(np.float32).transpose(0, 3, 1, 2)
    index = np.arange(size) * images.shape[2] // size
    images = images[:, :, index][:, :, :, index]
    centered = images - images.mean(axis=(0, 2, 3), keepdims=True)
    return np.ascontiguousarray(centered / centered.std(axis=(0, 2, 3), keepdims=True))


def exported(folder, name, size=32):
    """A network of timm whose BatchNorms have seen real patches."""
    torch.manual_seed(0)
    network = timm.create_model(name, num_classes=6, in_chans=3).train()
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):  # timm starts some at 0, where nothing learns
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
    with torch.no_grad():
        for part in torch.from_numpy(patches(256, size)).split(64):
            network(part)
    export_network(network, (3, size, size), folder / "student.onnx")
    return network.eval(), prepare(onnx.load(folder / "student.onnx"))


def chosen(parts, frames):
    seen = open_observations(parts)
    seen.add(frames, lambda count: None)
    return choose(seen, "mse")


def logits(network, frames):
    with torch.no_grad():
        return network(torch.from_numpy(frames)).numpy()


class Fed(FoldedNetwork):
    """The folded network, each of whose steps gets what the other side has made up to there.

    Left alone, the two have no bound in common: sums in another order put one value in a million on
    the other side of a tie, and what later layers make of that one step is theirs. Step by step
    there is one, of `rounding`, and steps that are all the same are the same network.
    """

    def __init__(self, parts, ranges, other, compare):
        super().__init__(parts, ranges)
        self._other = other  # tensors by name; those of a fused activation are not stored
        self._compare = compare  # (name, before it is stored, stored, how far that may be off)
        self._widest = []
        self._unstored = {}

    def forward(self, x):
        self._widest = [0.0]
        watched = {kind: partial(self._call, kind, run) for kind, run in OPERATORS.items()}
        with patch.dict(OPERATORS, watched):
            return super().forward(x)

    def _call(self, kind, operator, given, *inputs):
        # What is not stored goes through a Relu or a Clip, which move nothing farther apart.
        before = sum(self._unstored[id(x)][1] for x in inputs if id(x) in self._unstored)
        self._widest = [before + each for each in widest(kind, operator, given, inputs)]
        return operator(given, *inputs)

    def _put_on_grid(self, name, tensor):
        stored, apart = super()._put_on_grid(name, tensor), self._widest.pop(0)
        if name not in self._other:
            self._unstored[id(stored)] = stored, apart
            return stored
        self._compare(name, tensor.detach().numpy(), stored.detach().numpy(), apart)
        return torch.from_numpy(self._other[name])


def assert_float_steps(parts, frames):
    """In float, every step of the torch network gives what onnxruntime gives."""
    model = with_batch(parts.student, "N")
    names = [name for node in model.graph.node for name in node.output]
    session = open_session(show_tensors(model, names))
    made = session.run(names, {session.get_inputs()[0].name: frames})
    other = dict(zip(names, made, strict=True))

    def compare(name, tensor, stored, apart):
        assert (np.abs(tensor - other[name]) <= apart).all(), name
        compared.append(name)

    compared = []
    logits(Fed(parts, None, other, compare), frames)
    assert compared == names


def assert_int8_steps(parts, frames, build=Fed):
    """On the grid, every step of the torch network gives the emulator's codes."""
    assert parts.preamble is None
    ranges = chosen(parts, frames)
    quantized = quantize_graph(parts.core, ranges, scheme=SCHEME)
    stored = [node for node in quantized.graph.node if node.op_type == "QuantizeLinear"]
    names = [node.output[0] for node in stored]
    session = open_session(show_tensors(quantized, names), options=arithmetic(SCHEME)[1])
    fed = put_on_grid(frames, device_specs(quantized)[0])
    made = session.run(names, {session.get_inputs()[0].name: fed})
    constants, codes, grids = constants_of(quantized), {}, {}
    for node, found in zip(stored, made, strict=True):
        scale, zero_point = (constants[name] for name in node.input[1:3])
        name = node.output[0].removesuffix("/codes")
        codes[name] = found.astype(np.int64) - UINT8_SHIFT
        grids[name] = scale, int(zero_point) - UINT8_SHIFT

    def compare(name, tensor, on_grid, apart):
        scale, zero_point = grids[name]
        assert_codes(codes[name], tensor, scale, zero_point, apart)
        own = np.rint(on_grid.astype(np.float64) / scale) + zero_point
        assert_codes(own, tensor, scale, zero_point, 0)
        compared.append(name)

    compared = []
    other = {name: dequantize(codes[name], *grids[name]) for name in codes}
    found = logits(build(parts, ranges, other, compare), frames)
    assert sorted(compared) == sorted(codes)
    last = other[quantized.graph.output[0].name]
    host = run_graphs([(parts.postamble, {})], last)  # in float; often there is nothing to do
    assert found == pytest.approx(host, abs=1e-5)


NETWORKS = ["test_byobnet", "test_resnet", "test_efficientnet", "mobilenetv3_small_050"]


@pytest.mark.parametrize("name", NETWORKS)
def test_folding_changes_a_network_by_the_rounding_of_its_weights_alone(tmp_path, name):
    """Both in float64, whose own rounding is nothing here; the bound is of first order.

    Folding rounds a weight four times (variance + epsilon, root, quotient, product) and a bias six
    times, where numbers as large as mean * scale and shift meet.
    """
    network, parts = exported(tmp_path, name)
    folded, frame = FoldedNetwork(parts).double(), torch.from_numpy(patches(1, 32)).double()
    norms = [m for m in network.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    scales = [m.weight / (m.running_var + m.eps).sqrt() for m in norms]
    largest = max(
        float(((m.running_mean * scale).abs() + m.bias.abs()).detach().max())
        for m, scale in zip(norms, scales, strict=True)
    )
    weights = list(folded.parameters())
    rounded = [4 * w.detach().abs() if w.ndim > 1 else 6 * largest for w in weights]
    found, expected = folded(frame)[0], network.double()(frame)[0]
    for logit, other in zip(found, expected, strict=True):
        slopes = torch.autograd.grad(logit, weights, retain_graph=True)
        moved = sum(float((g.abs() * r).sum()) for g, r in zip(slopes, rounded, strict=True))
        assert abs(logit.item() - other.item()) <= UNIT * moved


@pytest.mark.parametrize("name", NETWORKS)
def test_float_is_the_graph_and_the_grid_is_the_emulators(tmp_path, name):
    _, parts = exported(tmp_path, name)
    frames = patches(48, 32)
    assert_float_steps(parts, frames)
    assert_int8_steps(parts, frames)


def another_scale(network):
    scale, zero_point = network._grids["gated"]
    network._grids["gated"] = scale * 1.001, zero_point


def another_zero_point(network):
    scale, zero_point = network._grids["sum"]
    network._grids["sum"] = scale, zero_point + 1


def another_code(network):
    """Of one weight: nothing else is off."""
    with torch.no_grad():
        kernel = network.weights["w4"]
        kernel[0, 3] += kernel[0].abs().max() / 127 * (1 if kernel[0, 3] < 0 else -1)


def another_bias(network):
    with torch.no_grad():
        network.weights["b7"][2] += 0.01


#: What is wrong with the network, and the operator that is left out, if that is it.
WRONG = {
    "a scale": (another_scale, None),
    "a zero point": (another_zero_point, None),
    "a weight's code": (another_code, None),
    "a bias": (another_bias, None),
    "an activation": (lambda network: None, "HardSwish"),
    "a gate": (lambda network: None, "HardSigmoid"),
}


@pytest.mark.parametrize("what", WRONG)
def test_whatever_is_wrong_is_found_on_the_grid(monkeypatch, what):
    change, left_out = WRONG[what]
    parts = prepare(residual_network(0))
    frames = np.random.default_rng(1).normal(0, 1.5, (16, 3, 12, 12)).astype(np.float32)
    assert_int8_steps(parts, frames)

    def wrong(*given):
        network = Fed(*given)
        change(network)
        return network

    if left_out:
        monkeypatch.setitem(OPERATORS, left_out, lambda given, x: x)
    with pytest.raises(AssertionError, match="codes are not those of their values"):
        assert_int8_steps(parts, frames, wrong)


@pytest.mark.parametrize("kind", ["Relu", "Clip", "HardSwish", "HardSigmoid"])
def test_an_activation_that_is_left_out_is_found_in_float(monkeypatch, kind):
    parts = prepare(residual_network(0))
    frames = np.random.default_rng(1).normal(0, 1.5, (16, 3, 12, 12)).astype(np.float32)
    assert_float_steps(parts, frames)
    monkeypatch.setitem(OPERATORS, kind, lambda given, x, *limits: x)
    with pytest.raises(AssertionError):
        assert_float_steps(parts, frames)


def graph(nodes, constants, shape, out):
    model = helper.make_model(
        helper.make_graph(
            nodes,
            "operators",
            [helper.make_tensor_value_info("input", TensorProto.FLOAT, [1, *shape])],
            [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [1, *out])],
            [numpy_helper.from_array(np.asarray(v), n) for n, v in constants.items()],
        ),
        opset_imports=[helper.make_opsetid("", 17)],
        ir_version=8,
    )
    onnx.checker.check_model(model, full_check=True)
    return model


_RANDOM = np.random.default_rng(0)


def _weight(*shape):
    return (_RANDOM.normal(size=shape) / np.sqrt(np.prod(shape[1:]))).astype(np.float32)


def _ints(*values):
    return np.array(values, np.int64)


CONSTANTS = {
    "w": _weight(64, 64, 3, 3),
    "b": _weight(64, 1)[:, 0],
    "w_out": _weight(64, 8, 2, 2),
    "w_group": _weight(64, 1, 3, 3),
    "square": _weight(64, 64),
    "slope": np.abs(_weight(64, 1, 1)),
    "per_channel": _weight(1, 64, 1, 1),
    "scalar": np.float32(0.3),
    "zero": np.float32(0),
    "six": np.float32(6),
    "none": np.float32([]),
    "double": np.float32([1, 1, 2, 2]),
    "from": _ints(16),
    "to": _ints(48),
    "channels": _ints(1),
    "parts": _ints(24, 40),
    "space": _ints(2, 3),
    "pads": _ints(0, 0, 1, 2, 0, 0, 0, 1),
    "flat": _ints(1, -1),
}

#: Each: nodes from `input` (64, 6, 6) to `made`.
CASES = {
    "Conv uneven pads": [("Conv", "input w b", {"pads": [0, 1, 2, 1], "strides": [2, 1]})],
    "Conv groups dilated": [("Conv", "input w_group", {"group": 64, "dilations": [2, 2]})],
    "ConvTranspose": [
        ("ConvTranspose", "input w_out", {"strides": [2, 2], "pads": [1, 1, 1, 1]})
    ],
    "Relu": [("Relu", "input", {})],
    "Clip": [("Clip", "input zero six", {})],
    "HardSwish": [("HardSwish", "input", {})],
    "HardSigmoid": [("HardSigmoid", "input", {"alpha": 1 / 6, "beta": 0.5})],
    "Sigmoid": [("Sigmoid", "input", {})],
    "Tanh": [("Tanh", "input", {})],
    "Selu": [("Selu", "input", {})],
    "LeakyRelu": [("LeakyRelu", "input", {"alpha": 0.1})],
    "PRelu": [("PRelu", "input slope", {})],
    "Add constant": [("Add", "input per_channel", {})],
    "Mul constant": [("Mul", "input per_channel", {})],
    "Sub scalar": [("Sub", "input scalar", {})],
    "Mul of two": [("Sigmoid", "input", {}), ("Mul", "input made0", {})],
    "Concat": [("Relu", "input", {}), ("Concat", "input made0", {"axis": 1})],
    "MaxPool": [("MaxPool", "input", {"kernel_shape": [3, 3], "pads": [1, 0, 0, 1]})],
    "AveragePool": [
        (
            "AveragePool",
            "input",
            {"kernel_shape": [2, 2], "strides": [2, 2], "pads": [1, 1, 1, 1],
             "count_include_pad": 1},
        )
    ],
    "GlobalAveragePool": [("GlobalAveragePool", "input", {})],
    "GlobalMaxPool": [("GlobalMaxPool", "input", {})],
    "Squeeze": [
        ("GlobalMaxPool", "input", {}),
        ("Squeeze", "made0 space", {}),
        ("Gemm", "made1 square", {}),
    ],
    "Slice": [("Slice", "input from to channels", {})],
    "Split": [("Relu", "input", {}), ("Split", "made0 parts", {"axis": 1})],
    "Split evenly": [("Relu", "input", {}), ("Split", "made0", {"axis": 1})],
    "Pad": [("Pad", "input pads", {})],
    "Reshape": [("Reshape", "input flat", {})],
    "Resize nearest": [
        (
            "Resize",
            "input none double",
            {"mode": "nearest", "coordinate_transformation_mode": "asymmetric",
             "nearest_mode": "floor"},
        )
    ],
    "Resize linear": [
        (
            "Resize",
            "input  double",
            {"mode": "linear", "coordinate_transformation_mode": "half_pixel"},
        )
    ],
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_every_operator_of_the_chip_computes_what_onnxruntime_does(case):
    nodes, frames = [], np.random.default_rng(1).normal(size=(5, 64, 6, 6)).astype(np.float32)
    for i, (kind, words, attributes) in enumerate(CASES[case]):
        made = [f"made{i}", f"other{i}"] if kind == "Split" else [f"made{i}"]
        nodes.append(helper.make_node(kind, words.split(" "), made, **attributes))
    nodes.append(helper.make_node("Flatten", [nodes[-1].output[-1]], ["logits"]))
    used = {name for node in nodes for name in node.input}
    kept = {name: value for name, value in CONSTANTS.items() if name in used}
    rough = graph(nodes, kept, (64, 6, 6), ["n"])
    width = open_session(rough).run(None, {"input": frames[:1]})[0].shape[1]
    parts = prepare(graph(nodes, kept, (64, 6, 6), [width]))
    assert_float_steps(parts, frames)
    assert_int8_steps(parts, frames)


def test_an_operator_that_torch_has_no_word_for_is_refused(tmp_path):
    nodes = [
        helper.make_node("Relu", ["input"], ["made"]),
        helper.make_node("Flatten", ["made"], ["flat"]),
        helper.make_node("Erf", ["flat"], ["logits"]),
    ]
    onnx.save(graph(nodes, {}, (2, 2, 2), [8]), tmp_path / "student.onnx")
    with pytest.raises(InputError, match=r"can't train Erf; .*share to 0"):
        check_trainable(tmp_path / "student.onnx")


def test_ends_on_the_host_stay_float():
    nodes = [
        helper.make_node("Conv", ["input", "w"], ["made"]),
        helper.make_node("GlobalAveragePool", ["made"], ["mean"]),
        helper.make_node("Flatten", ["mean"], ["flat"]),
        helper.make_node("Softmax", ["flat"], ["logits"], axis=1),
    ]
    parts = prepare(graph(nodes, {"w": CONSTANTS["w"]}, (64, 6, 6), [64]))
    frames = np.random.default_rng(1).normal(size=(5, 64, 6, 6)).astype(np.float32)
    assert parts.postamble is not None
    assert_int8_steps(parts, frames)


values = st.floats(-1e3, 1e3, width=32)


@given(
    st.lists(st.lists(values, min_size=3, max_size=3), min_size=1, max_size=4),
    values,
    st.floats(1e-4, 10),
)
def test_the_weights_grid_is_the_emulators_bit_for_bit(rows, bias, input_scale):
    weight = np.array(rows, np.float32)
    biases = np.full(len(rows), bias, np.float32)
    scale = np.float32(input_scale)
    expected = grids.weight_scales(weight, biases, scale, 0)
    found = weight_scales(torch.from_numpy(weight), torch.from_numpy(biases), float(scale), 0)
    assert np.array_equal(found.numpy(), expected)


def test_weights_between_two_codes_get_the_emulators(monkeypatch):
    """Up to the last digits: dividing in another type gives one weight in 100,000 another code."""
    random = np.random.default_rng(0)
    steps = random.uniform(0.5, 2, (64, 1)).astype(np.float32) / 127
    halves = (random.integers(-120, 120, (64, 64)) + np.float32(0.5)) * steps
    weight = np.nextafter(halves, random.choice([-9, 9], halves.shape), dtype=np.float32)
    weight[:, 0] = 127 * steps[:, 0]
    nodes = [
        helper.make_node("Conv", ["input", "w"], ["made"]),
        helper.make_node("Flatten", ["made"], ["logits"]),
    ]
    kernel = weight[..., None, None]
    parts = prepare(graph(nodes, {"w": kernel}, (64, 1, 1), [64]))
    frames = random.normal(size=(5, 64, 1, 1)).astype(np.float32)
    network, seen = FoldedNetwork(parts, chosen(parts, frames)), []
    run = OPERATORS["Conv"]
    monkeypatch.setitem(OPERATORS, "Conv", lambda given, *x: [seen.append(x), run(given, *x)][1])
    logits(network, frames)
    scales = grids.weight_scales(kernel, None, np.float32(1), 0)
    expected = grids.on_grid(kernel, scales, 0) * scales.reshape(-1, 1, 1, 1)
    assert np.array_equal(seen[0][1].detach().numpy(), expected)
    in_float64 = np.rint(kernel.astype(np.float64) / scales.reshape(-1, 1, 1, 1))
    assert (grids.on_grid(kernel, scales, 0) != in_float64).any()


def test_training_on_the_grid_reaches_every_weight_and_exports_a_clean_graph(tmp_path):
    _, parts = exported(tmp_path, "test_byobnet")
    frames = patches(32, 32)
    network = FoldedNetwork(parts, chosen(parts, frames))
    optimizer = torch.optim.Adam(network.parameters(), 1e-3)
    labels = torch.arange(32) % 6
    losses = []
    for _ in range(12):
        loss = torch.nn.functional.cross_entropy(network(torch.from_numpy(frames)), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in network.parameters())
    model = network.export()
    onnx.checker.check_model(model, full_check=True)
    assert [n.op_type for n in model.graph.node] == [n.op_type for n in parts.student.graph.node]
    written = FoldedNetwork(prepare(model)).state_dict()
    trained, before = network.state_dict(), FoldedNetwork(parts).state_dict()
    assert written.keys() == trained.keys() == before.keys()
    assert all(torch.equal(written[name], trained[name]) for name in trained)
    assert not any(torch.equal(before[name], trained[name]) for name in trained)


def test_values_outside_an_activations_range_get_no_gradient():
    parts = prepare(
        graph(
            [
                helper.make_node("LeakyRelu", ["input"], ["made"]),
                helper.make_node("Flatten", ["made"], ["logits"]),
            ],
            {},
            (1, 1, 4),
            [4],
        )
    )
    frames = np.linspace(-1, 1, 40, dtype=np.float32).reshape(10, 1, 1, 4)
    x = torch.tensor([[[[-3.0, -0.5, 0.5, 3.0]]]], requires_grad=True)
    FoldedNetwork(parts, chosen(parts, frames))(x).sum().backward()
    assert x.grad.flatten().tolist() == pytest.approx([0, 0.01, 1, 0], abs=1e-6)


@pytest.mark.slow
def test_training_on_a_coarse_grid_gains_where_more_training_in_float_does_not(tmp_path):
    """The ranges are 64 times too wide, so int8 costs much; both go on from the same student."""
    frames = torch.from_numpy(patches(1536, 16))
    with np.load(LANDSAT) as archive:
        labels = torch.from_numpy(archive["labels"][:1536].astype(np.int64))
    torch.manual_seed(0)
    network = timm.create_model("test_byobnet", num_classes=6, in_chans=3).train()
    fit(network, frames, labels, steps=96, rate=3e-3)
    export_network(network, (3, 16, 16), tmp_path / "student.onnx")
    parts = prepare(onnx.load(tmp_path / "student.onnx"))
    found = chosen(parts, frames[:128].numpy())
    wide = {n: replace(r, lo=64 * r.lo, hi=64 * r.hi) for n, r in found.tensors.items()}
    ranges = replace(found, tensors=wide)

    def int8_top1(folded):
        parts = prepare(folded.export())
        int8 = quantize_graph(parts.core, ranges, scheme=SCHEME)
        made = int8_network(parts, int8, SCHEME)(frames[1024:].numpy())
        return (made.argmax(axis=1) == labels[1024:].numpy()).mean()

    on_grid, control = FoldedNetwork(parts, ranges), FoldedNetwork(parts)
    for folded in (on_grid, control):
        fit(folded, frames, labels, steps=64, rate=2e-4)
    assert int8_top1(on_grid) > int8_top1(control) + 0.1


def fit(network, frames, labels, *, steps, rate):
    """Train on the first 1024 patches."""
    optimizer = torch.optim.Adam(network.parameters(), rate)
    torch.manual_seed(1)
    for _ in range(steps):
        batch = torch.randint(1024, (64,))
        loss = torch.nn.functional.cross_entropy(network(frames[batch]), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
