"""kdbench on a device, as far as a strict stand-in of axelera.runtime can show."""

import json
import os
import time
from pathlib import Path

import numpy as np
import pytest

FAKES = Path(__file__).parents[1] / "fakes"
PATH = f"{FAKES / 'bin'}{os.pathsep}{os.environ['PATH']}"


@pytest.mark.parametrize(("batch", "ends"), [(1, False), (1, True), (2, True), (4, False)])
def test_a_device_gives_the_hosts_logits_in_both_scenarios(for_metis, batch, ends):
    found = for_metis(batch=batch, ends=ends).measured()
    assert found["measured_on"] == "device"
    assert found["device"]["name"] == "metis-0:1:0"
    assert found["runtime_version"] == "axelera-rt 0-stand-in"
    assert found["instances"] == 4 // batch
    assert found["host_graphs"] == {"preamble": ends, "postamble": ends}
    assert "within 0 steps" in found["checks"][2]["detail"]
    scopes = [mode["scope"].rpartition(", ")[2] for mode in found["throughput_modes"]]
    assert scopes == ["single buffering", "double buffering"]
    audits = {audit["scope"]: audit for audit in found["audit"]}
    assert set(audits) == {"SingleStream", *(f"Offline, {scope}" for scope in scopes)}
    assert all(audit["kept"] and not audit["different"] for audit in audits.values())
    assert found["verdict"]["word"] == "SMOKE"


def test_the_throughput_is_that_of_the_faster_buffering(for_metis, tmp_path):
    found = for_metis().measured(
        "--scenario=offline",
        f"--samples={tmp_path / 's.npz'}",
        FAKE_LATENCY_MS=10,
    )
    single, double = found["throughput_modes"]
    assert found["throughput"] == max(single, double, key=lambda mode: mode["value"])
    samples = np.load(tmp_path / "s.npz")
    for mode, name in ((single, "single"), (double, "double")):
        done = samples[f"offline_{name}_0_done_ns"]
        assert (mode["n"], mode["value"]) == (len(done), len(done) / (done[-1] / 1e9))
        # Four instances that take 10 or 8 ms can't answer more; answers of the warm-up don't count.
        assert mode["value"] < 4 / (0.01 if name == "single" else 0.008)


def test_a_longer_run_of_the_device_is_seen_in_the_runtime_call_alone(for_metis):
    longer = 50
    found = for_metis().measured("--scenario=single-stream", FAKE_LATENCY_MS=longer)
    # The fastest query: the others may wait for whatever else this machine does.
    call, whole, around = (row["min"] for row in found["latency"])
    assert call >= longer
    assert call + around <= whole + 1e-9  # ms; a sum of decimals is rounded
    # If it were in what is around the call, no query could be faster there.
    assert around < longer


@pytest.mark.parametrize(
    ("environment", "status", "words"),
    [
        ({"FAKE_DEVICES": 0}, 6, "no device: axelera.runtime lists none"),
        ({"FAKE_BUSY": 1}, 6, "DeviceInUse: 1 cores wanted, 4 free; another process holds"),
        ({"FAKE_FAIL": "connect"}, 6, "metis-0:1:0 does not connect: InternalError"),
        ({"FAKE_FAIL": "load"}, 1, "model/model.json does not load: InternalError: the stand-in"),
        ({"FAKE_FAIL": "instance"}, 1, "the model does not load on the device: InternalError"),
        ({"FAKE_FAIL": "run"}, 6, "the device failed while running: InternalError"),
    ],
)
def test_each_way_to_fail_is_one_line_with_the_runtimes_own_words(
    for_metis, environment, status, words
):
    result = for_metis().kdbench(**environment)
    assert result.returncode == status
    assert words in result.stderr
    assert "Traceback" not in result.stderr
    assert result.stdout == ""


def test_a_device_is_chosen_by_name(for_metis):
    bundle = for_metis()
    result = bundle.kdbench("--device=metis-0:9:0")
    assert result.returncode == 6
    assert "no device 'metis-0:9:0'; there are metis-0:1:0" in result.stderr
    for name in ("metis-0:2:0", "metis-0-2-0"):
        found = bundle.measured(f"--device={name}", "--scenario=single-stream", FAKE_DEVICES=2)
        assert found["device"]["name"] == "metis-0:2:0"


