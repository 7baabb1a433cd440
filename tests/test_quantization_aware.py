"""The last epochs on the int8 grid, through the command line."""

import csv
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import onnx
import pytest
from safetensors.numpy import load_file, save_file
from tiny_project import Project, write_project

from metis.graph.edit import constants_of

LAST = {"share": 0.34, "learning_rate": 1e-3, "control": True}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    project = write_project(tmp_path_factory.mktemp("grid") / "project")
    project.edit("distill", "epochs", to=6)
    project.edit("distill", "quantization_aware", to=LAST)
    result = project.kdpipe("run", "--to", "compile", "--debug")
    assert result.returncode == 0, result.stderr
    return project


@pytest.fixture
def trained(made, tmp_path):
    root = tmp_path / "project"
    shutil.copytree(made.root, root)
    return Project(root)


def facts(project):
    return project.manifest["stages"]["distill"]["facts"]


def test_before_after_and_control_are_in_the_record(made):
    found = facts(made)
    before, after, control = (
        found["quantization_aware"][n] for n in ("before", "after", "control")
    )
    assert (before["epochs"], after["epochs"], control["epochs"]) == (4, 2, 2)
    assert found["epochs"] == 6
    assert found["steps"] == before["steps"] + after["steps"]
    assert after["steps"] == control["steps"]
    assert found["top1_val"] == after["top1_val"]
    for part in (before, after, control):
        assert part["measured_on"] == "host-float"
        assert part["int8"]["measured_on"] == "host-emulation"
        assert part["int8"]["n"] == part["n_val"] == 60
        assert part["export"]["max_abs_logit_difference"] < 1e-4
        low, high = part["int8"]["loss_interval95_points"]
        assert low <= part["int8"]["loss_points"] <= high


def test_what_comes_out_is_a_float_graph_with_other_weights(made):
    training = made.artifact("training")
    student, folded, control = (
        onnx.load(path)
        for path in (made.artifact("student"), training / "folded.onnx", training / "control.onnx")
    )
    kinds = [node.op_type for node in student.graph.node]
    assert kinds == [node.op_type for node in folded.graph.node]
    assert not {"BatchNormalization", "QuantizeLinear", "DequantizeLinear"} & set(kinds)
    weights = [constants_of(model) for model in (student, folded, control)]
    assert len({tuple(w) for w in weights}) == 1
    moved = [n for n in weights[0] if not np.array_equal(weights[0][n], weights[1][n])]
    assert moved
    # The control starts from the same weights, sees the same batches, and ends elsewhere.
    assert any(not np.array_equal(weights[0][n], weights[2][n]) for n in moved)


def test_both_parts_leave_their_history(made):
    training = made.artifact("training")
    rows = {
        name: list(csv.DictReader((training / f"{name}metrics.csv").read_text().splitlines()))
        for name in ("float-", "", "control-")
    }
    assert [len(found) for found in rows.values()] == [4, 2, 2]
    assert float(rows[""][0]["lr"]) < 1e-3
    assert {"hard_loss", "soft_loss"} <= set(rows[""][0])


@pytest.mark.slow
def test_the_export_leg_finds_a_changed_weight_of_a_folded_student(trained):
    whole = trained.kdpipe("verify", "--parity")
    assert whole.returncode == 0, whole.stderr
    assert "export  passed" in whole.stdout
    path = trained.artifact("training") / "student.safetensors"
    weights = load_file(path)
    head = next(name for name, value in weights.items() if value.ndim == 2)
    save_file({**weights, head: weights[head] * 1.1}, path)
    trained.redo_digest("training")
    broken = trained.kdpipe("verify", "--parity")
    assert broken.returncode == 4
    assert "export  FAILED" in broken.stdout


@pytest.mark.slow
def test_a_kill_in_the_last_part_costs_nothing_of_the_first(trained):
    digest = trained.manifest["artifacts"]["student"]["sha256"]
    command = [Path(sys.executable).parent / "kdpipe", "run", "--stage", "distill", "--force"]
    child = subprocess.Popen(
        command, cwd=trained.root, stderr=subprocess.DEVNULL, start_new_session=True
    )
    deadline = time.monotonic() + 240
    sign = "scratch/distill-*/quantization_aware/checkpoints/last-epoch=0.ckpt"
    while not list(trained.folder.glob(sign)):
        assert time.monotonic() < deadline
        assert child.poll() is None
        time.sleep(0.02)
    os.killpg(child.pid, signal.SIGKILL)
    child.wait()
    first = next(trained.folder.glob("scratch/distill-*/student/student.safetensors"))
    written = first.stat().st_mtime_ns
    child = subprocess.Popen(command[:-1], cwd=trained.root, stderr=subprocess.DEVNULL)
    while child.poll() is None and first.exists():
        assert first.stat().st_mtime_ns == written
        time.sleep(0.05)
    assert child.wait() == 0
    found = facts(trained)["quantization_aware"]
    assert found["before"]["resumed_after_epoch"] is None
    assert found["after"]["resumed_after_epoch"] == 1
    assert trained.manifest["artifacts"]["student"]["sha256"] == digest
