"""`kdpipe check` as a user runs it."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import numpy_helper

from metis.operators.report import check_model
from pipeline.networks import chip_check
from pipeline.run.errors import ExtraMissingError


def kdpipe(*words):
    return subprocess.run(
        [Path(sys.executable).parent / "kdpipe", *map(str, words)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def constants(**shapes):
    random = np.random.default_rng(0)
    return [
        numpy_helper.from_array(random.normal(size=shape).astype(np.float32) / 8, name)
        for name, shape in shapes.items()
    ]


WEIGHTS = constants(w=(8, 8, 3, 3), v=(8, 1, 3, 3), d=(8, 3), g=(16,), n=(8,), m=(3,))


def write(path, body, x="1,8,16,16", y="1,8,16,16", opset=17):
    head = f'<ir_version: 8, opset_import: ["" : {opset}]> g'
    model = onnx.parser.parse_model(f"{head} (float[{x}] x) => (float[{y}] y) {{ {body} }}")
    read = {name for node in model.graph.node for name in node.input}
    model.graph.initializer.extend(tensor for tensor in WEIGHTS if tensor.name in read)
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, path)
    return path


def run(path, x):
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: x})[0]


CONV = "Conv <pads = [1, 1, 1, 1]>"

#: Planted fault, graph, and the rewrite that cures it; or the words of the refusal.
FAULTS = [
    ({"body": 'a = Conv <auto_pad = "SAME_UPPER"> (x, w)  y = Relu(a)'}, "explicit pads"),
    ({"body": f"y = {CONV} (x, w)", "x": "N,8,16,16", "y": "N,8,16,16"}, "batch to 1"),
    ({"body": f"a = {CONV} (x, w)  y = Relu(a)", "opset": 18}, "opset"),
]


@pytest.mark.parametrize(("graph", "rewrite"), FAULTS, ids=[name for _, name in FAULTS])
def test_planted_faults_are_rewritten_checked_again_and_recorded(tmp_path, graph, rewrite):
    path, out = write(tmp_path / "faulty.onnx", **graph), tmp_path / "legal.onnx"
    assert check_model(onnx.load(path)).refusals
    result = kdpipe("check", path, "--json", "--write", out)
    assert (result.returncode, result.stderr) == (0, f"wrote {out}\n")
    found = json.loads(result.stdout)
    assert [r["name"] for r in found["rewrites"]] == [rewrite]
    assert found["runs"] is True
    assert found["max_abs_difference"] <= 1e-5
    assert check_model(onnx.load(out)).refusals == []
    x = np.random.default_rng(1).normal(size=(1, 8, 16, 16)).astype(np.float32)
    np.testing.assert_allclose(run(out, x), run(path, x), atol=1e-5)


def test_a_normalization_by_layer_between_convolutions_is_refused(tmp_path):
    """With node name, rule and cure; what could be rewritten was."""
    path = write(
        tmp_path / "norm.onnx",
        'a = Conv <auto_pad = "SAME_LOWER"> (x, w)  b = LayerNormalization(a, g)  '
        f"y = {CONV} (b, w)",
        opset=18,
    )
    model = onnx.load(path)
    model.graph.node[1].name = "/norm/LayerNormalization"
    onnx.save(model, path)
    result = kdpipe("check", path)
    assert result.returncode == 4
    assert result.stderr == (
        f"Error: Metis can't run {path}: it refuses LayerNormalization "
        "/norm/LayerNormalization: not in the list of operators (use BatchNorm and train again)\n"
    )
    (row,) = (line for line in result.stdout.splitlines() if line.startswith("refused"))
    assert "/norm/LayerNormalization: not in the list of operators; rule: not listed" in row
    assert "cure: use BatchNorm and train again" in row
    done = [line.split()[1] for line in result.stdout.splitlines() if line.startswith("rewrite")]
    assert done == ["opset", "explicit"]
    assert "2 nodes on the chip, 0 on the host, 1 refused" in result.stdout.splitlines()[-1]


CLEAN = [
    f"a = {CONV} (x, w)  y = Relu(a)",
    "a = Conv <group = 8, pads = [1, 1, 1, 1]> (x, v)  b = HardSwish(a)  y = Add(x, b)",
    f"a = {CONV} (x, w)  b = Sigmoid(a)  y = Mul(a, b)",
    "a = GlobalAveragePool(x)  b = Sigmoid(a)  c = Mul(x, b)  y = Tanh(c)",
    "a = MaxPool <kernel_shape = [3, 3], pads = [1, 1, 1, 1]> (x)  y = LeakyRelu(a)",
]


@pytest.mark.parametrize("body", CLEAN)
def test_clean_graphs_are_neither_refused_nor_changed(tmp_path, body):
    path = write(tmp_path / "clean.onnx", body)
    legalized = chip_check.check(str(path), size=None, channels=3)
    assert legalized.report.refusals == []
    assert legalized.rewrites == ()
    assert legalized.model.SerializeToString() == onnx.load(path).SerializeToString()


def test_a_network_of_timm_by_name():
    result = kdpipe("check", "mobilenetv3_small_050", "--size", "32", "--channels", "4", "--json")
    assert result.returncode == 0
    found = json.loads(result.stdout)
    assert {r["name"] for r in found["rewrites"]} == {"global pool"}
    assert found["share_on_chip"] == 1.0
    assert found["nodes"][0]["op_type"] == "Conv"
    # 16 filters of 3 x 3 x 4, once for each of 16 x 16 places.
    assert found["nodes"][0]["macs"] == 16 * 16 * 16 * 9 * 4


#: What has to be done before a network can be checked.
WRITE_IT = """
import io, timm, torch
network = timm.create_model("mobilenetv4_conv_medium").eval()
x = torch.zeros(1, 3, 224, 224)
torch.onnx.export(network, (x,), io.BytesIO(), opset_version=17, dynamo=False)
"""


@pytest.mark.slow
def test_mobilenetv4_medium_is_checked_in_the_time_that_torch_takes_to_write_it():
    """Of processor time, and on this processor: a number of seconds would be another one's."""

    def used_by(command):
        before = os.times()
        subprocess.run(command, capture_output=True, check=True)
        after = os.times()
        used = after.children_user + after.children_system
        return used - before.children_user - before.children_system

    written = used_by([sys.executable, "-c", WRITE_IT])
    both = used_by([Path(sys.executable).parent / "kdpipe", "check", "mobilenetv4_conv_medium"])
    assert both < 2 * written


