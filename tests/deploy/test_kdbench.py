"""kdbench as a device user starts it: a program in a bundle, without kdpipe."""

import hashlib
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

DEPLOY = Path(__file__).parents[2] / "deploy"


@pytest.fixture
def bundle(finished):
    return finished.artifact("bundle")


def kdbench(bundle, *words):
    # -I: no PYTHONPATH, no user site; and from another folder, so nothing of kdpipe is in reach
    # but what lies beside the program.
    code = (
        "import sys, runpy; sys.path.insert(0, sys.argv[1]); sys.modules['pipeline'] = None; "
        "sys.modules['metis'] = None; sys.argv = sys.argv[2:]; "
        "runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    return subprocess.run(
        [sys.executable, "-B", "-I", "-c", code, bundle, bundle / "kdbench.py", bundle,
         "--min-seconds=0.2", "--min-queries=10", *words],
        capture_output=True, text=True, check=False, cwd="/",
    )  # fmt: skip


def module():
    """kdbench's functions, loaded by path."""
    spec = importlib.util.spec_from_file_location("kdbench", DEPLOY / "kdbench.py")
    loaded = importlib.util.module_from_spec(spec)
    sys.modules["kdbench"] = loaded
    spec.loader.exec_module(loaded)
    return loaded


def redo(bundle, name):
    """Make bundle.json agree with a file that was changed on purpose."""
    index = json.loads((bundle / "bundle.json").read_text())
    index["files"][name] = hashlib.sha256((bundle / name).read_bytes()).hexdigest()
    (bundle / "bundle.json").write_text(json.dumps(index))


def test_it_needs_only_what_the_bundle_holds(bundle):
    result = kdbench(bundle)
    assert result.returncode == 0, result.stderr
    document = json.loads(result.stdout.splitlines()[-1])
    assert document["measured_on"] == "host-emulation"
    assert [check["name"] for check in document["checks"]] == ["digests", "preprocessing", "logits"]
    for line in result.stdout.splitlines()[:-1]:
        if line.startswith(("latency", "throughput", "top-1")):
            assert "host-emulation" in line


def test_json_alone_and_raw_samples(bundle, tmp_path):
    result = kdbench(bundle, "--json", f"--samples={tmp_path / 's.npz'}")
    assert len(result.stdout.splitlines()) == 1
    document = json.loads(result.stdout)
    samples = np.load(tmp_path / "s.npz")
    assert len(samples["all_ns"]) == document["latency"][1]["n"] >= 10
    assert (samples["all_ns"] >= samples["run_ns"]).all()


@pytest.mark.parametrize(
    "name", ["preprocessing.json", "model/model.onnx", "golden.npz", "preprocessing/images.py"]
)
def test_a_damaged_file_is_named(bundle, name):
    path = bundle / name
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))
    result = kdbench(bundle)
    assert result.returncode == 3
    assert f"Error: {name} is damaged: expected sha256 " in result.stderr
    assert "Traceback" not in result.stderr


def test_code_that_no_longer_loads_is_called_damaged(bundle):
    with (bundle / "preprocessing" / "apply.py").open("a") as file:
        file.write("def broken(:")
    result = kdbench(bundle)
    assert result.returncode == 3
    assert "preprocessing/ beside kdbench.py is damaged" in result.stderr
    assert "Traceback" not in result.stderr


def test_a_missing_file_or_no_bundle_is_named(bundle, tmp_path):
    (bundle / "labels.txt").unlink()
    result = kdbench(bundle)
    assert (result.returncode, "labels.txt is missing from the bundle" in result.stderr) == (
        3,
        True,
    )
    (bundle / "bundle.json").unlink()
    result = kdbench(bundle)
    assert (result.returncode, "is not a bundle" in result.stderr) == (3, True)


@pytest.mark.parametrize("field", ["mean", "std", "interpolation"])
def test_other_preprocessing_is_caught_on_the_golden_images(bundle, field):
    path = bundle / "student_input.json"
    given = json.loads(path.read_text())
    if field == "interpolation":
        given[field], given["half_pixel_centers"] = "bilinear", True
    else:
        given[field][1] *= 1.001
    path.write_text(json.dumps(given))
    redo(bundle, "student_input.json")
    result = kdbench(bundle)
    assert result.returncode == 4
    assert "preprocessing differs from the host's by up to" in result.stderr


def test_swapped_channels_are_caught(bundle):
    path = bundle / "student_input.json"
    given = json.loads(path.read_text())
    for field in ("mean", "std"):
        given[field] = given[field][::-1]
    path.write_text(json.dumps(given))
    redo(bundle, "student_input.json")
    assert kdbench(bundle).returncode == 4


def test_another_contract_is_caught(bundle):
    path = bundle / "preprocessing.json"
    path.write_text(path.read_text() + "\n")
    redo(bundle, "preprocessing.json")
    result = kdbench(bundle)
    assert result.returncode == 3
    assert "preprocessing.json is of another contract" in result.stderr


def golden(bundle, **changes):
    with np.load(bundle / "golden.npz") as archive:
        arrays = {**archive}
    np.savez(bundle / "golden.npz", **{**arrays, **{k: f(arrays[k]) for k, f in changes.items()}})
    redo(bundle, "golden.npz")


def test_other_logits_are_caught_and_a_layout_error_is_called_that(bundle):
    golden(bundle, logits=lambda logits: logits + 1.0)
    result = kdbench(bundle)
    assert result.returncode == 4
    assert "logits differ from the host's int8 logits by up to" in result.stderr
    assert "layout" not in result.stderr
    golden(bundle, logits=lambda logits: np.roll(logits - 1.0, 1, axis=1))
    assert "they are the same numbers in another order: a layout error" in kdbench(bundle).stderr


def test_an_unknown_runtime_is_named(bundle):
    index = json.loads((bundle / "bundle.json").read_text())
    (bundle / "bundle.json").write_text(json.dumps({**index, "runtime": "abacus"}))
    result = kdbench(bundle)
    assert (result.returncode, "no runtime 'abacus'" in result.stderr) == (5, True)


@pytest.mark.parametrize(
    ("queries", "null"),
    [(63, ("p90", "p95", "p99")), (64, ("p95", "p99")), (661, ("p99",)), (662, ())],
)
def test_a_percentile_of_too_few_queries_is_null(queries, null):
    ns = np.random.default_rng(0).permutation(np.arange(1, queries + 1)) * 1_000_000
    row = module().summary(ns, "scope", "host-emulation")
    for name, (quantile, _) in module().PERCENTILES.items():
        expected = None if name in null else float(int(quantile * queries) + 1)
        assert row[name] == expected
    assert (row["min"], row["max"], row["n"]) == (1.0, float(queries), queries)


@pytest.mark.parametrize(
    ("asked", "reached", "word"),
    [
        ((60.0, 1024), (60.1, 1024), "VALID"),
        ((60.0, 1024), (59.0, 1024), "INVALID"),
        ((60.0, 1024), (60.1, 1000), "INVALID"),
        ((59.9, 1024), (59.9, 9999), "SMOKE"),
        ((60.0, 1023), (60.1, 9999), "SMOKE"),
        ((600.0, 1024), (600.1, 5000), "VALID"),
    ],
)
def test_the_verdict_follows_what_was_asked_and_what_was_reached(asked, reached, word):
    stream = {"seconds": reached[0], "all_ns": np.zeros(reached[1])}
    found = module().verdict(*asked, stream)
    assert found["word"] == word
    assert (found["reasons"] == []) == (word == "VALID")
