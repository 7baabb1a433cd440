"""The Voyager backend over the stand-in SDK, started as a user's own environment would be."""

import json
import logging
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
from onnx import TensorProto, helper, numpy_helper
from stand_in_sdk import install_stand_in, packages_of, release

from metis.backend import BackendError, BackendMissingError, SdkOptions
from metis.voyager.backend import Voyager
from metis.voyager.process import find_interpreter

SCHEME = "per_tensor_min_max"


def write_student(path, *, softmax=False):
    """A convolution and a classifier, opset 17, NCHW, batch 1."""
    random = np.random.default_rng(7)
    weights = {
        "w": random.normal(0, 0.3, (4, 2, 3, 3)),
        "b": random.normal(0, 0.3, 4),
        "v": random.normal(0, 0.5, (3, 4)),
        "c": random.normal(0, 0.3, 3),
    }
    made = "scores" if softmax else "logits"
    nodes = [
        helper.make_node("Conv", ["input", "w", "b"], ["conv"], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["conv"], ["relu"]),
        helper.make_node("GlobalAveragePool", ["relu"], ["pooled"]),
        helper.make_node("Flatten", ["pooled"], ["flat"]),
        helper.make_node("Gemm", ["flat", "v", "c"], [made], transB=1),
    ]
    if softmax:
        nodes.append(helper.make_node("Softmax", ["scores"], ["logits"]))
    graph = helper.make_graph(
        nodes,
        "student",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, [1, 2, 5, 5])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [1, 3])],
        [numpy_helper.from_array(v.astype(np.float32), k) for k, v in weights.items()],
    )
    opset = [helper.make_opsetid("", 17)]
    onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=8), path)
    return path


@pytest.fixture
def use_sdk(tmp_path, monkeypatch):
    """Make a stand-in SDK the one that is found."""

    def use(devkit="1.8.0", rt="same"):
        python = install_stand_in(tmp_path / f"sdk-{devkit}-{rt}", devkit, rt)
        monkeypatch.setenv("KDPIPE_SDK_PYTHON", str(python))
        return python

    return use


@pytest.fixture
def given(tmp_path):
    """A student and its calibration set."""
    samples = tmp_path / "samples.npy"
    np.save(samples, np.random.default_rng(1).normal(size=(6, 1, 2, 5, 5)).astype(np.float32))
    return write_student(tmp_path / "student.onnx"), samples


def quantized(given, tmp_path, options=None):
    return Voyager(options).quantize(*given, tmp_path / "int8", scheme=SCHEME)


def compiled(model, into, route, *, samples=None, pipeline=None, **extra):
    """The model, compiled by a route."""
    backend = Voyager(SdkOptions(extra=extra, route=route))
    return backend.compile(model, into, aipu_cores=1, samples=samples, pipeline=pipeline)


def record(folder):
    return json.loads((folder / "sdk.json").read_text())


def test_without_an_sdk_every_verb_says_how_to_get_it(tmp_path, given, monkeypatch):
    monkeypatch.delenv("KDPIPE_SDK_PYTHON", raising=False)
    probe = Voyager().probe()
    assert not probe.available
    assert probe.versions == {}
    assert "not installed: pip install axelera-devkit axelera-rt (same release" in probe.missing
    with pytest.raises(BackendMissingError, match=r"compile\.sdk_python or \$KDPIPE_SDK_PYTHON"):
        quantized(given, tmp_path)
    assert not (tmp_path / "int8").exists()


def test_the_probe_tells_what_the_sdks_own_interpreter_has(use_sdk):
    use_sdk("1.7.0")
    probe = Voyager().probe()
    assert probe.available
    assert probe.missing == ""
    assert probe.versions["axelera-devkit"] == probe.versions["axelera-rt"] == "1.7.0"
    assert probe.versions["python"] == ".".join(map(str, sys.version_info[:3]))
    assert find_interpreter().axkernelcc


