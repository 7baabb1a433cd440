"""kdpipe bundle: what travels, its digests, its archive."""

import hashlib
import json
import tarfile

import pytest

from pipeline.run.files import folder_files


@pytest.fixture
def compiled(finished):
    """A project that was never benchmarked here."""
    manifest = finished.manifest
    del manifest["stages"]["benchmark"]
    for name in ("bundle", "benchmark_report"):
        del manifest["artifacts"][name]
    (finished.folder / "manifest.json").write_text(json.dumps(manifest))
    return finished


def test_a_bundle_holds_what_was_compiled_and_digests_of_everything(compiled, finished):
    result = compiled.kdpipe("bundle", "box/travels")
    assert result.returncode == 0, result.stderr
    folder = compiled.root / "box" / "travels"
    index = json.loads((folder / "bundle.json").read_text())
    files = {p.relative_to(folder).as_posix() for p in folder_files(folder)} - {"bundle.json"}
    assert set(index["files"]) == files
    for name, digest in index["files"].items():
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == digest
    assert {"preprocessing.json", "student_input.json", "labels.txt", "pipeline.yaml"} <= files
    assert {"golden.npz", "test.npz", "kdbench.py", "BUNDLE.md", "model/spec.json"} <= files
    for artifact, name in (("contract", "preprocessing.json"), ("labels", "labels.txt")):
        assert (folder / name).read_bytes() == compiled.artifact(artifact).read_bytes()
    yaml = compiled.artifact("device_pipeline") / "tiny.yaml"
    assert (folder / "pipeline.yaml").read_bytes() == yaml.read_bytes()
    assert (folder / "model" / "model.onnx").read_bytes() == (
        compiled.artifact("compiled_model") / "model.onnx"
    ).read_bytes()


def test_the_archive_has_the_same_bytes_twice(compiled):
    archives = []
    for where in ("one", "two"):
        result = compiled.kdpipe("bundle", f"{where}/tiny", "--tar")
        assert result.returncode == 0, result.stderr
        data = (compiled.root / where / "tiny.tar.gz").read_bytes()
        assert hashlib.sha256(data).hexdigest() in result.stdout
        archives.append(data)
    assert archives[0] == archives[1]
    with tarfile.open(compiled.root / "one" / "tiny.tar.gz") as tar:
        entries = tar.getmembers()
        assert {(e.mtime, e.uid, e.gid, e.uname, e.gname, e.mode) for e in entries} == {
            (0, 0, 0, "", "", 0o644)
        }
        names = [entry.name for entry in entries]
        assert names == sorted(names)
        program = tar.extractfile("tiny/kdbench.py")
        assert program.read() == (compiled.root / "one" / "tiny" / "kdbench.py").read_bytes()


def test_what_is_there_stays_and_what_is_missing_is_named(compiled):
    (compiled.root / "box").mkdir()
    result = compiled.kdpipe("bundle", "box")
    assert (result.returncode, "box exists" in result.stderr) == (3, True)
    path = compiled.artifact("compiled_model") / "model.onnx"
    path.write_bytes(path.read_bytes() + b"x")
    result = compiled.kdpipe("bundle", "other")
    assert result.returncode == 3
    assert "kdpipe run --stage compile" in result.stderr
    assert not (compiled.root / "other").exists()
    assert not list(compiled.root.glob(".other*"))


def test_a_run_that_is_not_compiled_says_what_makes_it(project):
    result = project.kdpipe("bundle", "box")
    assert result.returncode == 3
    assert "benchmark needs 'contract'" in result.stderr
    assert "kdpipe run --stage ingest" in result.stderr
    assert not (project.root / "box").exists()


def test_a_benchmark_that_does_not_end_is_ended_and_its_words_are_kept(finished):
    before = finished.manifest["artifacts"]["benchmark_report"]
    for limit in (2.5, 20.0, 120.0):  # a busy machine may not even have started it by then
        result = finished.kdpipe(
            "run", "--stage", "benchmark", "--force",
            "--set=benchmark.min_seconds=250", f"--set=benchmark.time_limit={limit}",
        )  # fmt: skip
        assert result.returncode == 1
        words = f"kdbench.py was ended after {limit:g} s without a result: the device hangs, or "
        assert f"Error: {words}" in result.stderr
        log = (finished.folder / finished.manifest["stages"]["benchmark"]["log"]).read_text()
        if "SingleStream, 250 s" in log:
            break
    assert "SingleStream, 250 s" in log
    assert finished.manifest["artifacts"]["benchmark_report"] == before
