"""Facts are what the manifest holds: the same keys, order and values, read by attribute."""

import json

import msgspec
import pytest

from pipeline.facts import CalibrateFacts, Facts, RunFacts
from pipeline.run.manifest import load_manifest
from pipeline.stages import load_stages

STAGES = load_stages()


def types_in(kind, seen):
    """A Struct and all Structs in its fields."""
    if kind in seen:
        return
    seen.add(kind)
    for field in msgspec.structs.fields(kind):
        for part in [field.type, *getattr(field.type, "__args__", ())]:
            if isinstance(part, type) and issubclass(part, msgspec.Struct):
                types_in(part, seen)


@pytest.mark.parametrize("stage", STAGES)
def test_the_manifest_holds_what_the_types_write(finished, stage):
    tree = finished.manifest["stages"][stage]["facts"]
    facts = msgspec.convert(tree, STAGES[stage].facts)
    assert json.dumps(msgspec.to_builtins(facts)) == json.dumps(tree)


def test_a_fact_is_read_by_attribute_and_a_misspelled_one_is_refused(finished):
    facts = load_manifest(finished.folder).facts("calibrate", CalibrateFacts)
    assert facts.int8_loss_points == pytest.approx(100 * (facts.score_float - facts.score_int8))
    with pytest.raises(AttributeError, match="int8_loss_point"):
        _ = facts.int8_loss_point
    with pytest.raises(AttributeError, match="immutable"):
        facts.int8_loss_points = 0.0


@pytest.mark.parametrize("stage", STAGES)
def test_no_struct_takes_an_unknown_field_or_changes(stage):
    kinds = set()
    types_in(STAGES[stage].facts, kinds)
    assert all(
        kind.__struct_config__.frozen and kind.__struct_config__.forbid_unknown_fields
        for kind in kinds
    )
    assert Facts in STAGES[stage].facts.__mro__


def test_the_facts_of_a_run_name_every_stage():
    assert list(RunFacts.__annotations__) == list(STAGES)
    assert RunFacts(lambda stage: f"facts of {stage}").distill == "facts of distill"
