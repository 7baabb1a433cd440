"""kdbench as a device user starts it: a program in a bundle, without kdpipe."""

import json
import math
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest


def test_it_needs_only_what_the_bundle_holds(bundle):
    result = bundle.kdbench()
    assert result.returncode == 0, result.stderr
    document = json.loads(result.stdout.splitlines()[-1])
    assert document["measured_on"] == "host-emulation"
    assert [check["name"] for check in document["checks"]] == ["digests", "preprocessing", "logits"]
    assert all(audit["kept"] and not audit["different"] for audit in document["audit"])
    for line in result.stdout.splitlines()[:-1]:
        if line.startswith(("latency", "throughput", "top-1")):
            assert "host-emulation" in line


def test_json_alone_and_raw_samples(bundle, tmp_path):
    result = bundle.kdbench("--json", f"--samples={tmp_path / 's.npz'}")
    assert len(result.stdout.splitlines()) == 1
    document = json.loads(result.stdout)
    samples = np.load(tmp_path / "s.npz")
    assert len(samples["all_ns"]) == document["latency"][1]["n"] >= 10
    assert (samples["all_ns"] >= samples["run_ns"]).all()


@pytest.mark.parametrize(
    "name", ["preprocessing.json", "model/model.onnx", "golden.npz", "preprocessing/images.py"]
)
def test_a_damaged_file_is_named(bundle, name):
    path = bundle.folder / name
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))
    result = bundle.kdbench()
    assert result.returncode == 3
    assert f"Error: {name} is damaged: expected sha256 " in result.stderr
    assert "Traceback" not in result.stderr


def test_code_that_no_longer_loads_is_called_damaged(bundle):
    with (bundle.folder / "preprocessing" / "apply.py").open("a") as file:
        file.write("def broken(:")
    result = bundle.kdbench()
    assert result.returncode == 3
    assert "what lies beside kdbench.py is damaged" in result.stderr
    assert "Traceback" not in result.stderr


def test_a_missing_file_or_no_bundle_is_named(bundle, tmp_path):
    (bundle.folder / "labels.txt").unlink()
    result = bundle.kdbench()
    assert (result.returncode, "labels.txt is missing from the bundle" in result.stderr) == (
        3,
        True,
    )
    (bundle.folder / "bundle.json").unlink()
    result = bundle.kdbench()
    assert (result.returncode, "is not a bundle" in result.stderr) == (3, True)


@pytest.mark.parametrize("field", ["mean", "std", "interpolation"])
def test_other_preprocessing_is_caught_on_the_golden_images(bundle, field):
    given = json.loads((bundle.folder / "student_input.json").read_text())
    if field == "interpolation":
        bundle.edit("student_input.json", interpolation="bilinear", half_pixel_centers=True)
    else:
        first, second, *rest = given[field]
        bundle.edit("student_input.json", **{field: [first, second * 1.001, *rest]})
    result = bundle.kdbench()
    assert result.returncode == 4
    assert "preprocessing differs from the host's by up to" in result.stderr


def test_swapped_channels_are_caught(bundle):
    given = json.loads((bundle.folder / "student_input.json").read_text())
    swapped = {field: given[field][::-1] for field in ("mean", "std")}
    bundle.edit("student_input.json", **swapped)
    assert bundle.kdbench().returncode == 4


def test_another_contract_is_caught(bundle):
    path = bundle.folder / "preprocessing.json"
    path.write_text(path.read_text() + "\n")
    bundle.redo("preprocessing.json")
    result = bundle.kdbench()
    assert result.returncode == 3
    assert "preprocessing.json is of another contract" in result.stderr


def test_other_logits_are_caught_and_a_layout_error_is_called_that(bundle):
    bundle.edit_arrays("golden.npz", logits=lambda logits: logits + 1.0)
    result = bundle.kdbench()
    assert result.returncode == 4
    assert "logits differ from the host's int8 logits by up to" in result.stderr
    assert "layout" not in result.stderr
    bundle.edit_arrays("golden.npz", logits=lambda logits: np.roll(logits - 1.0, 1, axis=1))
    assert "they are the same numbers in another order: a layout error" in bundle.kdbench().stderr


