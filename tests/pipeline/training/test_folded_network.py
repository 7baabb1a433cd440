"""The torch network of a folded graph against onnxruntime: in float, and on the emulator's grid."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from metis.emulator.execute import int8_logits
from metis.graph.sessions import open_graph
from metis.quantize import grids, placement
from metis.quantize.folding import prepare
from metis.quantize.placement import watch
from metis.quantize.qdq import quantized_graph
from metis.quantize.ranges import choose
from pipeline.networks.export import export_network
from pipeline.run.errors import InputError
from pipeline.training.folded_network import FoldedNetwork, check_trainable, weight_scales

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
    seen = watch(parts)
    seen.add(frames, lambda count: None)
    return choose(seen, "mse")


def logits(network, frames):
    with torch.no_grad():
        return network(torch.from_numpy(frames)).numpy()


def float_logits(model, frames):
    session = open_graph(model)
    name = session.get_inputs()[0].name
    made = [session.run(None, {name: frame[None]})[0].reshape(1, -1) for frame in frames]
    return np.concatenate(made)


def steps_apart(parts, frames):
    """Of fake quantization and emulator, in steps of the output's grid, (N, classes)."""
    ranges = chosen(parts, frames)
    emulated = int8_logits(
        parts, quantized_graph(parts.core, ranges, scheme=SCHEME), SCHEME, frames
    )
    root = placement.place(parts.core).root[parts.core.graph.output[0].name]
    grid = grids.tensor_grid(ranges.of(root))
    return np.abs(logits(FoldedNetwork(parts, ranges), frames) - emulated) / grid.scale[0]


@pytest.mark.parametrize(
    "name", ["test_byobnet", "test_resnet", "test_efficientnet", "mobilenetv3_small_050"]
)
def test_float_is_the_graph_and_the_grid_is_the_emulators(tmp_path, name):
    network, parts = exported(tmp_path, name)
    frames = patches(48, 32)
    folded = logits(FoldedNetwork(parts), frames)
    assert np.abs(folded - float_logits(parts.student, frames)).max() < 1e-5
    assert np.abs(folded - logits(network, frames)).max() < 1e-5
    apart = steps_apart(parts, frames)
    # Sums of floats in another order put a value on the other side of a tie now and then, which
    # later layers spread.
    assert (apart < 0.5).mean() > 0.95
    assert (apart < 1.01).mean() > 0.99


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
    width = open_graph(rough).run(None, {"input": frames[:1]})[0].shape[1]
    parts = prepare(graph(nodes, kept, (64, 6, 6), [width]))
    assert logits(FoldedNetwork(parts), frames) == pytest.approx(
        float_logits(parts.student, frames), abs=1e-5
    )
    apart = steps_apart(parts, frames)
    assert apart.max() < 1.01
    assert (apart > 0.5).mean() < 1e-3


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
    ranges = chosen(parts, frames)
    emulated = int8_logits(
        parts, quantized_graph(parts.core, ranges, scheme=SCHEME), SCHEME, frames
    )
    assert logits(FoldedNetwork(parts, ranges), frames) == pytest.approx(emulated, abs=1e-4)


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
    assert found.numpy() == pytest.approx(expected, rel=2e-7)


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
    model = network.exported()
    onnx.checker.check_model(model, full_check=True)
    assert [n.op_type for n in model.graph.node] == [n.op_type for n in parts.student.graph.node]
    plain = FoldedNetwork(parts)
    plain.load_state_dict(network.state_dict())
    found = float_logits(model, frames)
    assert found == pytest.approx(logits(plain, frames), abs=1e-5)
    assert np.abs(found - float_logits(parts.student, frames)).max() > 0.01


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
        parts = prepare(folded.exported())
        int8 = quantized_graph(parts.core, ranges, scheme=SCHEME)
        made = int8_logits(parts, int8, SCHEME, frames[1024:].numpy())
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
