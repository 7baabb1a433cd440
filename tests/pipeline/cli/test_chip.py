"""`kdpipe estimate` as a user runs it."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest

from metis.estimate.cost_model import Settings
from metis.estimate.estimator import estimate


def kdpipe(*words):
    return subprocess.run(
        [Path(sys.executable).parent / "kdpipe", *map(str, words)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.fixture
def graph(tmp_path):
    """A network of one convolution whose weights, 14.7 MB, fill more than a quarter of L2."""
    channels = 1280
    values = [
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1, channels, 4, 4])
        for name in ("x", "y")
    ]
    weight = onnx.numpy_helper.from_array(np.zeros((channels, channels, 3, 3), np.float32), "w")
    node = onnx.helper.make_node("Conv", ["x", "w"], ["y"], "conv", pads=[1] * 4)
    model = onnx.helper.make_model(
        onnx.helper.make_graph([node], "g", values[:1], values[1:], [weight]),
        opset_imports=[onnx.helper.make_opsetid("", 17)],
        ir_version=8,
    )
    path = tmp_path / "model.onnx"
    onnx.save(model, path)
    return path


def figures(path, *words):
    result = kdpipe("estimate", path, "--json", *words)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def test_a_file_in_words_and_as_json(graph):
    text = kdpipe("estimate", graph)
    assert text.returncode == 0, text.stderr
    assert text.stdout.startswith("estimate, not measured")
    document = figures(graph)
    assert document["published"] is None
    found = document["estimate"]["boards"]["m2"]["throughput"]
    assert found["measured_on"] == "estimate"
    assert found["low"] < found["value"] < found["high"]
    assert (
        f"{found['value']:.0f} frames/s ({found['low']:.0f} to {found['high']:.0f})" in text.stdout
    )


def test_every_layer_is_named_on_request(graph):
    model = onnx.load(graph)
    node = model.graph.node[0]
    for number in range(7):
        following = model.graph.node.add()
        following.CopyFrom(node)
        following.input[0], following.output[0] = f"x{number}", f"x{number + 1}"
        following.name = f"conv{number}"
    node.output[0], model.graph.node[-1].output[0] = "x0", "y"
    onnx.save(model, graph)
    every = figures(graph, "--layers=0")["estimate"]["boards"]["pcie"]
    assert len(every["slowest"]) == 8
    assert sum(layer["value"] for layer in every["slowest"]) == pytest.approx(
        1000 / every["throughput"]["value"]
    )
    few = kdpipe("estimate", graph, "--layers=2").stdout
    assert few.count("(Conv): ") == 2


def test_more_cores_hold_more_weights(graph):
    found = figures(graph, "--aipu-cores", 4, "--no-replication")["estimate"]
    assert found["settings"] == {"aipu_cores": 4, "replication": False}
    values = [found["by_aipu_cores"][cores]["m2"]["value"] for cores in ("1", "2")]
    assert values[0] < values[1] < found["boards"]["m2"]["throughput"]["value"]


def test_a_network_by_name_stands_beside_the_vendors_figure():
    document = figures("resnet10t")
    assert document["published"]["boards"]["pcie"] == {
        "value": 5212,
        "unit": "frames/s",
        "measured_on": "published",
        "scope": "host, 720p video through GStreamer",
    }
    found = document["estimate"]["boards"]["pcie"]["throughput"]
    assert found["low"] < 5212 < found["high"]


def test_wrong_words():
    result = kdpipe("estimate", "no-such-network")
    assert (result.returncode, result.stdout) == (2, "")
    assert "no-such-network" in result.stderr
    assert kdpipe("estimate", "resnet10t", "--aipu-cores", 5).returncode == 2


def test_compile_records_the_estimate_of_its_student(finished):
    found = finished.manifest["stages"]["compile"]["facts"]["estimate"]
    student = onnx.load(finished.artifact("student"))
    assert found == estimate(student, Settings(found["settings"]["aipu_cores"])).facts()
    assert found["boards"]["pcie"]["throughput"]["measured_on"] == "estimate"