@pytest.mark.parametrize(
    ("devkit", "rt", "words"),
    [
        ("1.7.0", "1.8.0", "axelera-devkit 1.7.0 and axelera-rt 1.8.0 are of different releases"),
        ("1.7.0", "1.7.1", "of different releases"),
        ("1.5.2", "same", "axelera-devkit 1.5.2 is too old: pip install"),
    ],
)
def test_releases_that_do_not_go_together_are_refused(use_sdk, devkit, rt, words):
    use_sdk(devkit, rt)
    probe = Voyager().probe()
    assert not probe.available
    assert words in probe.missing


def test_the_package_of_before_1_6_is_named_as_too_old(use_sdk, tmp_path):
    python = use_sdk()
    shutil.rmtree(packages_of(python) / "axelera_devkit-1.8.0.dist-info")
    release(packages_of(python), "axelera-voyager-sdk", "1.5.2")
    assert "release 1.5.2 is too old" in Voyager().probe().missing


def test_a_devkit_alone_compiles(use_sdk, given, tmp_path):
    use_sdk("1.8.0", rt=None)
    model = quantized(given, tmp_path)
    assert Voyager().compile(model, tmp_path / "compiled", aipu_cores=1).version == "1.8.0"


@pytest.mark.parametrize("python", ["/nowhere/python", "/bin/false"])
def test_an_interpreter_that_is_none_is_named(monkeypatch, python):
    monkeypatch.setenv("KDPIPE_SDK_PYTHON", python)
    assert python in Voyager().probe().missing


@pytest.mark.parametrize(
    ("devkit", "cores"), [("1.6.1", 1), ("1.7.0", 1), ("1.8.0", 1), ("1.8.0", 4)]
)
def test_files_are_collected_wherever_a_release_puts_them(use_sdk, given, tmp_path, devkit, cores):
    use_sdk(devkit)
    model = quantized(given, tmp_path)
    into = tmp_path / "compiled"
    compiled = Voyager().compile(model, into, aipu_cores=cores)
    assert compiled.runtime == "axelera"
    assert compiled.entry == "model/model.json"
    assert (into / "compiler_config_final.toml").exists()
    archived = devkit != "1.6.1" and cores == 1
    assert (into / "student.axm").exists() == archived
    found = record(into)
    assert found["axm"] == ("student.axm" if archived else "")
    assert found["run"] == {"ran": True, "device": "metis-0:1:0"}
    assert found["settings"]["resources_used"] == 0.25 * cores
    # The convolution's padding moved to the host, and rows are filled up to a multiple of four.
    (source,) = compiled.inputs
    assert source.shape == (cores, 7, 8, 4)
    assert source.padding == ((0, 0), (1, 1), (1, 2), (0, 2))
    assert not list(tmp_path.glob(".voyager-*"))


@pytest.mark.parametrize("names", ["", "short", "alias"])
def test_settings_go_by_the_names_that_the_installed_sdk_has(
    use_sdk, given, tmp_path, monkeypatch, names
):
    use_sdk()
    monkeypatch.setenv("FAKE_NAMES", names)
    settings = record(quantized(given, tmp_path).path)["settings"]
    short = names == "short"
    assert settings["ptq_scheme" if short else "quantization_scheme"] == SCHEME
    assert settings["aipu_cores" if short else "aipu_cores_used"] == 1
    assert settings["resources" if short else "resources_used"] == 0.25


def test_a_setting_that_did_not_take_is_an_error(use_sdk, given, tmp_path, monkeypatch):
    use_sdk()
    monkeypatch.setenv("FAKE_DEAF", "aipu_cores_used")
    with pytest.raises(BackendError, match=r"aipu_cores_used=1 did not take: .* says 4"):
        quantized(given, tmp_path)