def test_wrong_words_and_unreadable_files(tmp_path):
    result = kdpipe("check", "mobilenetv4_conv_medum")
    assert result.returncode == 2
    assert "'mobilenetv4_conv_medium'" in result.stderr
    bad = tmp_path / "bad.onnx"
    bad.write_bytes(b"not a graph")
    for path, words in ((bad, "is no readable ONNX graph"), (tmp_path / "no.onnx", "no file")):
        result = kdpipe("check", path)
        assert result.returncode == 3
        assert words in result.stderr
    good = write(tmp_path / "good.onnx", CLEAN[0])
    result = kdpipe("check", good, "--write", good)
    assert result.returncode == 3
    assert "exists; choose another name" in result.stderr


@pytest.mark.slow
def test_a_network_that_torch_can_not_write_leaves_standard_output_alone():
    """Torch prints the graph that it failed on, 40 KB, from C++."""
    result = kdpipe("check", "vgg11", "--size", "64", "--json")
    assert result.returncode == 1
    assert result.stdout == ""
    assert result.stderr.startswith("Error: torch can't write the network as ONNX: Unsupported")
    assert result.stderr.count("\n") == 1


def test_a_network_that_does_not_take_the_input_is_refused():
    result = kdpipe("check", "inception_v3", "--size", "32")
    assert result.returncode == 2
    assert "inception_v3 does not take 3 channels at 32x32" in result.stderr


def test_a_name_needs_the_extra_and_a_file_does_not(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ExtraMissingError, match="'train' brings what is missing"):
        chip_check.check("resnet18", size=None, channels=3)
    path = write(tmp_path / "clean.onnx", CLEAN[0])
    assert chip_check.check(str(path), size=None, channels=3).rewrites == ()
