"""Killed, interrupted, doubled: the run folder always tells the truth and goes on."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

COMMAND = [Path(sys.executable).parent / "kdpipe", "run"]
STAGES = ("ingest", "distill", "calibrate", "compile", "benchmark")


def start(project, *words):
    return subprocess.Popen(
        [*COMMAND, *words],
        cwd=project.root,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def wait_for(project, stage, status="running", seconds=120):
    """Until the manifest says that a stage has this status."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            if project.manifest["stages"][stage]["status"] == status:
                return
        except (OSError, KeyError):
            pass
        time.sleep(0.01)
    raise TimeoutError(stage)


def finishes(project):
    """`kdpipe run` does what is left."""
    result = project.kdpipe("run")
    assert result.returncode == 0, result.stderr
    assert set(project.states().values()) == {"fresh"}
    assert not list(project.folder.glob("*.partial"))


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_killed_in_the_middle_leaves_the_good_ones(finished, stage):
    before = {n: a["sha256"] for n, a in finished.manifest["artifacts"].items()}
    process = start(finished, "--from", stage, "--force")
    wait_for(finished, stage)
    time.sleep(random.uniform(0, 0.3))
    children = descendants(process.pid)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert not [pid for pid in children if running(pid)]
    assert finished.states()[stage] in ("interrupted", "fresh")
    # What was made before is byte for byte what it was, and still named.
    assert finished.kdpipe("verify").returncode == 0
    now = {n: a["sha256"] for n, a in finished.manifest["artifacts"].items()}
    assert {n: now[n] for n in before if finished.manifest["artifacts"][n]["stage"] != stage} == {
        n: d for n, d in before.items() if finished.manifest["artifacts"][n]["stage"] != stage
    }
    finishes(finished)


@pytest.mark.slow
def test_killed_at_twenty_random_moments(project):
    chance = random.Random(5)
    hits = []
    for _ in range(20):
        process = start(project, *(("--force",) if not hits or chance.random() < 0.5 else ()))
        time.sleep(chance.uniform(0.3, 14))
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
        if (project.folder / "manifest.json").exists():
            stages = json.loads((project.folder / "manifest.json").read_text())["stages"]
            hits += [name for name, record in stages.items() if record["status"] == "running"]
            assert project.kdpipe("verify").returncode == 0
    finishes(project)


@pytest.mark.parametrize(
    ("number", "status", "stage"),
    [
        (signal.SIGINT, 130, "distill"),
        (signal.SIGINT, 130, "benchmark"),
        pytest.param(signal.SIGTERM, 143, "distill", marks=pytest.mark.slow),
    ],
)
def test_an_interrupted_run_says_so_and_leaves_no_child(finished, number, status, stage):
    # Long enough to be met in its middle: training under way, kdbench measuring.
    change, sign = {
        "distill": ("distill.epochs=500", "scratch/distill-*/student/metrics.csv"),
        "benchmark": ("benchmark.min_seconds=60", "benchmark.partial/bundle/bundle.json"),
    }[stage]
    process = start(finished, "--stage", stage, "--set", change)
    wait_for(finished, stage)
    while not list(finished.folder.glob(sign)):
        time.sleep(0.05)
    time.sleep(1)
    children = descendants(process.pid)
    os.kill(process.pid, number)
    _, err = process.communicate(timeout=120)  # the status says that it did not run to its end
    assert process.returncode == status, err
    assert "Traceback" not in err
    assert err.rstrip().endswith("Error: interrupted; `kdpipe run` does what is left")
    assert not [pid for pid in children if running(pid)]
    status = json.loads(finished.kdpipe("status", "--json", "--set", change).stdout)
    assert status["stages"][stage]["state"] == "interrupted"
    assert finished.manifest["stages"][stage]["status"] == "interrupted"
    assert not list(finished.folder.glob("*.partial"))
    finishes(finished)


def running(pid):
    """Whether a process is still at work after its parent went; a busy machine may take a while."""
    for _ in range(300):
        try:
            if (Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split())[0] == "Z":
                return False
        except OSError:
            return False
        time.sleep(0.1)
    return True


def descendants(parent):
    """All children of a process, and theirs."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if int(fields[1]) == parent:
                found += [int(entry.name), *descendants(int(entry.name))]
    return found


def test_two_at_once_one_works_and_the_other_names_it(finished):
    first = start(finished, "--stage", "distill", "--force")
    wait_for(finished, "distill")
    # The first stands still meanwhile: it can't end too early, and waiting for it would not end.
    os.kill(first.pid, signal.SIGSTOP)
    second = finished.kdpipe("run", "--stage", "distill", "--force")
    assert second.returncode == 3
    assert f"runs/tiny is in use by another kdpipe (pid {first.pid} since" in second.stderr
    state = json.loads(finished.kdpipe("status", "--json").stdout)["stages"]["distill"]
    assert state["state"] == "running"
    assert state["reason"].startswith(f"it runs now (pid {first.pid} since")
    os.kill(first.pid, signal.SIGCONT)
    first.communicate(timeout=120)
    assert first.returncode == 0
    finishes(finished)
