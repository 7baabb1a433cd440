"""Placement of codes, bias correction, and what baking does for other quantizers."""

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from networks import plain_network, residual_network, student, weights
from onnx import helper, numpy_helper
from onnxruntime.quantization import (
    CalibrationDataReader,
    CalibrationMethod,
    QuantFormat,
    QuantType,
    quantize_static,
)

from metis.emulator.execute import run_graphs
from metis.emulator.kernels import EXACT
from metis.quantize.baking import bake_weights
from metis.quantize.folding import prepare
from metis.quantize.placement import open_observations, place
from metis.quantize.qdq import quantize_graph
from metis.quantize.ranges import choose

RANDOM = np.random.default_rng


def watched(model, count=64):
    parts = prepare(model)
    shape = [d.dim_value for d in model.graph.input[0].type.tensor_type.shape.dim][1:]
    # A mean far from zero, as after a Relu: that is what bias correction is about.
    frames = (RANDOM(7).normal(0.7, 1, (count, *shape))).astype(np.float32)
    seen = open_observations(parts)
    seen.add(frames, lambda n: None)
    return parts, seen, frames


def sqnr(exact, noisy):
    return 10 * np.log10(np.square(exact).sum() / np.square(exact - noisy).sum())


def coarse(model, levels=15):
    """The same network with weights on a coarse grid's worth of outliers: hard to round."""
    result = onnx.ModelProto()
    result.CopyFrom(model)
    random = RANDOM(11)
    for tensor in result.graph.initializer:
        array = numpy_helper.to_array(tensor)
        if array.ndim == 4:
            array = array.copy()
            flat = array.reshape(len(array), -1)
            flat[np.arange(len(array)), random.integers(0, flat.shape[1], len(array))] *= levels
            tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
    return result


def test_what_is_stored_as_codes():
    placement = place(prepare(residual_network(0)).core)
    assert {"c2", "c3", "c5"} == set(placement.fused)  # before a Relu or a Clip
    assert placement.root["small"] == "both"  # max pooling keeps the grid
    assert placement.root["flat"] == "mean"
    assert placement.depthwise == ("a2",)
    assert set(placement.tensors) >= {"input", "c1", "a1", "gate", "sum", "both", "logits"}


def test_activations_cost_no_operator():
    parts, seen, _ = watched(residual_network(0))
    graph = quantize_graph(parts.core, choose(seen, "mse"), scheme="per_tensor_histogram").graph
    kinds = {node.op_type for node in graph.node}
    assert not kinds & {"Relu", "Clip"}
    assert {"HardSwish", "HardSigmoid"} <= kinds


@pytest.mark.parametrize("network", [plain_network, residual_network])
def test_baked_weights_lie_on_the_grid_and_stay_there(network):
    parts, seen, frames = watched(network(3))
    ranges = choose(seen, "mse")
    once = bake_weights(parts, seen, ranges)
    onnx.checker.check_model(once, full_check=True)
    again = prepare(once)
    by_name = {i.name: numpy_helper.to_array(i) for i in again.core.graph.initializer}
    for node in again.core.graph.node:
        if node.op_type in ("Conv", "Gemm"):
            w = by_name[node.input[1]].reshape(by_name[node.input[1]].shape[0], -1)
            steps = np.abs(w).max(axis=1, keepdims=True) / 127
            assert np.allclose(w / steps, np.rint(w / steps), atol=1e-3)
    # A quantizer that rounds the weights anew changes nothing.
    seen_again = open_observations(again)
    seen_again.add(frames, lambda n: None)
    twice = bake_weights(again, seen_again, ranges, correct_bias=False)
    assert np.allclose(
        run_graphs([(prepare(twice).core, {})], frames),
        run_graphs([(again.core, {})], frames),
        atol=1e-4,
    )


@pytest.mark.parametrize("seed", range(4))
def test_bias_correction_restores_the_means(seed):
    """Source of the law: E[y] of the float layer equals E[y] with rounded weights and new bias."""
    model = coarse(plain_network(seed))
    parts, seen, frames = watched(model)
    ranges = choose(seen, "mse")
    exact = run_graphs([(parts.core, {})], frames)
    errors = {}
    for corrected in (True, False):
        made = prepare(bake_weights(parts, seen, ranges, correct_bias=corrected)).core
        errors[corrected] = np.abs((run_graphs([(made, {})], frames) - exact).mean(axis=0)).max()
    assert errors[True] < 0.7 * errors[False]


