"""What every backend must do; the same cases run on each that is here."""

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper
from stand_in_sdk import install_stand_in

from metis.backend import SCHEMES, BackendError, CompiledModel, QuantizedModel
from metis.emulator.backend import Emulator
from metis.voyager.backend import Voyager
from preprocessing.int8 import from_device, to_device

SCHEME = next(iter(SCHEMES))
BACKENDS = ("emulator", "stand-in", pytest.param("sdk", marks=pytest.mark.sdk))


@pytest.fixture(params=BACKENDS)
def backend(request, tmp_path, monkeypatch):
    if request.param == "emulator":
        return Emulator()
    if request.param == "stand-in":
        monkeypatch.setenv("KDPIPE_SDK_PYTHON", str(install_stand_in(tmp_path / "venv")))
    elif not Voyager().probe().available:
        pytest.skip(Voyager().probe().missing)
    return Voyager()


def run_compiled(compiled, codes):
    """The device's answer, where something here can stand for the device."""
    graph = compiled.path / compiled.entry
    if compiled.runtime == "axelera":
        graph = graph.with_name("core.onnx")
        if not graph.exists():
            pytest.skip("this model runs on a card only; kdbench.py compares there")
    options = ort.SessionOptions()
    for key, value in {"session.x64quantprecision": "1", **compiled.session}.items():
        options.add_session_config_entry(key, value)
    session = ort.InferenceSession(str(graph), options)
    return session.run(None, {session.get_inputs()[0].name: codes})[0]


def write_student(path, *, reshape=False, baked_batch=False):
    """Two convolutions and a classifier, opset 17, NCHW, batch 1, random weights."""
    random = np.random.default_rng(5)

    def tensor(name, *shape):
        values = random.normal(0, 1 / np.sqrt(np.prod(shape[1:])), shape)
        return numpy_helper.from_array(values.astype(np.float32), name)

    flat = (
        helper.make_node("Reshape", ["pooled", "flat_shape"], ["flat"])
        if reshape
        else helper.make_node("Flatten", ["pooled"], ["flat"])
    )
    weights = [
        tensor("w1", 8, 3, 3, 3),
        tensor("b1", 8),
        tensor("w2", 16, 8, 3, 3),
        tensor("b2", 16),
        tensor("w3", 5, 16),
        tensor("b3", 5),
    ]
    nodes = [
        helper.make_node("Conv", ["input", "w1", "b1"], ["c1"], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["c1"], ["r1"]),
        helper.make_node("Conv", ["r1", "w2", "b2"], ["c2"], strides=[2, 2], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["c2"], ["r2"]),
        helper.make_node("GlobalAveragePool", ["r2"], ["pooled"]),
        flat,
        helper.make_node("Gemm", ["flat", "w3", "b3"], ["logits"], transB=1),
    ]
    if reshape:
        weights.append(numpy_helper.from_array(np.array([1, 16], np.int64), "flat_shape"))
    if baked_batch:
        weights.append(numpy_helper.from_array(np.ones((1, 5), np.float32), "one"))
        nodes[-1].output[0] = "first"
        nodes.append(helper.make_node("ReduceSum", ["first", "axes"], ["sum"], keepdims=1))
        nodes.append(helper.make_node("Mul", ["sum", "one"], ["logits"]))
        weights.append(numpy_helper.from_array(np.array([0], np.int64), "axes"))
    graph = helper.make_graph(
        nodes,
        "student",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, [1, 3, 12, 12])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [1, 5])],
        weights,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, path)
    return path


@pytest.fixture
def samples(tmp_path):
    path = tmp_path / "samples.npy"
    np.save(path, np.random.default_rng(1).normal(size=(20, 1, 3, 12, 12)).astype(np.float32))
    return path


