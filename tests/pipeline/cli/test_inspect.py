"""`kdpipe doctor` as a user runs it."""

import json


def test_doctor_tells_versions_and_what_is_missing(project):
    result = project.kdpipe("doctor")
    assert result.returncode == 0
    assert "onnxruntime" in result.stdout
    assert "axelera-devkit   not installed" in result.stdout
    document = json.loads(project.kdpipe("doctor", "--json").stdout)
    assert document["backends"]["emulator"].startswith("available: onnxruntime ")
    assert document["backends"]["voyager"].startswith("not available: the Voyager SDK is not")