def test_extra_fields_are_passed_and_read_back(use_sdk, given, tmp_path):
    use_sdk()
    options = SdkOptions(extra={"tiling_depth": 6, "multicore_mode": "batch"})
    model = quantized(given, tmp_path, options)
    Voyager(options).compile(model, tmp_path / "compiled", aipu_cores=1)
    for folder in (model.path, tmp_path / "compiled"):
        assert record(folder)["settings"]["tiling_depth"] == 6
        assert record(folder)["settings"]["multicore_mode"] == "batch"


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        ({"tiling_dept": 6}, "has no field 'tiling_dept'; did you mean 'tiling_depth'"),
        ({"resources_used": 1.0}, "'resources_used' is set by kdpipe itself"),
        ({"mvm_utilization_limit": "low"}, "could not convert string to float: 'low'"),
    ],
)
def test_extra_fields_that_do_not_fit_are_named(use_sdk, given, tmp_path, extra, words):
    use_sdk()
    with pytest.raises(BackendError, match=words):
        quantized(given, tmp_path, SdkOptions(extra=extra))


def test_arrays_or_tensors_paths_or_strings_are_both_understood(
    use_sdk, given, tmp_path, monkeypatch
):
    use_sdk()
    monkeypatch.setenv("FAKE_EXPORT", "str")
    model = quantized(given, tmp_path)
    assert record(model.path)["export_took"] == "str"
    tensors = np.random.default_rng(2).normal(size=(3, 2, 5, 5)).astype(np.float32)
    arrays = Voyager().infer(model, tensors)
    monkeypatch.setenv("FAKE_RETURNS", "torch")
    assert np.array_equal(Voyager().infer(model, tensors), arrays)
    assert arrays.shape == (3, 3)


def test_what_the_host_does_after_the_device_is_named(use_sdk, tmp_path, given):
    use_sdk()
    student = write_student(tmp_path / "softmax.onnx", softmax=True)
    model = quantized((student, given[1]), tmp_path)
    compiled = Voyager().compile(model, tmp_path / "compiled", aipu_cores=1)
    assert compiled.postamble == "model/postprocess_graph.onnx"
    assert compiled.preamble == ""
    after = onnx.load(compiled.path / compiled.postamble)
    assert [node.op_type for node in after.graph.node] == ["Flatten", "Softmax"]
    made = Voyager().infer(model, np.zeros((1, 2, 5, 5), np.float32))
    assert made.sum() == pytest.approx(1)


@pytest.mark.parametrize(
    "environment",
    [
        {},
        pytest.param({"FAKE_BATCH": "1"}, marks=pytest.mark.slow),
        pytest.param({"FAKE_CONF": "json"}, marks=pytest.mark.slow),
    ],
    ids=["plain", "batched", "json"],
)
def test_axcompile_calibrates_with_the_same_tensors_and_gives_the_same_model(
    use_sdk, given, tmp_path, monkeypatch, environment
):
    use_sdk()
    model = quantized(given, tmp_path)
    api = Voyager().compile(model, tmp_path / "api", aipu_cores=1)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    made = compiled(model, tmp_path / "cli", "axcompile", samples=given[1], tiling_depth=6)
    assert (made.inputs, made.outputs) == (api.inputs, api.outputs)
    for name in ("core.onnx", "manifest.json"):
        assert (made.path / "model" / name).read_bytes() == (api.path / "model" / name).read_bytes()
    assert record(made.path)["transform_batch"] == ("FAKE_BATCH" in environment)
    assert record(made.path)["settings"]["tiling_depth"] == 6


def test_axcompile_with_random_data_is_refused(use_sdk, given, tmp_path, monkeypatch):
    use_sdk()
    model = quantized(given, tmp_path)
    monkeypatch.setenv("FAKE_RANDOM", "1")
    with pytest.raises(BackendError, match="did not ask for a calibration sample"):
        compiled(model, tmp_path / "cli", "axcompile", samples=given[1])


