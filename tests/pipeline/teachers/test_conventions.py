"""A wrong teacher, or the right one shown the wrong input, is seen before anybody trains."""

import json
from dataclasses import replace

import numpy as np
import onnx
import pytest
from onnx import helper
from tiny_project import make_contract, make_patches, make_teacher

from pipeline.params.sources import TeacherParams
from pipeline.teachers.conventions import (
    check_records,
    describe_ensemble,
    describe_member,
    try_conventions,
)
from pipeline.teachers.open import open_teacher
from preprocessing.contract import parse_contract


@pytest.fixture
def data():
    return make_patches(300, seed=6)


def teacher_for(tmp_path, made, contract, bands=(2, 1, 3), **recorded):
    """A teacher that was exported for one contract and is opened with another."""
    make_teacher(tmp_path / "t.onnx", bands, made)
    params = TeacherParams(path="t.onnx", bands=bands, **recorded)
    parsed = parse_contract(json.dumps(contract).encode())
    return open_teacher(tmp_path / "t.onnx", params, parsed, parsed.bind("optical", bands, 4))


def best(tmp_path, data, made, contract=None, **options):
    patches, labels = data
    contract = contract or make_contract(patches)
    teacher = teacher_for(tmp_path, made, contract, **options)
    picked = patches[..., list(teacher.bands)]
    tried = try_conventions(teacher, picked, labels)
    assert next(iter(tried)) == "the contract"
    return max(tried, key=tried.get), tried


def test_a_right_teacher_is_best_under_the_contract(tmp_path, data):
    assert best(tmp_path, data, make_contract(data[0]))[0] == "the contract"


def other(data, mu, sigma):
    """The contract of somebody who normalized with other constants."""
    made = make_contract(data[0])
    made["zscore"] = {"enabled": True, "mu": mu, "sigma": sigma}
    return made


def test_each_convention_met_in_the_wild_is_recognized(tmp_path, data):
    made = make_contract(data[0])
    mu, sigma = (np.array(made["zscore"][k]) for k in ("mu", "sigma"))
    zero, one = np.zeros(4), np.ones(4)
    cases = {
        # trained on scaled / 255, then the z-score with the constants of 0..255
        "divided by 255 before the z-score": other(
            data, (mu * 255).tolist(), (sigma * 255).tolist()
        ),
        "no z-score (as if the graph did it)": other(data, zero.tolist(), one.tolist()),
        "divided by 255, no z-score": other(data, zero.tolist(), (255 * one).tolist()),
        "stored values as they are": other(data, zero.tolist(), (255 / 2.8 * one).tolist()),
    }
    for words, exported_for in cases.items():
        found, tried = best(tmp_path, data, exported_for)
        assert tried[words] > 0.95, (words, tried)
        assert tried[words] == max(tried.values())
        assert tried["the contract"] < tried[words] or found == "the contract", words


def test_reversed_bands_and_the_statistics_of_the_first_bands_are_recognized(tmp_path, data):
    made = make_contract(data[0])
    make_teacher(tmp_path / "t.onnx", (3, 0), made)  # opened as (0, 3)
    params = TeacherParams(path="t.onnx", bands=(0, 3))
    contract = parse_contract(json.dumps(made).encode())
    teacher = open_teacher(
        tmp_path / "t.onnx", params, contract, contract.bind(params.modality, params.bands, 4)
    )
    tried = try_conventions(teacher, data[0][..., [0, 3]], data[1])
    assert tried["bands reversed"] > tried["the contract"]


def test_the_statistics_of_the_first_bands_are_tried_as_that_mistake_takes_them(tmp_path, data):
    """On noise that leaves doubt, each convention's top-1 is that of a contract that says so."""
    patches, labels = data
    noisy = patches + np.random.default_rng(0).normal(0, 0.5, patches.shape).astype(np.float32)
    made = make_contract(patches)
    mistaken = make_contract(patches)
    for key in ("mu", "sigma"):
        first = made["zscore"][key]
        mistaken["zscore"][key] = [first[3], first[1], first[0], first[2]]  # of bands 2, 1, 3
    _, tried = best(tmp_path, (noisy, labels), made, made)
    by_contract = teacher_for(tmp_path, made, mistaken).outputs(noisy[..., [2, 1, 3]])[0]
    right = (by_contract.argmax(axis=1) == labels).mean()
    assert tried["mu and sigma of the first bands"] == pytest.approx(right)
    assert tried["mu and sigma of the first bands"] != tried["the contract"]


def described(teacher, data):
    patches, labels = data
    picked = patches[..., list(teacher.bands)]
    return describe_member(teacher, teacher.outputs(picked)[0], labels, picked[:50])


def test_records_that_are_reproduced_pass_and_others_do_not(tmp_path, data):
    made = make_contract(data[0])
    figures = described(teacher_for(tmp_path, made, made), data)
    recorded = {
        "recorded_top1": figures.score,
        "recorded_logit_mean": figures.logit_mean,
        "recorded_logit_std": figures.logit_std,
    }
    same = teacher_for(tmp_path, made, made, **recorded)
    assert check_records(same, described(same, data), 0.005, 0.1) == []
    shifted = replace(described(same, data), logit_mean=9.0)
    assert [m.figure for m in check_records(same, shifted, 0.005, 0.1)] == ["mean logit"]
    assert check_records(same, shifted, 0.005, 0.1, probabilities=True) == []

    extra_relu = onnx.load(tmp_path / "t.onnx")
    nodes = extra_relu.graph.node
    flatten = next(n for n in nodes if n.op_type == "Flatten")
    nodes.insert(list(nodes).index(flatten), helper.make_node("Relu", ["pooled"], ["positive"]))
    flatten.input[0] = "positive"
    onnx.save(extra_relu, tmp_path / "t.onnx")
    contract = parse_contract(json.dumps(made).encode())
    wrong = open_teacher(
        tmp_path / "t.onnx",
        same.params,
        contract,
        contract.bind(same.params.modality, same.params.bands, 4),
    )
    missed = check_records(wrong, described(wrong, data), 0.005, 0.1)
    assert missed
    assert "recorded" in str(missed[0])

    swapped = TeacherParams(path="t.onnx", bands=(1, 2, 3), **recorded)
    make_teacher(tmp_path / "t.onnx", (2, 1, 3), made)
    wrong = open_teacher(
        tmp_path / "t.onnx", swapped, contract, contract.bind(swapped.modality, swapped.bands, 4)
    )
    assert check_records(wrong, described(wrong, data), 0.005, 0.1)


def test_the_ensemble_is_described_under_both_rules():
    labels = np.array([0, 1, 1])
    sure = np.array([[9, 0], [9, 0], [0, 1]], np.float32)
    unsure = np.array([[1, 0], [0, 2], [0, 1]], np.float32)
    rules, agreement = describe_ensemble([sure, unsure], [1, 1], [1, 1], labels)
    assert agreement[0] == (1.0, pytest.approx(2 / 3))
    assert rules["mean_logits"].score == pytest.approx(2 / 3)
    assert set(rules) == {"mean_logits", "mean_probabilities"}
