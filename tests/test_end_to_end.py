"""The whole run on the emulator, with tiny teachers: what users see first."""

import hashlib
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from scipy.stats import binom

from pipeline.run.files import folder_files
from pipeline.stages import load_stages


def test_a_run_makes_every_artifact_and_a_second_one_changes_nothing(finished):
    assert set(finished.states().values()) == {"fresh"}
    runs = finished.root / "runs"
    assert finished.kdpipe("run").returncode == 0  # a copy has new inodes: digests are learned anew
    before = {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in folder_files(runs)}
    again = finished.kdpipe("run")
    assert again.returncode == 0
    assert again.stderr.count(" fresh ") == 5
    assert {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in folder_files(runs)} == before


def test_every_gate_that_judges_is_one_that_can_be_named(finished):
    judged = {name: set(record["gate"]) for name, record in finished.manifest["stages"].items()}
    assert judged == {name: set(stage.gate_names) for name, stage in load_stages().items()}


def test_the_contract_is_carried_byte_for_byte(finished):
    original = (finished.root / "preprocessing.json").read_bytes()
    digest = hashlib.sha256(original).hexdigest()
    assert finished.artifact("contract").read_bytes() == original
    bundle = finished.artifact("bundle")
    assert (bundle / "preprocessing.json").read_bytes() == original
    manifest = finished.manifest
    assert manifest["contract"]["sha256"] == digest
    assert {record["contract"] for record in manifest["stages"].values()} == {digest}
    assert json.loads((bundle / "bundle.json").read_text())["contract"] == digest
    assert digest in (finished.artifact("device_pipeline") / "tiny.yaml").read_text()
    for name in ("report.json", "report.md", "report.html"):
        assert digest in (finished.artifact("benchmark_report") / name).read_text()


def test_the_student_learns_and_int8_keeps_what_it_learned(finished):
    report = json.loads((finished.artifact("benchmark_report") / "report.json").read_text())
    rows = {(r["name"], r["figure"]["scope"]): r["figure"] for r in report["accuracy"]}
    assert rows["teacher ensemble", "validation split"]["value"] > 0.95
    assert rows["test_byobnet float", "test split"]["value"] > 0.6  # chance is 0.33
    assert rows["test_byobnet int8", "test split"]["n"] == 90
    page = (finished.artifact("benchmark_report") / "report.md").read_text()
    for row in report["accuracy"]:
        low, high = row["interval95"]
        assert low <= row["figure"]["value"] <= high
        assert f" {low:.4f} to {high:.4f} | {row['figure']['n']} " in page


def test_everything_measured_here_says_it_is_an_emulation(finished):
    folder = finished.artifact("benchmark_report")
    measured = json.loads((folder / "report.json").read_text())["measurement"]
    assert measured["device"] is None
    figures = [measured[k] for k in ("load_ms", "throughput", "top1_test")] + measured["latency"]
    assert {f["measured_on"] for f in figures} == {"host-emulation"}
    assert "No device took part" in (folder / "report.md").read_text()
    assert "No device took part" in (folder / "report.html").read_text()
    assert measured["verdict"]["word"] == "SMOKE"
    terminal = finished.kdpipe("run", "--stage", "benchmark", "--force").stderr
    lines = [line for line in terminal.splitlines() if "latency" in line or "throughput" in line]
    assert lines
    assert all("host-emulation" in line for line in lines)


def test_every_printed_statistic_can_be_recomputed_from_the_samples(finished):
    folder = finished.artifact("benchmark_report")
    measured = json.loads((folder / "report.json").read_text())["measurement"]
    samples = np.load(folder / "samples.npz")
    raw = [samples["run_ns"], samples["all_ns"], samples["all_ns"] - samples["run_ns"]]
    places = {"p50": 0.5, "p90": 0.9, "p95": 0.95, "p99": 0.99}
    for latency, ns in zip(measured["latency"], raw, strict=True):
        ms = np.sort(ns) / 1e6
        n = len(ms)
        assert latency["n"] == n >= 70
        for name, quantile in places.items():
            assert latency[name] in (None, ms[int(quantile * n)])
        found = [latency[name] for name in ("min", "mean", "std", "max")]
        assert found == [ms[0], ms.mean(), ms.std(), ms[-1]]
        t = max(t for t in range(n) if binom.cdf(t, n, 0.1) <= 0.01)
        assert latency["bounds"]["p90"] == ms[n - t]
    done = samples["offline_single_0_done_ns"]
    (mode,) = measured["throughput_modes"]
    assert mode == measured["throughput"]
    assert (mode["n"], mode["value"]) == (len(done), len(done) / (done[-1] / 1e9))
    overhead, run = np.sort(raw[2]), np.sort(raw[0])
    middle = len(run) // 2
    assert measured["overhead_share"]["value"] == pytest.approx(overhead[middle] / run[middle])
    tenth = len(run) // 10
    drift = np.median(raw[1][-tenth:]) / np.median(raw[1][:tenth])
    stability = measured["stability"]
    assert stability["drift"] == drift
    assert stability["slow_queries"] == (raw[1] > 5 * np.median(raw[1])).sum()
    classes, labels = samples["test_classes"], samples["test_labels"]
    assert measured["top1_test"]["value"] == (classes == labels).mean()
    reference = samples["test_float_classes"]
    assert measured["accuracy"]["agreement"] == (classes == reference).mean()
    lost = 100 * ((reference == labels).mean() - (classes == labels).mean())
    assert measured["accuracy"]["loss_points"] == pytest.approx(lost)


def test_the_html_report_is_one_file_without_network(finished):
    text = (finished.artifact("benchmark_report") / "report.html").read_text()
    assert "<svg" in text
    addresses = []

    class Links(HTMLParser):
        def handle_starttag(self, tag, attrs):
            addresses.extend(v for k, v in attrs if k in ("src", "href") and not v.startswith("#"))

    Links().feed(text)
    assert addresses == []


def test_a_run_folder_can_move_and_names_no_path_of_this_machine(finished, tmp_path):
    moved = tmp_path / "elsewhere"
    finished.root.rename(moved)
    finished.root = moved
    assert finished.kdpipe("verify").returncode == 0
    assert set(finished.states().values()) == {"fresh"}
    logs = finished.folder / "logs"
    for path in folder_files(finished.folder):
        if not path.is_relative_to(logs):
            assert str(tmp_path.parent).encode() not in path.read_bytes(), path
            assert b"/site-packages/" not in path.read_bytes(), path
    (events,) = logs.rglob("*tfevents*")  # TensorBoard puts the host's name into its own
    assert re.fullmatch(r"events\.out\.tfevents\.\d+", events.name)


def test_the_user_gets_words_on_stderr_and_json_on_stdout(finished):
    result = finished.kdpipe("run", "--json")
    document = json.loads(result.stdout)
    assert document["ran"] == []
    assert re.search(r"runs/tiny/benchmark/001/report/report\.html$", document["report"])