def test_axcompile_that_fails_says_its_status_and_its_words(use_sdk, given, tmp_path, monkeypatch):
    use_sdk()
    model = quantized(given, tmp_path)
    monkeypatch.setenv("FAKE_FAIL", "compile")
    with pytest.raises(BackendError, match=r"failed at axcompile: RuntimeError: LOWER_TIR_ERROR: "):
        compiled(model, tmp_path / "cli", "axcompile", samples=given[1])


def test_a_route_whose_program_is_missing_counts_as_not_installed(
    use_sdk, given, tmp_path, monkeypatch
):
    python = use_sdk()
    model = quantized(given, tmp_path)
    (python.parent / "axcompile").unlink()
    with pytest.raises(BackendMissingError, match="axcompile is not here"):
        compiled(model, tmp_path / "cli", "axcompile", samples=given[1])
    monkeypatch.delenv("AXELERA_FRAMEWORK", raising=False)
    (tmp_path / "some.yaml").write_text("")
    with pytest.raises(BackendMissingError, match=r"deploy\.py is not here"):
        compiled(model, tmp_path / "x", "deploy", pipeline=tmp_path)


FAILURES = {
    "quantize": ("quantize", "QtoolsError: the stand-in was told to fail at quantize"),
    "export": ("export", "OSError: the stand-in was told to fail at export"),
    "load": ("load the quantized model", "ValueError: the stand-in was told to fail at load"),
    "infer": ("run the quantized model", "RuntimeError: the stand-in was told to fail at infer"),
    "compile": ("compile", "RuntimeError: the stand-in was told to fail at compile"),
    "connect": ("connect", "InternalError: the stand-in was told to fail at connect"),
    "run": ("run", "InternalError: the stand-in was told to fail at run"),
}


@pytest.mark.parametrize("fail", FAILURES)
def test_a_failure_is_one_line_with_its_step_and_the_sdks_words(
    use_sdk, given, tmp_path, monkeypatch, caplog, fail
):
    use_sdk()
    caplog.set_level(logging.INFO, "kdpipe.voyager")
    if fail not in ("quantize", "export"):
        model = quantized(given, tmp_path)
    monkeypatch.setenv("FAKE_FAIL", fail)
    with pytest.raises(BackendError) as caught:
        if fail in ("quantize", "export"):
            quantized(given, tmp_path)
        elif fail == "infer":
            Voyager().infer(model, np.zeros((1, 2, 5, 5), np.float32))
        else:
            Voyager().compile(model, tmp_path / "compiled", aipu_cores=1)
    step, words = FAILURES[fail]
    assert str(caught.value) == f"Voyager SDK 1.8.0 failed at {step}: {words}"
    assert "Traceback (most recent call last)" in caplog.text  # the log has everything
    assert not list(tmp_path.glob(".voyager-*"))


def test_an_sdk_that_does_not_import_counts_as_missing(use_sdk, given, tmp_path, monkeypatch):
    use_sdk()
    monkeypatch.setenv("FAKE_FAIL", "import")
    with pytest.raises(BackendMissingError, match="failed at import: ImportError: the stand-in"):
        quantized(given, tmp_path)


def test_a_compiler_that_makes_nothing_has_failed(use_sdk, given, tmp_path, monkeypatch):
    use_sdk()
    model = quantized(given, tmp_path)
    monkeypatch.setenv("FAKE_SILENT", "1")
    with pytest.raises(BackendError, match="ended without an error and without a model"):
        Voyager().compile(model, tmp_path / "compiled", aipu_cores=1)


def test_a_process_that_dies_is_told_with_its_last_words(use_sdk, given, tmp_path, monkeypatch):
    use_sdk()
    monkeypatch.setenv("FAKE_CRASH", "quantize")
    words = r"killed by signal 9; segmentation fault ahead \(often for want of memory"
    with pytest.raises(BackendError, match=words):
        quantized(given, tmp_path)


