"""Networks of timm as teachers: frozen, with a head of their own, and with layers by name."""

import json

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from tiny_project import make_contract, make_patches

from pipeline.params.sources import TeacherParams
from pipeline.run.errors import InputError
from pipeline.teachers.open import open_teacher
from preprocessing.contract import parse_contract


@pytest.fixture(scope="module")
def patches():
    return make_patches(40, seed=4)[0]


@pytest.fixture(scope="module")
def contract(patches):
    return parse_contract(json.dumps(make_contract(patches)).encode())


def opened(tmp_path, contract, **given):
    """A network whose running means are not those of any batch."""
    torch.manual_seed(1)
    network = timm.create_model("test_byobnet", num_classes=3, in_chans=3)
    network.train()(torch.randn(16, 3, 16, 16))
    save_file(network.state_dict(), tmp_path / "t.safetensors")
    params = TeacherParams(path="t.safetensors", timm="test_byobnet", bands=(0, 1, 2), **given)
    return network, open_teacher(
        tmp_path / "t.safetensors",
        params,
        contract,
        contract.bind(params.modality, params.bands, 4),
    )


def test_it_is_frozen_whatever_it_is_asked(tmp_path, contract, patches):
    network, teacher = opened(tmp_path, contract)
    seen = patches[..., :3]
    first = teacher.outputs(seen)[0]
    with torch.no_grad():
        by_hand = network.eval()(torch.from_numpy(teacher.prepare(seen))).numpy()
    assert first == pytest.approx(by_hand, abs=1e-5)
    # In training mode a patch's answer would depend on those beside it, and on those before.
    one_by_one = np.concatenate([teacher.outputs(seen[i : i + 1])[0] for i in range(10)])
    assert one_by_one == pytest.approx(first[:10], abs=1e-4)
    assert np.array_equal(teacher.outputs(seen)[0], first)


def test_a_layer_that_is_not_there_is_named_with_near_ones(tmp_path, contract):
    with pytest.raises(InputError, match=r"test_byobnet has no module 'stage\.1'; near are stages"):
        opened(tmp_path, contract, features=("stage.1",))


def test_a_head_of_other_classes_is_no_teacher(contract, monkeypatch):
    """As the weights of a hub have it: soft labels of ImageNet would be noise here."""
    untrained = timm.create_model("test_byobnet")
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained: untrained)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    params = TeacherParams(timm="test_byobnet", bands=(0, 1, 2))
    with pytest.raises(InputError, match="test_byobnet has 1000 classes, but preprocessing"):
        open_teacher(None, params, contract, contract.bind(params.modality, params.bands, 4))
    params = TeacherParams(timm="test_byobnet", bands=(0, 1))
    with pytest.raises(InputError, match=r"trained on 3 channels, but its bands in .* \[0, 1\]"):
        open_teacher(None, params, contract, contract.bind(params.modality, params.bands, 4))
