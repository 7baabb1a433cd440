import json

import numpy as np
import onnxruntime as ort
import pytest
from tiny_project import MEANS, TEACHER_ROUNDING, make_contract, make_patches, make_teacher

from pipeline.params.sources import TeacherParams
from pipeline.run.errors import InputError
from pipeline.teachers.open import choose_threads, open_teacher, open_teachers
from preprocessing.contract import parse_contract


@pytest.fixture
def patches():
    return make_patches(70, seed=4)[0]


@pytest.fixture
def contract(patches):
    return parse_contract(json.dumps(make_contract(patches)).encode())


def opened(tmp_path, patches, contract, bands=(0, 1, 2), given=None, **options):
    path = tmp_path / "teacher.onnx"
    make_teacher(path, bands, make_contract(patches), **options)
    params = TeacherParams(path="teacher.onnx", bands=bands, **(given or {}))
    return open_teacher(path, params, contract, contract.bind(params.modality, params.bands, 4))


@pytest.mark.parametrize("batch", ["N", 1, 7])
def test_any_batch_size_gives_the_same_logits_with_a_remainder(tmp_path, patches, contract, batch):
    reference = opened(tmp_path, patches, contract).outputs(patches[..., [0, 1, 2]])[0]
    teacher = opened(tmp_path, patches, contract, batch=batch)
    assert teacher.batch == (None if batch == "N" else batch)
    for count in (1, 7, 70):
        assert teacher.outputs(patches[:count, ..., [0, 1, 2]])[0] == pytest.approx(
            reference[:count], abs=TEACHER_ROUNDING
        )


def test_a_teacher_equals_its_graph_fed_by_hand(tmp_path, patches, contract):
    teacher = opened(tmp_path, patches, contract, bands=(2, 0))
    made = make_contract(patches)
    mu, sigma = (np.array(made["zscore"][k])[[2, 0]] for k in ("mu", "sigma"))
    tensor = ((patches[..., [2, 0]] * 255 / 2.8 - mu) / sigma).transpose(0, 3, 1, 2)
    tensor = tensor.repeat(4, axis=2).repeat(4, axis=3).astype(np.float32)  # nearest, 4 to 16
    session = ort.InferenceSession(str(tmp_path / "teacher.onnx"))
    by_hand = session.run(None, {"input": tensor})[0]
    assert teacher.outputs(patches[..., [2, 0]])[0] == pytest.approx(by_hand, abs=TEACHER_ROUNDING)


def test_free_sizes_take_the_contracts_size(tmp_path, patches, contract):
    assert opened(tmp_path, patches, contract, size="S").size_hw == (16, 16)
    assert opened(tmp_path, patches, contract, size=8).size_hw == (8, 8)


def test_half_precision_teachers_run(tmp_path, patches, contract):
    from onnx import TensorProto

    exact = opened(tmp_path, patches, contract).outputs(patches[..., [0, 1, 2]])[0]
    half = opened(tmp_path, patches, contract, dtype=TensorProto.FLOAT16)
    assert half.dtype is np.float16
    out = half.outputs(patches[..., [0, 1, 2]])[0]
    assert out.dtype == np.float32
    assert out == pytest.approx(exact, abs=0.1)


def test_the_test_teacher_is_a_good_one(tmp_path):
    patches, labels = make_patches(300, seed=9)
    contract = parse_contract(json.dumps(make_contract(patches)).encode())
    logits = opened(tmp_path, patches, contract).outputs(patches[..., [0, 1, 2]])[0]
    assert (logits.argmax(axis=1) == labels).mean() > 0.95
    assert len(MEANS) == logits.shape[1]


def test_a_softmax_at_the_end_is_cut_off(tmp_path, patches, contract):
    logits = opened(tmp_path, patches, contract).outputs(patches[..., [0, 1, 2]])[0]
    teacher = opened(tmp_path, patches, contract, softmax=True)
    assert teacher.ending == "softmax cut off"
    assert teacher.outputs(patches[..., [0, 1, 2]])[0] == pytest.approx(
        logits, abs=TEACHER_ROUNDING
    )
    external = opened(tmp_path, patches, contract, softmax=True, external="weights.bin")
    assert external.outputs(patches[..., [0, 1, 2]])[0] == pytest.approx(
        logits, abs=TEACHER_ROUNDING
    )


def test_features_come_after_the_logits_by_name(tmp_path, patches, contract):
    teacher = opened(tmp_path, patches, contract, given={"features": ("pooled", "features")})
    logits, pooled, features = teacher.outputs(patches[:5, ..., [0, 1, 2]])
    assert (logits.shape, pooled.shape, features.shape) == ((5, 3), (5, 3, 1, 1), (5, 3))
    tensor = teacher.prepare(patches[:5, ..., [0, 1, 2]])
    assert pooled[..., 0, 0] == pytest.approx(tensor.mean(axis=(2, 3)), abs=TEACHER_ROUNDING)
    with pytest.raises(InputError, match="no node makes a tensor 'pooling'; there are pooled"):
        opened(tmp_path, patches, contract, given={"features": ("pooling",)})


@pytest.mark.parametrize("before", ["Sub", "Div", "Mul", "BatchNormalization"])
def test_a_graph_that_normalizes_itself_is_not_normalized_twice_unless_told(
    tmp_path, patches, contract, before
):
    with pytest.raises(InputError, match=rf"normalizes its input itself \({before}"):
        opened(tmp_path, patches, contract, before=before)
    inside = opened(tmp_path, patches, contract, before=before, given={"zscore": "graph"})
    both = opened(tmp_path, patches, contract, before=before, given={"zscore": "both"})
    scaled = inside.prepare(patches[..., [0, 1, 2]])
    assert scaled.max() > 50  # contract units, 0..255
    assert abs(both.prepare(patches[..., [0, 1, 2]]).mean()) < 0.1
    with pytest.raises(InputError, match="its graph does not begin with a normalization"):
        opened(tmp_path, patches, contract, given={"zscore": "graph"})


def test_threads_are_measured(tmp_path, patches, contract):
    for options in ({}, {"batch": 7}, {"size": "S"}):
        threads = choose_threads(opened(tmp_path, patches, contract, **options))
        assert threads.count >= 1
        assert str(threads).endswith("spinning")
    given = TeacherParams(path="teacher.onnx", bands=(0, 1, 2))
    two, threads = open_teachers(
        [(tmp_path / "teacher.onnx", given, contract.bind("optical", given.bands, 4))] * 2, contract
    )
    assert threads.count >= 1
    assert [teacher.name for teacher in two] == ["teacher"] * 2
