import csv
import json
import statistics

import numpy as np
import pytest
from tiny_project import make_teacher, write_project

from pipeline.reports.compare_runs import COLUMNS, NetworkRow, summarize
from pipeline.reports.confusion import Confusion
from pipeline.tasks.task import open_task


def read(folder):
    lines = (folder / "comparison.csv").read_text().splitlines()
    return {row["network"]: row for row in csv.DictReader(lines)}


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """Two seeds with a baseline, one of them calibrated, and the table of both."""
    project = write_project(tmp_path_factory.mktemp("compared") / "project")
    project.edit("distill", "baselines", to=["no_teacher"])
    dense_a = project.root / "teachers" / "dense_a.onnx"
    make_teacher(dense_a, (0, 1, 2), project.contract, batch=7, external="weights.bin")
    for seed, last in ((3, "calibrate"), (4, "distill")):
        words = ("--run", f"seed{seed}", "--set", f"seed={seed}", "--to", last)
        result = project.kdpipe("run", *words)
        assert result.returncode == 0, result.stderr
    result = project.kdpipe("compare", "seed3", "seed4")
    assert result.returncode == 0, result.stderr
    return project, result.stdout


def test_every_network_has_its_row_and_every_column_its_value(compared):
    project, text = compared
    folder = project.root / "runs" / "comparison"
    assert (folder / "comparison.md").read_text() == text
    rows = read(folder)
    assert list(rows) == [
        "teacher dense_a",
        "teacher dense_b",
        "teacher ensemble",
        "test_byobnet, distilled",
        "test_byobnet, without teacher",
    ]
    student = rows["test_byobnet, distilled"]
    assert (student["runs"], student["n"], student["measured_on"]) == ("2", "60", "host-float")
    assert float(student["parameters"]) > 1e5
    assert float(student["macs"]) > 1e5
    assert 0 <= float(student["ece"]) <= 1
    assert student["top1_int8"] == ""  # only one of the two runs has it
    names = [name.replace("score", "top1") for name in COLUMNS if "int8" not in name]
    teacher = {name: float(rows["teacher dense_a"][name]) for name in names}
    assert (teacher["parameters"], teacher["macs"]) == (3 * 3 + 3, 3 * 3)  # of one patch, not of 7
    files = [project.root / "teachers" / name for name in ("dense_a.onnx", "weights.bin")]
    assert teacher["onnx_bytes"] == sum(file.stat().st_size for file in files)
    assert teacher["latency_ms"] > 0
    assert float(rows["teacher ensemble"]["parameters"]) == 24
    assert "takes " in text  # this student is larger than its teachers
    assert (folder / "comparison.png").read_bytes()[:4] == b"\x89PNG"


def test_seeds_become_mean_and_standard_deviation(compared):
    project, _ = compared
    single = []
    for name in ("seed3", "seed4"):
        out = project.root / name
        assert project.kdpipe("compare", name, "--out", str(out)).returncode == 0
        rows = read(out)
        single.append(float(rows["test_byobnet, distilled"]["top1"]))
        assert rows["test_byobnet, distilled"]["top1_sd"] == ""
    folder = project.root / "runs" / "comparison"
    rows = read(folder)
    both = rows["test_byobnet, distilled"]
    assert float(both["top1"]) == pytest.approx(statistics.mean(single))
    assert float(both["top1_sd"]) == pytest.approx(statistics.stdev(single))
    assert {name.replace("score", "top1") for name in COLUMNS} <= set(both)


def test_runs_that_differ_in_more_than_their_seed_keep_rows_of_their_own():
    task = open_task("classification")
    confusion = Confusion(("a", "b"), np.eye(2, dtype=np.int64))

    def row(group, name, run, seed, score):
        return NetworkRow(group, name, run, seed, task, 2, {"score": score}, confusion, ())

    rows = [
        row(group, name, run, seed, score)
        for run, seed, t, score in (("x1", 1, 2, 0.5), ("y1", 1, 4, 0.6), ("x2", 2, 2, 0.7))
        for group, name in (("files", "teacher"), (f"files, T {t}", "student"))
    ]
    found = {summary.name: summary for summary in summarize(rows)}
    assert list(found) == ["teacher", "student [x1, x2]", "student [y1]"]
    assert found["student [x1, x2]"].mean["score"] == pytest.approx(0.6)
    # x1 and y1 share seed and teacher: that is one figure, not two.
    assert (found["teacher"].runs, found["teacher"].of) == (2, ("x1", "y1", "x2"))


def test_confusions_count_every_decision_of_all_seeds(compared):
    project, _ = compared
    folder = project.root / "runs" / "comparison"
    assert (folder / "confusion.png").read_bytes()[:4] == b"\x89PNG"
    counted = list(csv.DictReader((folder / "confusion.csv").read_text().splitlines()))
    classes = json.loads((project.root / "preprocessing.json").read_text())["labels"]
    for name, row in read(folder).items():
        own = [cell for cell in counted if cell["network"] == name]
        assert {cell["label"] for cell in own} == {cell["decision"] for cell in own} == set(classes)
        total = sum(int(cell["n"]) for cell in own)
        right = sum(int(cell["n"]) for cell in own if cell["label"] == cell["decision"])
        assert total == int(row["runs"]) * int(row["n"])
        assert right / total == pytest.approx(float(row["top1"]))


def test_the_first_decisions_are_listed_one_by_one(compared):
    project, _ = compared
    folder = project.root / "runs" / "comparison"
    listed = list(csv.DictReader((folder / "decisions.csv").read_text().splitlines()))
    student = [row for row in listed if row["network"].endswith(", distilled")]
    assert len({(row["seed"], row["row"]) for row in student}) == len(student)
    assert len(student) % 5 == 0
    assert all(1 / 3 <= float(row["probability"]) <= 1 for row in student)
    assert {row["label"] for row in listed} | {row["decision"] for row in listed} <= {
        row["label"] for row in csv.DictReader((folder / "confusion.csv").read_text().splitlines())
    }


def test_a_calibrated_run_shows_its_int8_figures(compared):
    project, _ = compared
    out = project.root / "one"
    text = project.kdpipe("compare", "seed3", "--out", str(out)).stdout
    rows = read(out)
    manifest = json.loads((project.root / "runs" / "seed3" / "manifest.json").read_text())
    facts = manifest["stages"]["calibrate"]["facts"]
    assert float(rows["test_byobnet, distilled"]["top1_int8"]) == facts["top1_val_int8"]
    assert float(rows["test_byobnet, distilled"]["int8_bytes"]) > 1000
    assert "host-float" in text


def test_a_run_that_is_not_there_is_named(compared):
    project, _ = compared
    result = project.kdpipe("compare", "seed5")
    assert result.returncode == 3
    assert "there is no run 'seed5'; did you mean 'seed" in result.stderr
