"""The whole command line with the stand-in SDK in an environment of its own."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from stand_in_sdk import FAKES, install_stand_in, packages_of, release

WORDS = ("--set", "compile.backend=voyager", "--set", "calibrate.sensitivity=0")
TO_COMPILE = ("run", "--from", "calibrate", "--to", "compile", *WORDS)


@pytest.fixture
def sdk(finished, monkeypatch):
    """A finished emulated run beside a fresh SDK 1.7.0; the environment names its interpreter."""
    python = install_stand_in(finished.root / "sdk", "1.7.0")
    monkeypatch.setenv("KDPIPE_SDK_PYTHON", str(python))
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    return python


def other_release(python, version):
    for name in ("axelera-devkit", "axelera-rt"):
        packages = packages_of(python)
        folder = next(packages.glob(f"{name.replace('-', '_')}-*.dist-info"))
        (folder / "METADATA").unlink()
        folder.rmdir()
        release(packages, name, version)


def test_the_sdk_quantizes_and_compiles_and_its_figures_stand_beside_the_emulators(finished, sdk):
    result = finished.kdpipe(*TO_COMPILE)
    assert result.returncode == 0, result.stderr
    stages = finished.manifest["stages"]
    calibrate, compiled = stages["calibrate"]["facts"], stages["compile"]["facts"]
    assert (calibrate["backend"], calibrate["backend_version"]) == ("voyager", "1.7.0")
    for figures in (calibrate, calibrate["emulator"]):
        assert abs(figures["int8_loss_points"]) < 5
        assert figures["logits_sqnr_db"] > 15
    assert calibrate["emulator"]["logits_sqnr_db"] != calibrate["logits_sqnr_db"]
    assert compiled["runtime"] == "axelera"
    assert compiled["sdk"]["run"]["ran"] is True
    assert compiled["sdk"]["settings"]["quantization_scheme"] == calibrate["scheme"]
    assert (finished.artifact("compiled_model") / "student.axm").exists()
    assert finished.kdpipe("verify", *WORDS).returncode == 0
    # A run can move: nothing but the children's logs says where it was made.
    for path in finished.folder.rglob("*"):
        if (
            path.is_file()
            and path.suffix in (".json", ".toml", ".yaml")
            and "logs" not in path.parts
        ):
            assert str(finished.root) not in path.read_text(), path
    # A second run does nothing.
    assert "runs" not in finished.kdpipe(*TO_COMPILE).stderr


def test_a_compiler_that_fails_leaves_its_log_and_no_result(finished, sdk, monkeypatch):
    monkeypatch.setenv("FAKE_FAIL", "compile")
    before = finished.manifest["artifacts"]["compiled_model"]
    result = finished.kdpipe(*TO_COMPILE)
    assert result.returncode == 1
    last = finished.manifest["stages"]["compile"]["log"]
    assert f"failed   log: runs/tiny/{last}" in result.stderr
    words = "Voyager SDK 1.7.0 failed at compile: RuntimeError: the stand-in was told to fail"
    assert f"Error: {words} at compile" in result.stderr.splitlines()
    log = (finished.folder / last).read_text()
    assert "Running LowerFrontend" in log
    assert "Traceback (most recent call last)" in log
    assert finished.manifest["artifacts"]["compiled_model"] == before
    assert not list(finished.folder.glob("*.partial"))
    monkeypatch.delenv("FAKE_FAIL")
    result = finished.kdpipe(*TO_COMPILE)
    assert result.returncode == 0, result.stderr
    assert finished.manifest["artifacts"]["compiled_model"] != before


def test_mixed_releases_end_before_anything_starts(finished, sdk):
    packages = packages_of(sdk)
    folder = next(packages.glob("axelera_rt-*"))
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: axelera-rt\nVersion: 1.8.0\n")
    before = (finished.folder / "manifest.json").read_bytes()
    result = finished.kdpipe(*TO_COMPILE)
    assert result.returncode == 5
    assert "axelera-devkit 1.7.0 and axelera-rt 1.8.0 are of different releases" in result.stderr
    assert (finished.folder / "manifest.json").read_bytes() == before


@pytest.mark.slow
def test_the_config_names_the_interpreter_and_further_settings(finished, sdk, monkeypatch):
    monkeypatch.delenv("KDPIPE_SDK_PYTHON")
    finished.edit(
        "compile",
        to={"backend": "voyager", "sdk_python": "sdk/bin/python", "extra": {"tiling_depth": 6}},
    )
    result = finished.kdpipe("run", "--from", "calibrate", "--to", "compile")
    assert result.returncode == 0, result.stderr
    settings = finished.manifest["stages"]["compile"]["facts"]["sdk"]["settings"]
    assert settings["tiling_depth"] == 6
    # Where the interpreter lies changes nothing; a setting does.
    (finished.root / "sdk").rename(finished.root / "moved")
    for change, state in (
        ("compile.sdk_python=moved/bin/python", "fresh"),
        ("compile.extra={tiling_depth: 1}", "stale"),
    ):
        words = ("--set", "compile.sdk_python=moved/bin/python", "--set", change)
        status = json.loads(finished.kdpipe("status", "--json", *words).stdout)["stages"]
        assert status["calibrate"]["state"] == status["compile"]["state"] == state
    finished.edit("compile", "sdk_python", to="nowhere/python")
    result = finished.kdpipe("run", "--from", "calibrate", "--to", "compile", "--force")
    assert result.returncode == 5
    assert "nowhere/python (compile.sdk_python, $KDPIPE_SDK_PYTHON)" in result.stderr


@pytest.mark.slow
def test_every_scheme_is_tried_and_the_best_is_kept(finished, sdk):
    result = finished.kdpipe(*TO_COMPILE, "--set", "compile.try_schemes=all")
    assert result.returncode == 0, result.stderr
    facts = finished.manifest["stages"]["calibrate"]["facts"]
    rows = {row["scheme"]: row for row in facts["schemes"]}
    assert list(rows) == [
        "per_tensor_histogram",
        "per_tensor_min_max",
        "hybrid_per_tensor_per_channel",
    ]
    best = max(rows.values(), key=lambda row: (row["top1_val_int8"], row["logits_sqnr_db"]))
    assert [row["scheme"] for row in rows.values() if row["chosen"]] == [best["scheme"]]
    assert facts["scheme"] == best["scheme"]
    assert facts["top1_val_int8"] == best["top1_val_int8"]
    compiled = finished.manifest["stages"]["compile"]["facts"]
    assert compiled["sdk"]["settings"]["quantization_scheme"] == best["scheme"]
    assert finished.kdpipe("run", *WORDS, "--set", "compile.try_schemes=all").returncode == 0
    report = finished.artifact("benchmark_report")
    for name in ("report.md", "report.html"):
        text = (report / name).read_text()
        assert f"{best['scheme']} (used)" in text
        assert all(scheme in text for scheme in rows)


def test_ctrl_c_ends_the_compiler_and_says_so(finished, sdk, monkeypatch):
    monkeypatch.setenv("FAKE_HANG", "compile")
    process = subprocess.Popen(
        [Path(sys.executable).parent / "kdpipe", *TO_COMPILE],
        cwd=finished.root,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    deadline = time.monotonic() + 240
    while "time.sleep(600)" not in commands_of(sdk):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    os.kill(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=240)  # less than the 600 s that the compiler hangs
    assert process.returncode == 130, err
    assert "Traceback" not in err
    deadline = time.monotonic() + 120
    while commands_of(sdk):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert finished.manifest["stages"]["compile"]["status"] == "interrupted"
    assert not list(finished.folder.glob("*.partial"))


def commands_of(python):
    """Command lines of the processes that this interpreter runs."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                words = (entry / "cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            if words[0].decode() == str(python):
                found.append(b" ".join(words).decode())
    return "\n".join(found)


