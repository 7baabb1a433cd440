"""The whole run on the emulator, with tiny teachers: what users see first."""

import hashlib
import json
import re
from html.parser import HTMLParser

import numpy as np

from pipeline.manifest import folder_files


def test_a_run_makes_every_artifact_and_a_second_one_changes_nothing(finished):
    assert set(finished.states().values()) == {"fresh"}
    runs = finished.root / "runs"
    assert finished.kdpipe("run").returncode == 0  # a copy has new inodes: digests are learned anew
    before = {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in folder_files(runs)}
    again = finished.kdpipe("run")
    assert again.returncode == 0
    assert again.stderr.count(" fresh ") == 5
    assert {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in folder_files(runs)} == before


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
    for latency, key in zip(measured["latency"], ("run_ns", "all_ns"), strict=True):
        ms = np.sort(samples[key]) / 1e6
        assert latency["n"] == len(ms) >= 70
        assert latency["p50"] == ms[len(ms) // 2]
        assert latency["p90"] == ms[int(0.9 * len(ms))]
        assert latency["mean"] == ms.mean()


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


def test_the_user_gets_words_on_stderr_and_json_on_stdout(finished):
    result = finished.kdpipe("run", "--json")
    document = json.loads(result.stdout)
    assert document["ran"] == []
    assert re.search(r"runs/tiny/benchmark/001/report/report\.html$", document["report"])
