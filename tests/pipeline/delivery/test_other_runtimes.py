"""kdpipe export: the student for other runtimes, each file compared with the ONNX student."""

import importlib.util
import json

import numpy as np
import onnxruntime as ort
import pytest
import torch

from pipeline.data.dataset import DatasetSplit
from preprocessing.apply import student_tensor
from preprocessing.student_input import StudentInput


def tensors_of(project, count=16):
    given = StudentInput.load(project.artifact("student_input"))
    images = DatasetSplit.load(project.artifact("dataset") / "val").images
    return student_tensor(images[:count], given)


def onnx_logits(path, tensors):
    session = ort.InferenceSession(str(path))
    name = session.get_inputs()[0].name
    return np.concatenate([session.run(None, {name: tensor[None]})[0] for tensor in tensors])


@pytest.mark.filterwarnings("ignore:.*torch.jit.load:FutureWarning")
@pytest.mark.filterwarnings("ignore:.*torch.jit.load:DeprecationWarning")
def test_the_files_answer_like_the_student_and_the_document_says_so(finished):
    result = finished.kdpipe("export", "elsewhere", "--json")
    assert result.returncode == 0, result.stderr
    folder = finished.root / "elsewhere"
    document = json.loads((folder / "export.json").read_text())
    files = {entry["format"]: entry for entry in document["files"]}
    assert json.loads(result.stdout)["files"] == document["files"]
    assert list(files) == ["onnx", "torchscript", "dynamic-int8"]
    tensors = tensors_of(finished)
    assert document["input"]["shape"] == [1, *tensors.shape[1:]]
    exact = onnx_logits(finished.artifact("student"), tensors)
    with torch.no_grad():
        traced = torch.jit.load(str(folder / "student.torchscript.pt"))(torch.from_numpy(tensors))
    assert np.abs(traced.numpy() - exact).max() <= 1e-4
    rounded = onnx_logits(folder / "student.dynamic-int8.onnx", tensors)
    assert 0 < np.abs(rounded - exact).max() <= files["dynamic-int8"]["max_abs_logit_difference"]
    for entry in files.values():
        assert entry["measured_on"] == "host"
        assert entry["bytes"] == (folder / entry["file"]).stat().st_size
    for artifact in ("contract", "student_input", "labels"):
        source = finished.artifact(artifact)
        assert (folder / source.name).read_bytes() == source.read_bytes()
    assert (folder / "student.onnx").read_bytes() == finished.artifact("student").read_bytes()


def test_a_table_shows_sizes_and_differences(finished):
    result = finished.kdpipe("export", "elsewhere", "--format", "dynamic-int8", "--format", "onnx")
    assert result.returncode == 0, result.stderr
    rows = {line.split()[0]: line.split() for line in result.stdout.splitlines()}
    size = (finished.root / "elsewhere" / "student.onnx").stat().st_size
    assert rows["onnx"][1:4] == [f"{size:,}", "0", "100.00%"]
    assert list(rows) == ["format", "dynamic-int8", "onnx", "wrote"]


def test_a_file_that_differs_is_not_written(finished):
    result = finished.kdpipe(
        "export", "elsewhere", "--format", "torchscript",
        "--set", "benchmark.max_export_difference=1e-12",
    )  # fmt: skip
    assert result.returncode == 1
    assert "torchscript: logits differ from the ONNX student by up to" in result.stderr
    assert not [p for p in finished.root.iterdir() if "elsewhere" in p.name]


def test_weights_that_were_changed_are_refused(finished):
    weights = finished.artifact("training") / "student.safetensors"
    raw = bytearray(weights.read_bytes())
    raw[-1] ^= 1
    weights.write_bytes(raw)
    result = finished.kdpipe("export", "elsewhere")
    assert result.returncode == 3
    assert "artifact training" in result.stderr
    assert "kdpipe run --stage distill" in result.stderr


def test_what_is_there_is_left_alone(finished):
    (finished.root / "elsewhere").mkdir()
    result = finished.kdpipe("export", "elsewhere")
    assert result.returncode == 3
    assert "elsewhere exists" in result.stderr


@pytest.mark.skipif(importlib.util.find_spec("litert_torch"), reason="the extra tflite is here")
def test_without_the_extra_tflite_its_name_is_the_cure(finished):
    result = finished.kdpipe("export", "elsewhere", "--format", "tflite")
    assert result.returncode == 5
    assert "pip install 'kdpipe[tflite]'" in result.stderr
    assert not (finished.root / "elsewhere").exists()


@pytest.mark.skipif(not importlib.util.find_spec("litert_torch"), reason="needs the extra tflite")
def test_tflite_answers_like_the_student(finished):
    from ai_edge_litert.interpreter import Interpreter

    result = finished.kdpipe("export", "elsewhere", "--format", "tflite")
    assert result.returncode == 0, result.stderr
    interpreter = Interpreter(model_path=str(finished.root / "elsewhere" / "student.tflite"))
    interpreter.allocate_tensors()
    tensors = tensors_of(finished, 4)
    exact = onnx_logits(finished.artifact("student"), tensors)
    for tensor, expected in zip(tensors, exact, strict=True):
        interpreter.set_tensor(interpreter.get_input_details()[0]["index"], tensor[None])
        interpreter.invoke()
        found = interpreter.get_tensor(interpreter.get_output_details()[0]["index"])
        assert np.abs(found - expected).max() <= 1e-4