def test_doctor_shows_what_the_sdks_interpreter_and_the_card_have(finished, sdk, monkeypatch):
    found = json.loads(finished.kdpipe("doctor", "--json").stdout)
    voyager = found["backends"]["voyager"]
    assert voyager.startswith("available: axelera-devkit 1.7.0, axelera-rt 1.7.0")
    assert "python 3" in voyager
    assert found["sdk"] == {"interpreter": str(sdk), "axkernelcc": "found"}
    card = found["devices"]["metis-0:1:0"]
    assert card.startswith("board unknown, firmware stand-in, driver 1.6.2, link null (")
    assert card.endswith(
        "temperature null (axmonitor did not answer: CalledProcessError), "
        "power null (axmonitor did not answer: CalledProcessError)"
    )
    monkeypatch.setenv("FAKE_TEMPERATURE", "47")
    monkeypatch.setenv("FAKE_DRIVERLESS", "1")
    found = json.loads(finished.kdpipe("doctor", "--json").stdout)
    assert found["devices"]["metis-0:1:0"].endswith("47 C, 7.5 W")
    assert "driver null" in found["devices"]["metis-0:1:0"]
    monkeypatch.setenv("FAKE_FAIL", "list")
    (sdk.parent / "axkernelcc").unlink()
    found = json.loads(finished.kdpipe("doctor", "--json").stdout)
    assert "told to fail at list" in found["devices"]["axelera.runtime"]
    assert found["sdk"]["axkernelcc"] == "not found; compiling needs it"