def test_a_model_of_another_release_is_told_with_both_releases(for_metis):
    bundle = for_metis()
    bundle.edit("bundle.json", backend="voyager 1.7.0")
    bundle.edit("model/model.json", axmodel=4)
    assert bundle.measured(FAKE_RELEASE="1.7.0")["compiled_by"] == "voyager 1.7.0"
    result = bundle.kdbench(FAKE_OLDEST=5, FAKE_RELEASE="1.8.0")
    assert result.returncode == 1
    assert (
        "model/model.json does not load (compiled by voyager 1.7.0, here is axelera-rt 1.8.0: "
        "compile again with this release, or install that one): InternalError: Unsupported model "
        "version: 4.0, expected at least 5.0"
    ) in result.stderr


def test_a_missing_runtime_is_named(for_metis, tmp_path):
    result = for_metis().kdbench(fakes=tmp_path)
    assert result.returncode == 5
    assert "axelera.runtime does not load" in result.stderr
    assert "axelera-rt" in result.stderr


def test_a_part_for_the_host_without_onnxruntime_says_so(for_metis):
    assert for_metis().kdbench(FAKE_HIDE=1).returncode == 0
    result = for_metis(ends=True).kdbench(FAKE_HIDE=1)
    assert result.returncode == 5
    assert "Error: onnxruntime is not installed, and pre.onnx needs it" in result.stderr


def test_another_model_on_the_device_than_in_the_bundle_is_caught(for_metis):
    bundle = for_metis()
    manifest = json.loads((bundle.folder / "model" / "manifest.json").read_text())
    scale, zero_point = manifest["quantize_params"][0]
    bundle.edit("model/manifest.json", quantize_params=[[scale, zero_point + 1]])
    result = bundle.kdbench()
    assert result.returncode == 4
    assert "the model's input has zero_point" in result.stderr


def test_answers_that_come_later_than_documented_are_invalid(for_metis):
    result = for_metis().kdbench("--json", FAKE_DELAY=3)
    assert result.returncode == 7
    (reason,) = json.loads(result.stdout)["verdict"]["reasons"]
    assert "kept answers of Offline, double buffering differ" in reason


def test_a_runtime_that_keeps_answers_is_invalid(for_metis):
    bundle = for_metis()
    words = ("--scenario=single-stream", "--min-seconds=0.5")
    # Long beside what the host adds. Noise as often helps one kind of sample as the other, so even
    # if there were nothing else, ten of eleven rounds beyond the limit would be one run in 170.
    honest = bundle.measured(*words, FAKE_LATENCY_MS=10)
    assert honest["repetition"]["low"] < honest["repetition"]["limit"] == 1.1
    assert honest["verdict"]["word"] == "SMOKE"
    found = bundle.measured(*words, FAKE_LATENCY_MS=10, FAKE_CACHE=1)
    assert found["verdict"]["word"] == "INVALID"
    (reason,) = found["verdict"]["reasons"]
    assert reason.startswith("the same sample again is answered ")
    assert "something keeps answers" in reason
    # Answers themselves are right, so nothing else could tell.
    assert not any(audit["different"] for audit in found["audit"])


def link(folder, width, device="0000:01:00.0", widest=4):
    place = folder / "bus/pci/devices" / device
    place.mkdir(parents=True)
    for name, value in {
        "vendor": "0x1f9d",
        "current_link_width": width,
        "max_link_width": widest,
        "current_link_speed": "8.0 GT/s PCIe",
        "max_link_speed": "8.0 GT/s PCIe",
    }.items():
        (place / name).write_text(f"{value}\n")


def test_a_narrow_link_is_invalid(for_metis, tmp_path):
    link(tmp_path / "sys", 1)
    result = for_metis().kdbench(f"--sysfs={tmp_path / 'sys'}", "--json")
    assert result.returncode == 7
    found = json.loads(result.stdout)
    assert (found["link"]["width"], found["link"]["max_width"]) == (1, 4)
    assert found["verdict"]["word"] == "INVALID"
    assert found["verdict"]["reasons"][0].startswith("PCIe link is x1, the card can x4")


def test_with_two_cards_the_link_is_that_of_the_one_that_is_measured(for_metis, tmp_path):
    link(tmp_path / "sys", 4, "0000:01:00.0")
    link(tmp_path / "sys", 2, "0000:02:00.0", widest=2)
    found = for_metis().measured(
        f"--sysfs={tmp_path / 'sys'}", "--device=metis-0:2:0", FAKE_DEVICES=2
    )
    assert (found["link"]["width"], found["verdict"]["word"]) == (2, "SMOKE")


