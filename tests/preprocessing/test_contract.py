import hashlib
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from preprocessing.contract import ContractError, load_contract, parse_contract
from preprocessing.student_input import StudentInput, linear_encoding


def contract_tree():
    return {
        "input": {"layout": "NCHW", "dtype": "float32", "shape": [1, 3, 32, 32]},
        "scaling": {
            "optical": {"type": "linear", "src_range": [0, 2.8], "dst_range": [0, 255]},
            "sar": {"type": "clip_linear", "clip": [-0.5, 0.5], "dst_range": [0, 255]},
        },
        "zscore": {"enabled": True, "mu": [11.0, 10.0, 9.0, 14.0], "sigma": [3.6, 4.4, 6.0, 8.1]},
        "labels": ["LCZ_1", "LCZ_2"],
        "note": "from the exporter",
        "unknown": {"kept": True},
    }


def parse(tree):
    return parse_contract(json.dumps(tree).encode())


def change(tree, path, value):
    here = tree
    for key in path[:-1]:
        here = here[key]
    here[path[-1]] = value
    return tree


def test_the_exporters_form_is_read():
    contract = parse(contract_tree())
    assert contract.size_hw == (32, 32)
    assert contract.labels == ("LCZ_1", "LCZ_2")
    assert contract.scaling["optical"].gain == pytest.approx(255 / 2.8)
    assert contract.scaling["sar"].gain == pytest.approx(255)
    assert contract.scaling["sar"].offset == pytest.approx(127.5)


def test_the_digest_is_of_the_files_bytes(tmp_path):
    path = tmp_path / "preprocessing.json"
    data = json.dumps(contract_tree(), indent=7).encode()
    path.write_bytes(data)
    assert load_contract(path).sha256 == hashlib.sha256(data).hexdigest()
    assert load_contract(path).size_bytes == len(data)


def test_a_model_takes_the_statistics_of_its_bands_in_its_order():
    entries = parse(contract_tree()).bind("optical", [2, 1, 0], bands_in_data=4).zscore
    assert entries.mu == (9.0, 10.0, 11.0)
    assert entries.sigma == (6.0, 4.4, 3.6)


def test_zscore_may_be_keyed_per_modality():
    tree = contract_tree()
    tree["zscore"] = {
        "enabled": True,
        "optical": {"mu": [11.0, 10.0], "sigma": [3.6, 4.4]},
        "sar": {"mu": [127.0], "sigma": [20.0]},
    }
    contract = parse(tree)
    assert contract.bind("sar", [0], bands_in_data=1).zscore.mu == (127.0,)
    assert contract.bind("optical", [1], bands_in_data=2).zscore.sigma == (4.4,)


def test_an_unkeyed_list_serves_only_a_modality_with_as_many_bands():
    contract = parse(contract_tree())
    with pytest.raises(ContractError, match=r"zscore\.mu has 4 entries.*'sar' has 8 bands.*key"):
        contract.bind("sar", [0], bands_in_data=8)


def test_zscore_can_be_off():
    tree = change(contract_tree(), ["zscore"], {"enabled": False})
    assert parse(tree).bind("optical", [0], bands_in_data=4).zscore is None


def test_matlab_writes_a_list_of_one_as_a_number():
    tree = change(contract_tree(), ["zscore"], {"enabled": True, "mu": 11.0, "sigma": 3.6})
    assert parse(tree).bind("optical", [0], bands_in_data=1).zscore.mu == (11.0,)