def test_make_metis_ends_with_6_without_a_card_and_what_was_compiled_stays(
    finished, sdk, monkeypatch
):
    monkeypatch.setenv("FAKE_DEVICES", "0")
    result = finished.kdpipe("run", *WORDS)
    assert result.returncode == 6, result.stderr
    assert "Error: kdbench.py ended with 6: no device" in result.stderr
    states = json.loads(finished.kdpipe("status", "--json", *WORDS).stdout)["stages"]
    assert {name: entry["state"] for name, entry in states.items()} == {
        "ingest": "fresh",
        "distill": "fresh",
        "calibrate": "fresh",
        "compile": "fresh",
        "benchmark": "failed",
    }
    assert finished.manifest["stages"]["compile"]["facts"]["sdk"]["run"] == {
        "ran": False,
        "why": "no device",
    }
    # The card comes: nothing is compiled again.
    monkeypatch.delenv("FAKE_DEVICES")
    result = finished.kdpipe("run", *WORDS)
    assert result.returncode == 0, result.stderr
    assert "compile    fresh" in result.stderr
    assert finished.manifest["stages"]["benchmark"]["facts"]["measured_on"] == "device"
    another_release_makes_stale_what_it_made_and_measured(finished, sdk)


def another_release_makes_stale_what_it_made_and_measured(finished, sdk):
    other_release(sdk, "1.8.0")
    status = json.loads(finished.kdpipe("status", "--json", *WORDS).stdout)["stages"]
    reasons = {n: entry["reason"] for n, entry in status.items() if entry["state"] != "fresh"}
    devkit = "axelera-devkit was 1.7.0, now 1.8.0"
    assert reasons == {
        "calibrate": devkit,
        "compile": devkit,
        "benchmark": "axelera-rt was 1.7.0, now 1.8.0",
    }
    folder = next(packages_of(sdk).glob("axelera_rt-*.dist-info"))
    (folder / "METADATA").unlink()  # the box has no runtime: what was measured there stays
    status = json.loads(finished.kdpipe("status", "--json", *WORDS).stdout)["stages"]
    assert status["benchmark"]["reason"] == f"calibrate comes first and is stale: {devkit}"


@pytest.mark.slow
@pytest.mark.parametrize("route", ["axcompile", "deploy"])
def test_the_other_routes_give_artifacts_that_the_benchmark_takes(
    finished, sdk, monkeypatch, route
):
    monkeypatch.setenv("AXELERA_FRAMEWORK", str(FAKES / "framework"))
    result = finished.kdpipe("run", *WORDS, "--set", f"compile.route={route}")
    assert result.returncode == 0, result.stderr
    facts = finished.manifest["stages"]["compile"]["facts"]
    assert facts["sdk"]["route"] == route
    assert facts["runtime"] == "axelera"
