from typing import Annotated

import pytest

from pipeline.run.errors import ExtraMissingError, StageError, require_extra
from pipeline.run.parameters import ADDED, PATH, UNKEYED, Params
from pipeline.run.stage import Stage, order_stages
from pipeline.stages import load_stages, stage_names


class SomeParams(Params, frozen=True):
    value: int = 1
    file: Annotated[str, PATH] = "x.npz"
    limit: Annotated[float, UNKEYED] = 1.0
    inner: tuple[int, ...] = (1, 2)
    later: Annotated[str, ADDED] = "as before"


def stage(inputs, *outputs):
    return Stage(
        inputs=inputs,
        outputs={o: o for o in outputs},
        params=SomeParams,
        facts=dict,
        run=lambda j, p: {},
    )


def test_the_files_are_the_stages_and_their_order_follows_from_names():
    assert stage_names() == ("benchmark", "calibrate", "compile", "distill", "ingest")
    assert list(load_stages()) == ["ingest", "distill", "calibrate", "compile", "benchmark"]


def test_two_makers_of_one_artifact_are_named():
    with pytest.raises(StageError, match="a and b both make 'x'"):
        order_stages({"a": stage((), "x"), "b": stage((), "x")})


def test_a_cycle_is_named():
    with pytest.raises(StageError, match=r"wait for each other: .*a.*b"):
        order_stages({"a": stage(("y",), "x"), "b": stage(("x",), "y")})


def test_an_input_nobody_makes_is_named():
    with pytest.raises(StageError, match="a needs 'z', which no stage makes"):
        order_stages({"a": stage(("z",), "x")})


def test_file_names_and_limits_do_not_decide_what_a_stage_makes():
    assert SomeParams(file="other", limit=9.0).key_tree() == {"value": 1, "inner": [1, 2]}


def test_a_parameter_of_a_later_release_decides_only_where_it_is_not_as_before():
    keyed = {"value": 1, "inner": [1, 2]}
    assert SomeParams(later="as before").key_tree() == keyed
    assert SomeParams(later="anew").key_tree() == {**keyed, "later": "anew"}


def test_a_missing_extra_is_named_with_its_packages():
    require_extra("train", "json")
    with pytest.raises(
        ExtraMissingError, match=r"no_such_package not installed.*'kdpipe\[train\]'"
    ):
        require_extra("train", "json", "no_such_package")