def test_a_helper_program_that_is_missing_is_named_with_its_cure(use_sdk, given, tmp_path):
    python = use_sdk()
    model = quantized(given, tmp_path)
    (python.parent / "axkernelcc").unlink()
    with pytest.raises(BackendError, match=r"'axkernelcc' \(the devkit's program axkernelcc is"):
        Voyager().compile(model, tmp_path / "compiled", aipu_cores=1)


@pytest.mark.parametrize(
    ("variable", "why"), [("FAKE_DEVICES", "no device"), ("FAKE_BUSY", "InUse")]
)
def test_no_card_or_a_busy_one_is_no_failure(use_sdk, given, tmp_path, monkeypatch, variable, why):
    use_sdk()
    monkeypatch.setenv(variable, "0" if variable == "FAKE_DEVICES" else "1")
    Voyager().compile(quantized(given, tmp_path), tmp_path / "compiled", aipu_cores=1)
    run = record(tmp_path / "compiled")["run"]
    assert run["ran"] is False
    assert why in run["why"]


def test_a_compiler_that_hangs_is_ended_with_its_helpers(use_sdk, given, tmp_path, monkeypatch):
    use_sdk()
    monkeypatch.setenv("FAKE_HANG", "quantize")

    class Clock:
        """Stands still until it hangs, however long that takes here; then all time is over."""

        sleep = staticmethod(time.sleep)

        @staticmethod
        def monotonic():
            return 1e9 if len(processes_of(tmp_path)) == WITH_HELPERS else 0.0

    monkeypatch.setattr("metis.voyager.process.time", Clock)
    with pytest.raises(BackendError, match=r"ended after 3 s, at quantize; compile\.time_limit"):
        quantized(given, tmp_path, SdkOptions(time_limit_s=3))
    wait_until(lambda: not processes_of(tmp_path))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_nothing_of_the_sdk_outlives_us(use_sdk, given, tmp_path, number):
    use_sdk()
    code = (
        "import sys; from pathlib import Path; from metis.voyager.backend import Voyager;"
        f"Voyager().quantize(*map(Path, sys.argv[1:]), scheme={SCHEME!r})"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, *map(str, given), str(tmp_path / "int8")],
        env={**os.environ, "FAKE_HANG": "quantize"},
        stderr=subprocess.DEVNULL,
    )
    wait_until(lambda: len(processes_of(tmp_path)) == WITH_HELPERS)
    process.send_signal(number)
    process.wait(timeout=120)
    wait_until(lambda: not processes_of(tmp_path))


#: The interpreter, its watcher, and the helper that the compiler started.
WITH_HELPERS = 3


def wait_until(done, seconds=120):
    """However busy the machine is: what a test waits for comes soon, or not at all."""
    deadline = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def processes_of(folder):
    """Processes that run an interpreter below a folder."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                program = (entry / "cmdline").read_bytes().split(b"\0")[0].decode()
            except OSError:
                continue
            if program.startswith(str(folder)):
                found.append(int(entry.name))
    return found


def test_a_fresh_folder_and_a_clean_import_path(use_sdk, given, tmp_path, monkeypatch):
    """Files of ours that lie about can't answer to the SDK's imports."""
    python = use_sdk()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "onnx.py").write_text("raise RuntimeError('not this one')")
    (packages_of(python) / "sitecustomize.py").write_text(
        "import atexit, os, sys\n"
        "before = sorted(os.listdir())\n"
        "def tell():\n"
        "    if 'axelera.compiler' in sys.modules:\n"
        "        print('saw', before, [p for p in sys.path if p.endswith('metis')])\n"
        "atexit.register(tell)\n"
    )
    with_log = logging.getLogger("kdpipe.voyager")
    lines = []
    handler = logging.Handler()
    handler.emit = lambda entry: lines.append(entry.getMessage())
    with_log.addHandler(handler)
    with_log.setLevel(logging.INFO)
    try:
        quantized(given, tmp_path)
    finally:
        with_log.removeHandler(handler)
        with_log.setLevel(logging.NOTSET)
    assert "saw [] []" in lines
