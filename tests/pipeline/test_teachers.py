import json

import numpy as np
import onnxruntime as ort
import pytest
from tiny_project import MEANS, make_contract, make_patches, make_teacher

from pipeline.sources import TeacherParams
from pipeline.teachers import (
    ensemble_logits,
    gives_probabilities,
    open_teacher,
    to_logits,
)
from preprocessing.contract import parse_contract


@pytest.fixture
def patches():
    return make_patches(70, seed=4)[0]


@pytest.fixture
def contract(patches):
    return parse_contract(json.dumps(make_contract(patches)).encode())


def opened(tmp_path, patches, contract, bands=(0, 1, 2), **options):
    path = tmp_path / "teacher.onnx"
    make_teacher(path, bands, make_contract(patches), **options)
    return open_teacher(path, TeacherParams(path="teacher.onnx", bands=bands), contract, 4)


@pytest.mark.parametrize("batch", ["N", 1, 7])
def test_any_batch_size_gives_the_same_logits_with_a_remainder(tmp_path, patches, contract, batch):
    reference = opened(tmp_path, patches, contract).raw(patches[..., [0, 1, 2]])
    teacher = opened(tmp_path, patches, contract, batch=batch)
    assert teacher.batch == (None if batch == "N" else batch)
    for count in (1, 7, 70):
        assert teacher.raw(patches[:count, ..., [0, 1, 2]]) == pytest.approx(
            reference[:count], abs=1e-5
        )


def test_a_teacher_equals_its_graph_fed_by_hand(tmp_path, patches, contract):
    teacher = opened(tmp_path, patches, contract, bands=(2, 0))
    made = make_contract(patches)
    mu, sigma = (np.array(made["zscore"][k])[[2, 0]] for k in ("mu", "sigma"))
    tensor = ((patches[..., [2, 0]] * 255 / 2.8 - mu) / sigma).transpose(0, 3, 1, 2)
    tensor = tensor.repeat(4, axis=2).repeat(4, axis=3).astype(np.float32)  # nearest, 4 to 16
    session = ort.InferenceSession(str(tmp_path / "teacher.onnx"))
    by_hand = session.run(None, {"input": tensor})[0]
    assert teacher.raw(patches[..., [2, 0]]) == pytest.approx(by_hand, abs=1e-4)


def test_free_sizes_take_the_contracts_size(tmp_path, patches, contract):
    assert opened(tmp_path, patches, contract, size="S").size_hw == (16, 16)
    assert opened(tmp_path, patches, contract, size=8).size_hw == (8, 8)


def test_half_precision_teachers_run(tmp_path, patches, contract):
    from onnx import TensorProto

    exact = opened(tmp_path, patches, contract).raw(patches[..., [0, 1, 2]])
    half = opened(tmp_path, patches, contract, dtype=TensorProto.FLOAT16)
    assert half.dtype is np.float16
    out = half.raw(patches[..., [0, 1, 2]])
    assert out.dtype == np.float32
    assert out == pytest.approx(exact, abs=0.1)


def test_the_logarithm_of_probabilities_serves_like_the_logits(tmp_path, patches, contract):
    logits = opened(tmp_path, patches, contract).raw(patches[..., [0, 1, 2]])
    outputs = opened(tmp_path, patches, contract, softmax=True).raw(patches[..., [0, 1, 2]])
    assert not gives_probabilities(logits)
    assert gives_probabilities(outputs)
    recovered = to_logits(outputs, True)

    def softened(z, temperature):
        e = np.exp((z - z.max(axis=1, keepdims=True)) / temperature)
        return e / e.sum(axis=1, keepdims=True)

    for temperature in (1, 2, 8):
        assert softened(recovered, temperature) == pytest.approx(
            softened(logits, temperature), abs=1e-5
        )
    assert np.isfinite(to_logits(np.array([[1.0, 0.0]], np.float32), True)).all()


def test_weights_are_shares():
    a, b = np.zeros((2, 3), np.float32), np.ones((2, 3), np.float32)
    assert ensemble_logits([a, b], [1, 1]).tolist() == [[0.5] * 3] * 2
    assert ensemble_logits([a, b], [1, 3]).tolist() == [[0.75] * 3] * 2
    assert ensemble_logits([a, b], [10, 30]).dtype == np.float32


def test_the_test_teacher_is_a_good_one(tmp_path):
    patches, labels = make_patches(300, seed=9)
    contract = parse_contract(json.dumps(make_contract(patches)).encode())
    logits = opened(tmp_path, patches, contract).raw(patches[..., [0, 1, 2]])
    assert (logits.argmax(axis=1) == labels).mean() > 0.95
    assert len(MEANS) == logits.shape[1]