def test_a_byte_order_mark_is_no_error():
    assert parse_contract(b"\xef\xbb\xbf" + json.dumps(contract_tree()).encode()).labels


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        (["input", "layout"], "HWC", r"input\.layout is \"HWC\"; it must be one of NCHW, NHWC"),
        (["input", "dtype"], "float64", r"input\.dtype is \"float64\""),
        (["input", "shape"], [1, 3, 32], r"input\.shape must be a list of four sizes"),
        (["input", "shape"], [1, 3, 0, 32], r"input\.shape\[2\] is 0"),
        (["scaling"], {}, r"scaling has no modality"),
        (["scaling", "optical"], 3, r"scaling\.optical must be an object, not a number"),
        (["scaling", "optical", "type"], "log", r"scaling\.optical\.type is \"log\""),
        (["scaling", "optical", "src_range"], [2.8, 0], r"src_range is \[2\.8, 0\]; the first"),
        (["scaling", "optical", "dst_range"], [0, 0], r"dst_range is \[0, 0\]; the first"),
        (["scaling", "sar", "clip"], [0.5], r"scaling\.sar\.clip must be a list of two numbers"),
        (["zscore"], {"mu": [1.0], "sigma": [1.0]}, r"zscore\.enabled is missing"),
        (["zscore", "enabled"], "yes", r"zscore\.enabled must be true or false, not a string"),
        (["zscore", "mu"], [11.0, 10.0, 9.0], r"sigma has 4 entries and zscore\.mu has 3"),
        (["zscore", "mu", 3], 300.0, r"zscore\.mu\[3\] is 300, outside dst_range \[0, 255\]"),
        (["zscore", "mu", 0], "11", r"zscore\.mu\[0\] must be a number, not a string"),
        (["zscore", "sigma", 2], 0, r"zscore\.sigma\[2\] is 0; a standard deviation is above 0"),
        (["zscore", "sigma", 2], -1, r"zscore\.sigma\[2\] is -1"),
        (["zscore", "sigma", 2], 1e999, r"Infinity is not a number"),
        (["zscore", "mu", 0], float("nan"), r"NaN is not a number"),
        (["zscore", "mu"], [], r"zscore\.mu is empty"),
        (["labels"], [], r"labels must be a list of class names"),
        (["labels", 1], "LCZ_1", r"labels\[1\] repeats 'LCZ_1'"),
        (["labels", 1], "  ", r"labels\[1\] must be a class name"),
        (["labels", 1], 7, r"labels\[1\] must be a class name, not 7"),
    ],
)
def test_a_value_that_cannot_be_right_is_refused_by_its_path(path, value, words):
    with pytest.raises(ContractError, match=words) as refusal:
        parse(change(contract_tree(), path, value))
    assert str(refusal.value).startswith("preprocessing.json: ")
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("missing", ["input", "scaling", "zscore", "labels"])
def test_a_missing_part_is_named(missing):
    tree = contract_tree()
    del tree[missing]
    with pytest.raises(ContractError, match=f"preprocessing.json: {missing} is missing"):
        parse(tree)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"{", r"is not JSON: .* at line 1 column 2"),
        (b"[]", r"must be a JSON object, not a list"),
        (b'{"labels": [], "labels": []}', r"key 'labels' appears twice"),
        (b"\xff\xfe", r"is not UTF-8"),
    ],
)
def test_what_is_not_json_is_refused(data, words):
    with pytest.raises(ContractError, match=words):
        parse_contract(data)


def test_a_missing_file_is_refused_by_name(tmp_path):
    with pytest.raises(ContractError, match="No such file"):
        load_contract(tmp_path / "preprocessing.json")


def test_unknown_modality_and_band_are_refused():
    contract = parse(contract_tree())
    with pytest.raises(ContractError, match="no modality 'radar'; it has optical, sar"):
        contract.scaling_of("radar")
    with pytest.raises(ContractError, match="band 4 does not exist: modality 'optical' has bands"):
        contract.bind("optical", [4], bands_in_data=4)


@given(
    low=st.floats(-100, 100),
    width=st.floats(1, 1000),
    at=st.floats(0, 1),
    sigma=st.floats(0.01, 100),
    grey=st.integers(0, 255),
)
def test_mean_and_std_in_grey_levels_are_the_zscore_of_the_decoded_value(
    low, width, at, sigma, grey
):
    mu = low + at * width
    tree = contract_tree()
    tree["scaling"] = {
        "optical": {"type": "linear", "src_range": [0, 1], "dst_range": [low, low + width]}
    }
    tree["zscore"] = {"enabled": True, "mu": [mu], "sigma": [sigma]}
    channels = parse(tree).bind("optical", [0], bands_in_data=1)
    encoding = linear_encoding([(low, low + width)], channels)
    decoded = low + grey / 255 * width
    expected = (decoded - mu) / sigma
    found = (grey - encoding["mean"][0]) / encoding["std"][0]
    assert found == pytest.approx(expected, rel=1e-9, abs=1e-9 * width / sigma)


def test_a_student_input_survives_its_file(tmp_path):
    contract = parse(contract_tree())
    given = StudentInput(
        modality="optical",
        bands=(2, 1, 0),
        patch_hw=(32, 32),
        size_hw=(224, 224),
        interpolation="bilinear",
        half_pixel_centers=True,
        device_resize=True,
        encoding="contract",
        contract=contract.sha256,
        **linear_encoding([(0.0, 255.0)] * 3, contract.bind("optical", [2, 1, 0], 4)),
    )
    path = tmp_path / "student_input.json"
    path.write_text(given.to_json())
    assert StudentInput.load(path) == given
    path.write_text("{}")
    with pytest.raises(ContractError, match="not a student input file"):
        StudentInput.load(path)
