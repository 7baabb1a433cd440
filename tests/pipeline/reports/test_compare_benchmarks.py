"""kdpipe compare of two benchmark reports."""

import json
import shutil

import numpy as np
import pytest


@pytest.fixture
def reports(finished):
    """Two copies of a finished run's report folder, in which both verdicts are VALID."""
    folders = []
    for name in ("a", "b"):
        folder = finished.root / name
        shutil.copytree(finished.artifact("benchmark_report"), folder)
        folders.append(folder)
        quieten(folder)
        edit(folder, "verdict", to={"word": "VALID", "reasons": []})
        edit(folder, "started", to=f"2026-01-0{len(folders)}T00:00:00Z")
    return folders


def edit(folder, *path, to):
    tree = json.loads((folder / "report.json").read_text())
    here = tree["measurement"]
    for key in path[:-1]:
        here = here[key]
    here[path[-1]] = to
    (folder / "report.json").write_text(json.dumps(tree))


def quieten(folder):
    """Times within 5 %, whatever else this machine did when it measured."""
    random = np.random.default_rng(0)
    with np.load(folder / "samples.npz") as archive:
        samples = {**archive}
    size, frames = len(samples["all_ns"]), len(samples["offline_single_0_done_ns"])
    samples["run_ns"] = random.integers(950_000, 1_050_000, size)
    samples["all_ns"] = samples["run_ns"] + random.integers(190_000, 210_000, size)
    samples["offline_single_0_done_ns"] = random.integers(950_000, 1_050_000, frames).cumsum()
    np.savez(folder / "samples.npz", **samples)


def compare(project, *names):
    return project.kdpipe("compare", *(f"{name}/report.json" for name in names))


def test_a_report_with_itself_shows_no_difference(finished):
    shutil.copytree(finished.artifact("benchmark_report"), finished.root / "a")
    result = compare(finished, "a", "a")  # a SMOKE run; as a control it may be compared
    assert result.returncode == 0, result.stderr
    rows = [line for line in result.stdout.splitlines() if " ratio " in line]
    assert len(rows) == 7  # three scopes, p50 and p90 each, and throughput
    for row in rows:
        assert "ratio 1.00" in row
        assert row.endswith("no difference shown  [host-emulation]")
    assert "a SMOKE run compared with itself" in result.stdout


def test_every_difference_is_listed(finished, reports):
    _, folder = reports
    edit(folder, "aipu_cores", to=4)
    edit(folder, "test_set", to="0" * 64)
    tree = json.loads((folder / "report.json").read_text())
    tree["measurement"]["latency"][1]["scope"] = "camera to result"
    (folder / "report.json").write_text(json.dumps(tree))
    result = compare(finished, "a", "b")
    assert result.returncode == 4
    for words in ("AIPU cores: 1 against 4", "dataset (test split): ", "scopes: runtime call, "):
        assert words in result.stderr
    assert result.stdout == ""


def as_if_from_a_device(folder, **changes):
    tree = json.loads((folder / "report.json").read_text())
    text = json.dumps(tree["measurement"]).replace("host-emulation", "device")
    tree["measurement"] = json.loads(text.replace('"onnxruntime"', '"axelera"'))
    tree["accuracy"][-1]["figure"]["measured_on"] = "device"
    (folder / "report.json").write_text(json.dumps(tree))
    edit(folder, "device", to={"name": "metis-0:1:0", "firmware_version": "1.6.2", **changes})


def test_an_emulation_is_not_compared_with_a_device(finished, reports):
    as_if_from_a_device(reports[1])
    result = compare(finished, "a", "b")
    assert result.returncode == 4
    assert "measured_on: host-emulation against device" in result.stderr


def test_smoke_runs_are_not_compared(finished, reports):
    edit(reports[1], "verdict", to={"word": "SMOKE", "reasons": ["asked for 5 s"]})
    result = compare(finished, "a", "b")
    assert result.returncode == 4
    assert "verdict of b/report.json: SMOKE (asked for 5 s)" in result.stderr


def test_a_slower_run_is_shown_as_slower(finished, reports):
    folder = reports[1]
    with np.load(folder / "samples.npz") as archive:
        samples = {**archive}
    for name in ("run_ns", "all_ns", "offline_single_0_done_ns"):
        samples[name] = samples[name] * 3
    np.savez(folder / "samples.npz", **samples)
    tree = json.loads((folder / "report.json").read_text())
    for row in tree["measurement"]["latency"]:
        for name in ("p50", "p90"):
            row[name] = row[name] and row[name] * 3
    (mode,) = tree["measurement"]["throughput_modes"]
    mode["value"] /= 3
    (folder / "report.json").write_text(json.dumps(tree))
    rows = [line for line in compare(finished, "a", "b").stdout.splitlines() if "ratio" in line]
    assert all("ratio 3.00" in row and "is higher" in row for row in rows[:-1])
    assert "ratio 0.33" in rows[-1]
    assert "is lower" in rows[-1]


def test_what_may_explain_a_difference_is_noted(finished, reports):
    for folder in reports:
        as_if_from_a_device(folder)
        edit(folder, "heat_before", "temperature_c", to=40.0)
    notes = [line for line in compare(finished, "a", "b").stdout.splitlines() if "note: " in line]
    assert [note for note in notes if "fewer than 3 repeats" not in note] == []
    assert len(notes) == 2
    as_if_from_a_device(reports[1], firmware_version="1.7.0")
    edit(reports[1], "link", "width", to=2)
    edit(reports[1], "link", "speed", to="2.5 GT/s PCIe")
    for degrees, warned in ((45.0, False), (45.5, True), (34.0, True)):
        edit(reports[1], "heat_before", "temperature_c", to=degrees)
        result = compare(finished, "a", "b")
        assert result.returncode == 0, result.stderr
        assert "note: firmware: 1.6.2 against 1.7.0" in result.stdout
        assert "note: PCIe width: None against 2" in result.stdout
        assert "note: PCIe speed: None against 2.5 GT/s PCIe" in result.stdout
        noted = f"note: start temperature: 40.0 C against {degrees} C" in result.stdout
        assert noted == warned


def test_a_difference_within_that_of_repeats_is_none(finished, reports):
    def row():
        lines = compare(finished, "a", "b").stdout.splitlines()
        return next(line for line in lines if "single buffering" in line and " ratio " in line)

    with np.load(reports[1] / "samples.npz") as archive:
        samples = {**archive}
    samples["offline_single_0_done_ns"] = samples["offline_single_0_done_ns"] * 2
    np.savez(reports[1] / "samples.npz", **samples)
    value = json.loads((reports[1] / "report.json").read_text())["measurement"]["throughput"]
    edit(reports[1], "throughput_modes", 0, "value", to=value["value"] / 2)
    assert "repeats within null: the second is lower" in row()
    edit(reports[0], "stability", "spread_throughput", to=0.51)
    assert "repeats within 51.0 %: no difference shown" in row()


def test_what_is_no_report_is_named(finished, reports):
    (reports[0] / "samples.npz").unlink()
    result = compare(finished, "a", "b")
    assert (result.returncode, "a/report.json can't be compared" in result.stderr) == (3, True)
    result = compare(finished, "b")
    assert (result.returncode, "give two report.json" in result.stderr) == (2, True)