def test_bias_correction_helps_on_patches_it_has_not_seen():
    gains = []
    for seed in range(6):
        parts, seen, _ = watched(coarse(plain_network(seed)))
        ranges = choose(seen, "mse")
        frames = RANDOM(99).normal(0.7, 1, (64, 3, 10, 10)).astype(np.float32)
        exact = run_graphs([(parts.core, {})], frames)
        both = []
        for corrected in (True, False):
            made = prepare(bake_weights(parts, seen, ranges, correct_bias=corrected)).core
            graph = quantize_graph(made, ranges, scheme="per_tensor_histogram")
            both.append(sqnr(exact, run_graphs([(graph, EXACT)], frames)))
        gains.append(both[0] - both[1])
    assert np.mean(gains) > 1  # dB


def test_an_ungrouped_layer_without_bias_gets_one():
    random = RANDOM(0)
    model = student(
        [helper.make_node("Conv", ["input", "w"], ["logits"], pads=[1] * 4)],
        (4, 8, 8),
        {"w": weights(random, 6, 4, 3, 3)},
    )
    parts, seen, _ = watched(model)
    made = bake_weights(parts, seen, choose(seen, "mse"))
    (node,) = made.graph.node
    assert len(node.input) == 3


def test_clipping_weights_lowers_their_error():
    parts, seen, _ = watched(coarse(plain_network(1), levels=4))
    ranges = choose(seen, "mse")

    def lost(**options):
        made = prepare(bake_weights(parts, seen, ranges, correct_bias=False, **options)).core
        before = {i.name: numpy_helper.to_array(i) for i in parts.core.graph.initializer}
        after = {i.name: numpy_helper.to_array(i) for i in made.graph.initializer}
        return sum(
            float(np.square(before[a.input[1]] - after[b.input[1]]).sum())
            for a, b in zip(parts.core.graph.node, made.graph.node, strict=True)
            if a.op_type == "Conv"
        )

    assert lost(clip_weights=True) <= lost(clip_weights=False)


class Frames(CalibrationDataReader):
    def __init__(self, frames):
        self._left = iter(frames)

    def get_next(self):
        frame = next(self._left, None)
        return None if frame is None else {"input": frame[None]}


def test_somebody_elses_quantizer_gains_from_the_baked_student(tmp_path):
    """The point of baking: an unmodified min-max quantizer loses less."""
    parts, seen, frames = watched(coarse(plain_network(0)))
    ranges = choose(seen, "mse")
    exact = run_graphs([(parts.core, {})], frames)
    results = {}
    for name, model in (("plain", parts.student), ("baked", bake_weights(parts, seen, ranges))):
        onnx.save(model, tmp_path / f"{name}.onnx")
        quantize_static(
            str(tmp_path / f"{name}.onnx"),
            str(tmp_path / f"{name}.int8.onnx"),
            Frames(frames),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            calibrate_method=CalibrationMethod.MinMax,
        )
        options = ort.SessionOptions()
        options.add_session_config_entry("session.x64quantprecision", "1")
        session = ort.InferenceSession(str(tmp_path / f"{name}.int8.onnx"), options)
        made = np.concatenate([session.run(None, {"input": f[None]})[0] for f in frames])
        results[name] = sqnr(exact, made)
    assert results["baked"] > results["plain"] + 1


def test_one_layer_alone_is_int8():
    parts, seen, frames = watched(residual_network(1))
    ranges = choose(seen, "mse")
    exact = run_graphs([(parts.core, {})], frames)
    whole = quantize_graph(parts.core, ranges, scheme="per_tensor_histogram")
    all_layers = sqnr(exact, run_graphs([(whole, EXACT)], frames))
    for layer in ("c1", "c3", "logits"):
        graph = quantize_graph(
            parts.core, ranges, scheme="per_tensor_histogram", int8_nodes={layer}
        )
        kinds = [node.op_type for node in graph.graph.node]
        assert kinds.count("QuantizeLinear") == 2
        alone = sqnr(exact, run_graphs([(graph, EXACT)], frames))
        assert all_layers < alone < 90


def test_the_hybrid_scheme_gives_depthwise_inputs_a_grid_per_channel():
    parts, seen, frames = watched(residual_network(1))
    graph = quantize_graph(parts.core, choose(seen, "mse"), scheme="hybrid_per_tensor_per_channel")
    constants = {i.name: numpy_helper.to_array(i) for i in graph.graph.initializer}
    assert constants["a2/scale"].shape == (24,)
    assert constants["a1/scale"].shape == ()
    exact = run_graphs([(parts.core, {})], frames)
    simulated = run_graphs([(graph, {"session.disable_quant_qdq": "1"})], frames)
    assert sqnr(exact, simulated) > 20
