import pytest

from metis.backend import (
    BackendError,
    BackendMissingError,
    CompiledModel,
    QuantizedModel,
    backend_tools,
    open_backend,
    require_backend,
)
from preprocessing.int8 import TensorSpec

SPEC = TensorSpec("x", (1, 2, 2, 4), ((0, 0), (0, 0), (0, 0), (0, 1)), 0.1, 3)


def test_an_unknown_backend_is_answered_with_those_there_are():
    with pytest.raises(ValueError, match="unknown backend 'gpu'; there are emulator, voyager"):
        open_backend("gpu")


def test_the_emulator_is_always_here_and_the_sdk_says_how_to_get_it():
    require_backend("emulator")
    with pytest.raises(BackendMissingError, match="pip install axelera-devkit axelera-rt"):
        require_backend("voyager")


def test_models_survive_their_folders(tmp_path):
    quantized = QuantizedModel(
        tmp_path, "m.onnx", "emulator", "1", "per_tensor_min_max", (SPEC,), (SPEC,)
    )
    quantized.save()
    assert QuantizedModel.load(tmp_path) == quantized
    compiled = CompiledModel(
        tmp_path, "m.onnx", "emulator", "1", "onnxruntime", 1, (SPEC,), (SPEC,)
    )
    compiled.save()
    assert CompiledModel.load(tmp_path) == compiled


def test_a_damaged_description_is_named(tmp_path):
    (tmp_path / "spec.json").write_text("{")
    with pytest.raises(BackendError, match=r"spec\.json is not readable"):
        CompiledModel.load(tmp_path)


def test_the_tools_of_a_backend_decide_what_makes_its_models_stale():
    assert backend_tools("emulator") == ("onnxruntime",)
    assert backend_tools("voyager") == {"axelera-devkit": None}
