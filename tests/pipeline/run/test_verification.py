import json

import pytest

from pipeline.run.files import folder_files


def flip(path, position=-1):
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(bytes(data))


def test_a_byte_flipped_in_any_file_of_any_artifact_is_named(finished):
    manifest = finished.manifest
    assert finished.kdpipe("verify").returncode == 0
    tried = 0
    for name, artifact in manifest["artifacts"].items():
        path = finished.folder / artifact["path"]
        files = list(folder_files(path)) if path.is_dir() else [path]
        # One of a folder's many images stands for all; every other file is tried.
        images = [f for f in files if f.suffix == ".png"]
        for file in [f for f in files if f.suffix != ".png"] + images[:1]:
            flip(file, position=file.stat().st_size // 2)
            result = finished.kdpipe("verify", "--json")
            assert result.returncode == 3
            problems = json.loads(result.stdout)["problems"]
            shown = file.relative_to(finished.folder).as_posix()
            assert len(problems) == 1, problems
            assert problems[0].startswith(f"{name}: {shown}: expected ")
            assert ", found " in problems[0]
            assert shown in result.stderr
            flip(file, position=file.stat().st_size // 2)
            tried += 1
    assert tried > 30
    assert finished.kdpipe("verify").returncode == 0


def test_missing_and_added_files_are_named(finished):
    bundle = finished.artifact("bundle")
    (bundle / "labels.txt").unlink()
    (bundle / "more.txt").write_text("x")
    result = finished.kdpipe("verify", "--json")
    problems = json.loads(result.stdout)["problems"]
    assert any("bundle/labels.txt: expected" in p and "found no such file" in p for p in problems)
    assert any("bundle/more.txt: expected no such file, found" in p for p in problems)
    finished.artifact("student").unlink()
    result = finished.kdpipe("verify")
    assert result.returncode == 3
    assert "student: distill/001/student.onnx is gone" in result.stdout


@pytest.mark.parametrize(
    ("artifact", "file"),
    [
        ("student_input", ""),
        ("dataset", "dataset.json"),
        ("bundle", "bundle.json"),
        ("benchmark_report", "report.json"),
    ],
)
def test_a_stage_that_carried_another_contract_is_found_even_if_its_digest_was_redone(
    finished, artifact, file
):
    """As if a stage had written another contract's digest: the files are what they were made as."""
    path = finished.artifact(artifact) / file if file else finished.artifact(artifact)
    truth = finished.manifest["contract"]["sha256"]
    path.write_text(path.read_text().replace(truth, "0" * 64))
    finished.redo_digest(artifact)
    result = finished.kdpipe("verify")
    assert result.returncode == 3
    assert f"contract: expected {truth}, found {'0' * 64}" in result.stdout


def test_a_yaml_of_another_contract_is_found(finished):
    path = finished.artifact("device_pipeline") / "tiny.yaml"
    path.write_text(path.read_text().replace(finished.manifest["contract"]["sha256"], "0" * 64))
    finished.redo_digest("device_pipeline")
    result = finished.kdpipe("verify")
    assert result.returncode == 3
    assert "tiny.yaml does not carry the contract's digest" in result.stdout


def test_a_users_contract_that_moved_on_is_named(finished):
    finished.edit_contract("note", to="another")
    result = finished.kdpipe("verify")
    assert result.returncode == 3
    assert "contract: the user's file: expected" in result.stdout


def test_before_a_run_there_is_nothing_to_verify(project):
    result = project.kdpipe("verify")
    assert result.returncode == 3
    assert "runs/tiny has no manifest.json; run first" in result.stderr