def test_an_unknown_runtime_is_named(bundle):
    bundle.edit("bundle.json", runtime="abacus")
    result = bundle.kdbench()
    assert (result.returncode, "no runtime 'abacus'" in result.stderr) == (5, True)


def test_more_steps_are_allowed_where_somebody_says_so(bundle):
    bundle.edit_arrays("golden.npz", logits=lambda logits: logits + 1e-3)
    assert bundle.kdbench("--max-steps=1e-6").returncode == 4
    result = bundle.kdbench("--max-steps=1e3")
    assert result.returncode == 0, result.stderr
    assert "(limit 1000)" in result.stdout


def test_it_runs_with_numpy_and_one_runtime_and_nothing_else(bundle, tmp_path):
    # -S and -I: no site-packages at all; then two packages and what they load, by name.
    for name in ("numpy", "onnxruntime"):
        package = Path(find_spec(name).origin).parent
        (tmp_path / name).symlink_to(package)
        libraries = package.with_name(f"{name}.libs")
        if libraries.exists():
            (tmp_path / libraries.name).symlink_to(libraries)
        for info in package.parent.glob(f"{name}-*.dist-info"):
            (tmp_path / info.name).symlink_to(info)
    code = (
        "import sys, runpy; sys.path[:0] = sys.argv[1:3]; sys.argv = sys.argv[3:]; "
        "runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    program = bundle.folder / "kdbench.py"
    result = subprocess.run(
        [sys.executable, "-S", "-I", "-c", code, bundle.folder, tmp_path, program, bundle.folder,
         "--min-seconds=0.1", "--min-samples=10", "--json"],
        capture_output=True, text=True, check=False, cwd="/",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["verdict"]["word"] == "SMOKE"
    assert not list(bundle.folder.rglob("__pycache__"))


@pytest.mark.parametrize(
    ("scenario", "latencies", "modes"),
    [("single-stream", 3, 0), ("offline", 0, 1), ("both", 3, 1)],
)
def test_a_scenario_alone(bundle, scenario, latencies, modes):
    found = bundle.measured(f"--scenario={scenario}")
    assert len(found["latency"]) == latencies
    assert len(found["throughput_modes"]) == modes
    assert (found["throughput"] is None) == (modes == 0)
    assert found["verdict"]["word"] == "SMOKE"


def test_accuracy_far_below_the_float_student_is_invalid(bundle):
    bundle.edit("bundle.json", limits={"logit_steps": 1.0, "accuracy_loss_points": 10.0})
    with np.load(bundle.folder / "test.npz") as test:
        labels = test["labels"]
    bundle.edit_arrays("test.npz", float_classes=lambda classes: labels)
    assert bundle.kdbench().returncode == 7  # the int8 student is no better than its float one
    result = bundle.kdbench("--json")
    assert result.returncode == 7
    (reason,) = json.loads(result.stdout)["verdict"]["reasons"]
    assert reason.startswith("accuracy: ")
    assert "(limit 10)" in reason


def test_too_slow_for_the_minima_is_invalid(bundle):
    result = bundle.kdbench("--min-samples=100000000", "--max-seconds=0.3", "--json")
    assert result.returncode == 7
    (reason,) = json.loads(result.stdout)["verdict"]["reasons"]
    assert reason.startswith("Offline measured ")
    assert "of 1e+08 samples" in reason


def test_every_printed_statistic_comes_out_of_the_samples_again(bundle, tmp_path):
    found = bundle.measured(
        "--repeats=3", "--min-queries=700", "--soak=0.005", f"--samples={tmp_path / 's.npz'}"
    )
    raw = np.load(tmp_path / "s.npz")
    series = (raw["run_ns"], raw["all_ns"], raw["all_ns"] - raw["run_ns"])
    for row, ns in zip(found["latency"], series, strict=True):
        ms = np.sort(ns) / 1e6
        figures = {"min": ms[0], "max": ms[-1], "mean": ms.mean(), "std": ms.std(), "n": len(ms)}
        for name, quantile in (("p50", 0.5), ("p90", 0.9), ("p95", 0.95), ("p99", 0.99)):
            figures[name] = ms[math.floor(quantile * len(ms))]
        assert {name: row[name] for name in figures} == figures
    parts = np.split(raw["all_ns"], raw["repeat_ends"][:-1])
    p90 = [np.sort(part)[int(0.9 * len(part))] for part in parts]
    tenths = [(np.median(p[-(len(p) // 10) :]), np.median(p[: len(p) // 10])) for p in parts]
    rates = [len(raw[f"offline_single_{n}_done_ns"]) for n in range(3)]
    seconds = [raw[f"offline_single_{n}_done_ns"][-1] / 1e9 for n in range(3)]
    spread = np.ptp(np.divide(rates, seconds)) / np.median(np.divide(rates, seconds))
    stability = found["stability"]
    assert stability["spread_p90"] == pytest.approx(np.ptp(p90) / np.median(p90))
    assert stability["spread_throughput"] == pytest.approx(spread)
    assert stability["drift"] in [last / first for last, first in tenths]
    assert stability["slow_queries"] == (raw["all_ns"] > 5 * np.median(raw["all_ns"])).sum()
    assert found["throughput"]["n"] == sum(rates)
    assert found["throughput"]["value"] == pytest.approx(sum(rates) / sum(seconds))
    ratios = np.sort(
        np.median(raw["repetition_distinct_ns"], 1) / np.median(raw["repetition_same_ns"], 1)
    )
    assert [found["repetition"][k] for k in ("low", "value", "high")] == [*ratios[[1, 5, 9]]]
    assert found["soak"][0]["value"] == pytest.approx(
        len(raw["soak_done_ns"]) / raw["soak_done_ns"][-1] * 1e9
    )
    assert found["top1_test"]["value"] == (raw["test_classes"] == raw["test_labels"]).mean()
    # What ran, in time's order: SingleStream and Offline by turns, each loaded anew.
    assert [(run["scenario"], run["repeat"]) for run in found["passes"]] == [
        (scenario, repeat)
        for repeat in range(3)
        for scenario in ("SingleStream", "Offline, single buffering")
    ]
    streams = found["passes"][::2]
    assert [run["frames"] for run in streams] == [len(part) for part in parts]
    assert [1e9 * run["start_s"] for run in streams] == pytest.approx(raw["repeat_starts_ns"])


def test_the_words_mlperf_and_soak(monkeypatch):
    monkeypatch.syspath_prepend("deploy")
    from kdbench import parse

    asked = parse(["--mlperf", "--min-queries=5", "--min-samples=5", "--soak"])
    assert (asked.min_seconds, asked.min_queries, asked.min_samples) == (600, 1024, 24576)
    assert asked.soak == 30
    assert parse([]).soak == 0
    assert parse(["--mlperf", "--min-seconds=900"]).min_seconds == 900


def test_a_soak_has_a_line_for_every_minute(bundle):
    result = bundle.kdbench("--soak", "0.01", "--scenario=offline")
    assert result.returncode == 0, result.stderr
    (line,) = [line for line in result.stdout.splitlines() if line.startswith("soak")]
    assert "minute   1" in line
    assert "host-emulation" in line


def test_wrong_words_are_refused_before_anything_is_read(bundle):
    for words in (("--min-queries=0",), ("--min-seconds=-1",), ("--scenario=server",)):
        result = bundle.kdbench(*words)
        assert (result.returncode, "error:" in result.stderr) == (2, True)
    result = bundle.kdbench("--device=metis-0:1:0")
    assert (result.returncode, "without a device" in result.stderr) == (2, True)
