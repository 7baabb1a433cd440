import json

import msgspec
import numpy as np
import pytest

from pipeline.facts import ComparisonFacts, RewriteFacts
from pipeline.reports.pages import write_report
from pipeline.reports.report import ReportError, parse_measurement, parse_report, summary_lines


@pytest.fixture
def tree(finished):
    return json.loads((finished.artifact("benchmark_report") / "report.json").read_text())


def parse(tree):
    return parse_report(json.dumps(tree).encode())


def test_the_report_reads_back(tree):
    report = parse(tree)
    assert report.run == "tiny"
    lines = summary_lines(report)
    assert any("teacher ensemble" in line for line in lines)


FIGURES = [
    ("load_ms",),
    ("throughput",),
    ("top1_test",),
    ("latency", 0),
    ("latency", 1),
    ("first_inference_ms",),
    ("overhead_share",),
    ("accuracy",),
    ("throughput_modes", 0),
    ("passes", 0),
    ("repetition",),
]


@pytest.mark.parametrize("path", FIGURES)
def test_an_emulated_figure_that_calls_itself_a_devices_fails(tree, path):
    figure = tree["measurement"]
    for key in path:
        figure = figure[key]
    figure["measured_on"] = "device"
    with pytest.raises(ReportError, match="says measured_on device, but runtime onnxruntime"):
        parse(tree)


def origins(tree):
    """Every mapping of a JSON tree that says where it was measured."""
    if isinstance(tree, dict):
        yield from [tree] if "measured_on" in tree else []
    for value in tree.values() if isinstance(tree, dict) else tree:
        if isinstance(value, dict | list):
            yield from origins(value)


def test_no_figure_of_an_emulation_can_be_renamed(tree):
    found = list(origins(tree))
    assert len(found) > 40
    for figure in found:
        honest = figure["measured_on"]
        figure["measured_on"] = "device"
        with pytest.raises(ReportError, match=r"measured_on.* device|Invalid enum value 'device'"):
            parse(tree)
        figure["measured_on"] = honest
    parse(tree)


@pytest.mark.parametrize("path", FIGURES)
def test_a_figure_without_its_origin_fails(tree, path):
    figure = tree["measurement"]
    for key in path:
        figure = figure[key]
    del figure["measured_on"]
    with pytest.raises(ReportError, match="missing required field `measured_on`"):
        parse(tree)


def test_an_emulation_has_no_device(tree):
    tree["measurement"]["device"] = {"name": "metis-0:1:0"}
    with pytest.raises(ReportError, match="has no device"):
        parse(tree)


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        (("heat_before", "temperature_c"), 41.0, "no device to read heat, power or clocks of"),
        (("heat_after", "power_w"), 7.5, "no device to read heat, power or clocks of"),
        (("heat_after", "clocks"), {"clock_profile": "800"}, "no device to read heat"),
        (("heat_during", "hottest_c"), 41.0, "no device to read heat, power or a driver of"),
        (("passes", 0, "power_w"), 7.5, "no device to read heat, power or a driver of"),
        (("link", "width"), 4, "no device to read a PCIe link of"),
    ],
)
def test_an_emulation_reads_nothing_off_a_device(tree, path, value, words):
    group = tree["measurement"]
    for key in path[:-1]:
        group = group[key]
    assert not group[path[-1]]
    group[path[-1]] = value
    with pytest.raises(ReportError, match=words):
        parse(tree)


def test_an_estimate_never_says_that_it_was_measured(tree):
    tree["estimate"]["boards"]["pcie"]["throughput"]["measured_on"] = "device"
    with pytest.raises(
        ReportError, match=r"'device' - at `\$\.estimate\.boards\[\.\.\.\]\.throughput"
    ):
        parse(tree)


def test_what_is_not_known_is_left_out_and_what_is_known_is_shown(tree, finished, tmp_path):
    samples = finished.artifact("benchmark_report") / "samples.npz"
    board = tree["estimate"]["boards"]["pcie"]
    rate = {**board["throughput"], "value": 900.0, "low": 800.0, "high": 999.0}
    emulator = ComparisonFacts(
        n_val=60,
        score_float=0.9,
        score_int8=0.895,
        measured_on="host-emulation",
        agreement=0.98,
        logits_cosine_mean=1.0,
        logits_cosine_min=0.9,
        logits_sqnr_db=None,
        int8_loss_points=0.5,
        int8_loss_interval95_points=(0.0, 1.0),
    )
    rewrite = RewriteFacts("global pool", "gate_3", "a ReduceMean became a pool", 0.0, 0.0)
    known = {
        "int8_emulator": msgspec.to_builtins(emulator),
        "rewrites": [msgspec.to_builtins(rewrite)],
        "estimate": {**tree["estimate"], "boards": {"pcie": {**board, "throughput": rate}}},
    }
    shown = (
        "emulator's, on the same patches: +0.50",
        "gate_3: a ReduceMean",
        "900 frames/s (800 to 999)",
    )
    for facts in ({"int8_emulator": None, "rewrites": [], "estimate": None}, known):
        write_report(parse({**tree, **facts}), samples, tmp_path)
        for name in ("report.md", "report.html"):
            text = (tmp_path / name).read_text().replace("&#39;", "'")
            for words in shown:
                assert (words in text) == (facts is known), (name, words)


def test_the_picture_shows_the_temperature_where_there_is_one(tree, finished, tmp_path):
    with np.load(finished.artifact("benchmark_report") / "samples.npz") as archive:
        samples = {**archive}
    assert len(samples["heat_c"]) == 0
    for degrees in ([], [51.0, np.nan, 63.0]):
        stamps = np.arange(len(degrees)) * 10**8
        np.savez(tmp_path / "s.npz", **{**samples, "heat_c": degrees, "heat_ns": stamps})
        write_report(parse(tree), tmp_path / "s.npz", tmp_path)
        picture = (tmp_path / "latency.svg").read_text()
        assert ("device, C" in picture) == bool(degrees)
        assert picture in (tmp_path / "report.html").read_text()


def test_the_measurement_must_be_of_the_same_contract(tree):
    tree["contract"] = "0" * 64
    with pytest.raises(ReportError, match="the report's contract is 0000"):
        parse(tree)


def test_an_unknown_field_or_another_word_fails(tree):
    tree["measurement"]["fps"] = 3
    with pytest.raises(ReportError, match="unknown field `fps`"):
        parse(tree)
    del tree["measurement"]["fps"]
    tree["measurement"]["verdict"]["word"] = "GREAT"
    with pytest.raises(ReportError, match="GREAT"):
        parse(tree)


def test_what_kdbench_prints_last_must_be_its_report():
    with pytest.raises(ReportError, match="last line is not its report"):
        parse_measurement("segmentation fault")
