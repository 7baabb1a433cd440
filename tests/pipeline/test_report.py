import json

import pytest

from pipeline.report import ReportError, parse_measurement, parse_report, summary_lines


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
]


@pytest.mark.parametrize("path", FIGURES)
def test_an_emulated_figure_that_calls_itself_a_devices_fails(tree, path):
    figure = tree["measurement"]
    for key in path:
        figure = figure[key]
    figure["measured_on"] = "device"
    with pytest.raises(ReportError, match="says measured_on device, but runtime onnxruntime"):
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