def test_heat_and_power_are_read_each_second_while_measuring(for_metis, tmp_path):
    samples, bundle = tmp_path / "s.npz", for_metis()
    for seconds in (3.4, 15, 60):  # who reads comes last on a busy machine, and misses seconds
        begin = time.monotonic()
        found = bundle.measured(
            "--scenario=single-stream", f"--min-seconds={seconds}", f"--samples={samples}",
            FAKE_TEMPERATURE=61, FAKE_POWER=8, PATH=PATH,
        )  # fmt: skip
        elapsed = time.monotonic() - begin
        if found["passes"][0]["hottest_c"] is not None:  # three readings
            break
    for when in ("heat_before", "heat_after"):
        assert (found[when]["temperature_c"], found[when]["power_w"]) == (61, 8)
        assert found[when]["clocks"]["clock_profile"] == "800"
    assert found["verdict"]["word"] == "SMOKE"
    watched, (run,) = found["heat_during"], found["passes"]
    assert watched["source"] == "axmonitor, each second"
    assert 3 <= watched["n"] <= 1 + elapsed
    assert (watched["coolest_c"], watched["hottest_c"], watched["throttling"]) == (61, 61, False)
    assert 0 < watched["cpu_share"] < 1  # one program after the other, and waiting in between
    assert "not_readable" in watched["clocks"]
    assert (run["hottest_c"], run["power_w"]) == (61, 8)
    assert run["energy_mj"] == pytest.approx(8e3 * run["seconds"] / run["frames"])
    with np.load(samples) as raw:
        assert len(raw["heat_ns"]) == watched["n"]
        assert (raw["heat_c"] == 61).all()
        assert raw["repeat_starts_ns"][0] == pytest.approx(1e9 * run["start_s"])


def test_of_two_cards_the_measured_one_is_watched(for_metis, tmp_path):
    tool = tmp_path / "axmonitor"
    tool.write_text(
        "#!/bin/sh\nprintf 'metis-0-1-0\\n Core Temp: 99 C\\nmetis-0-2-0\\n Core Temp: 41 C\\n'\n"
    )
    tool.chmod(0o755)
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    found = for_metis().measured("--device=metis-0:2:0", FAKE_DEVICES=2, PATH=path)
    assert found["heat_before"]["temperature_c"] == 41
    assert found["heat_before"]["reason"] == "axmonitor shows no power"


def test_a_clock_that_somebody_set_meanwhile_is_invalid(for_metis):
    found = for_metis().measured("--scenario=single-stream", FAKE_CLOCK="800,400")
    assert found["verdict"]["word"] == "INVALID"
    assert found["verdict"]["reasons"][0].startswith(
        "clocks changed from {'clock_profile': '800'} to {'clock_profile': '400'}; "
    )


def test_where_no_second_program_starts_it_measures_without_heat(for_metis):
    found = for_metis().measured(
        FAKE_TEMPERATURE=61, PATH=PATH, before="sys.executable = '/nowhere/python'"
    )
    assert found["heat_before"]["temperature_c"] == 61
    assert (found["heat_during"]["n"], found["heat_during"]["hottest_c"]) == (0, None)
    assert found["heat_during"]["reason"] == (
        "not_readable: no second program could be started: FileNotFoundError"
    )


def test_heat_is_invalid(for_metis):
    found = for_metis().measured(FAKE_TEMPERATURE=105, PATH=PATH)
    assert found["heat_during"]["throttling"] is True
    assert found["verdict"]["word"] == "INVALID"
    assert "105 C: the chip throttles from 105 C on; cool it" in found["verdict"]["reasons"]


def test_what_cannot_be_read_is_null_with_the_reason(for_metis, tmp_path):
    bundle = for_metis()
    found = bundle.measured(f"--sysfs={tmp_path}", PATH=PATH)  # axmonitor reaches no server
    assert found["heat_after"]["temperature_c"] is None
    assert "axmonitor did not answer" in found["heat_after"]["reason"]
    assert found["heat_during"]["n"] == 0
    assert found["heat_during"]["reason"].startswith("not_readable: axmonitor did not answer")
    assert found["passes"][0]["energy_mj"] is None
    assert found["link"]["width"] is None
    assert "in sysfs" in found["link"]["reason"]
