import copy
import pickle
from pathlib import Path

import pytest

from pipeline.artifacts import Artifacts
from pipeline.stages import load_stages


def test_a_path_is_read_by_attribute_or_by_a_name_that_is_a_value():
    inputs = Artifacts({"student": Path("a/student.onnx")}, "inputs of compile")
    assert inputs.student == inputs["student"] == Path("a/student.onnx")
    assert "student" in inputs
    assert "dataset" not in inputs


def test_a_wrong_name_is_told_with_the_names_that_are_there():
    inputs = Artifacts({"student": Path("s"), "labels": Path("l")}, "inputs of compile")
    with pytest.raises(
        LookupError, match=r"dataset is not among the inputs of compile \(student, labels\)"
    ):
        inputs["dataset"]
    with pytest.raises(LookupError, match="studnet is not among the inputs of compile"):
        inputs.studnet  # noqa: B018 - the reading is what is tested
    with pytest.raises(LookupError, match=r"\(none\)"):
        Artifacts({}, "inputs of ingest")["student"]


def test_they_travel_to_other_processes():
    inputs = Artifacts({"student": Path("s")}, "inputs of compile")
    assert pickle.loads(pickle.dumps(inputs)).student == Path("s")
    assert copy.copy(inputs).student == Path("s")


def test_every_artifact_of_every_stage_has_its_attribute():
    outputs = [name for stage in load_stages().values() for name in stage.outputs]
    assert outputs == list(Artifacts.__annotations__)