def float_logits(student, tensors):
    session = ort.InferenceSession(str(student))
    return np.concatenate([session.run(None, {"input": t[None]})[0] for t in tensors])


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("reshape", [False, True])
def test_int8_logits_are_close_to_the_float_students(backend, tmp_path, samples, scheme, reshape):
    student = write_student(tmp_path / "student.onnx", reshape=reshape)
    seen = []
    model = backend.quantize(
        student, samples, tmp_path / "int8", scheme=scheme, progress=seen.append
    )
    assert sum(seen) == 20
    assert QuantizedModel.load(tmp_path / "int8") == model
    tensors = np.random.default_rng(2).normal(size=(50, 3, 12, 12)).astype(np.float32)
    exact, int8 = float_logits(student, tensors), backend.infer(model, tensors)
    noise = np.square(exact - int8).sum() / np.square(exact).sum()
    assert 1e-6 < noise < 0.01  # quantized, and by more than 20 dB the same


def test_logits_do_not_depend_on_the_batch(backend, tmp_path, samples):
    student = write_student(tmp_path / "student.onnx")
    model = backend.quantize(student, samples, tmp_path / "int8", scheme=SCHEME)
    tensors = np.random.default_rng(2).normal(size=(70, 3, 12, 12)).astype(np.float32)
    parts = [backend.infer(model, part) for part in np.split(tensors, [1, 3, 4, 68])]
    assert np.array_equal(backend.infer(model, tensors), np.concatenate(parts))


@pytest.mark.parametrize("cores", [1, 4])
def test_the_compiled_model_gives_the_quantized_models_logits(backend, tmp_path, samples, cores):
    student = write_student(tmp_path / "student.onnx")
    model = backend.quantize(student, samples, tmp_path / "int8", scheme=SCHEME)
    compiled = backend.compile(model, tmp_path / "compiled", aipu_cores=cores)
    assert CompiledModel.load(tmp_path / "compiled") == compiled
    source, sink = compiled.inputs[0], compiled.outputs[0]
    assert compiled.aipu_cores == source.shape[0] == cores
    assert source.unpadded == (cores, 12, 12, 3)
    assert sink.unpadded == (cores, 1, 1, 5)
    tensors = np.random.default_rng(3).normal(size=(cores, 3, 12, 12)).astype(np.float32)
    codes = run_compiled(compiled, to_device(tensors, source))
    assert codes.dtype == np.int8
    assert (codes[..., 5:] == sink.zero_point).all()
    logits = from_device(codes, sink).reshape(cores, 5)
    assert np.array_equal(logits, backend.infer(model, tensors))


def test_the_same_samples_give_the_same_bytes(backend, tmp_path, samples):
    student = write_student(tmp_path / "student.onnx")
    for name in ("a", "b"):
        model = backend.quantize(student, samples, tmp_path / name, scheme=SCHEME)
        backend.compile(model, tmp_path / f"compiled_{name}", aipu_cores=1)
    for folder, other in (("a", "b"), ("compiled_a", "compiled_b")):
        files = [p for p in (tmp_path / folder).rglob("*") if p.is_file()]
        assert files
        for file in files:
            same = tmp_path / other / file.relative_to(tmp_path / folder)
            assert file.read_bytes() == same.read_bytes(), file


def test_a_scheme_it_lacks_is_refused(backend, tmp_path, samples):
    student = write_student(tmp_path / "student.onnx")
    with pytest.raises(BackendError, match=r"no scheme 'log2'; use per_tensor"):
        backend.quantize(student, samples, tmp_path / "int8", scheme="log2")


def test_a_graph_that_the_chip_cannot_run_is_refused(backend, tmp_path, samples):
    student = write_student(tmp_path / "student.onnx", baked_batch=True)
    with pytest.raises(BackendError, match="ReduceSum"):
        backend.quantize(student, samples, tmp_path / "int8", scheme=SCHEME)


def test_an_emulation_that_is_not_quantized_at_its_ends_is_refused(tmp_path, samples):
    backend = Emulator()
    student = write_student(tmp_path / "student.onnx")
    model = backend.quantize(student, samples, tmp_path / "int8", scheme=SCHEME)
    onnx.save(onnx.load(student), model.path / model.entry)
    with pytest.raises(BackendError, match="ends are Conv, Gemm"):
        backend.compile(model, tmp_path / "compiled", aipu_cores=1)
