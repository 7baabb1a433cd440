from types import SimpleNamespace

import pytest
from msgspec import structs

from pipeline.facts import (
    ComparisonFacts,
    ExportFacts,
    ExportLeg,
    ImageValues,
    Int8Leg,
    Int8Values,
    PngLeg,
    YamlLeg,
)
from pipeline.params.benchmark import Limits
from pipeline.parity.legs import export_leg, int8_leg, judge

LIMITS = Limits(
    max_png_levels=2.0, max_yaml_difference=1e-5, max_export_difference=1e-3, max_int8_loss=1.5
)

INT8 = Int8Values(
    score_float=0.9123,
    score_int8=0.9,
    loss_points=1.23,
    loss_interval95_points=(0.5, 1.5),
    agreement=0.985,
    cosine_mean=0.998,
    cosine_min=0.91,
    sqnr_db=31.26,
)

LEGS = {
    "png": PngLeg("one", "other", 60, ImageValues(0.5, (), 0.25)),
    "yaml": YamlLeg("one", "other", 60, ImageValues(1e-5, ())),
    "export": ExportLeg("one", "other", 60, ExportFacts(1e-3, 1.0)),
    "int8": Int8Leg("one", "other", 60, INT8),
}


def judged(name, **changes):
    leg = LEGS[name]
    return judge(structs.replace(leg, values=structs.replace(leg.values, **changes)), LIMITS)


@pytest.mark.parametrize(
    ("name", "limit"),
    [("png", "0.5"), ("yaml", "1e-05"), ("export", "0.001, 100 %"), ("int8", "1.5 points")],
)
def test_a_leg_at_its_limit_passes(name, limit):
    row = judged(name)
    assert (row.leg.name, row.limit, row.passed) == (name, limit, True)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("png", {"max_abs_difference": 0.5001}),
        ("png", {"max_abs_difference": None}),
        ("png", {"fields": ("mean is 1, preprocessing.json gives 2",)}),
        ("yaml", {"max_abs_difference": 1.01e-5}),
        ("yaml", {"max_abs_difference": None}),
        ("yaml", {"fields": ("normalize.mean is 1, needed is 2",)}),
        ("export", {"max_abs_logit_difference": 1.01e-3}),
        ("export", {"agreement": 0.9999}),
        ("int8", {"loss_interval95_points": (0.5, 1.51)}),
        ("png", {"max_abs_difference": float("nan")}),
        ("export", {"max_abs_logit_difference": float("nan")}),
    ],
)
def test_a_leg_beyond_its_limit_fails(name, changes):
    assert judged(name, **changes).passed is False


def test_where_nothing_is_resized_bilinear_not_even_rounding_is_allowed():
    same = judged("png", grey_level=0.0, max_abs_difference=0.0)
    assert (same.limit, same.passed) == ("0", True)
    assert judged("png", grey_level=0.0, max_abs_difference=1e-9).passed is False


@pytest.mark.parametrize("name", list(LEGS))
def test_a_leg_that_does_not_apply_is_neither_passed_nor_failed(name):
    idle = judge(structs.replace(LEGS[name], obstacle="ten bands"), LIMITS)
    assert (idle.limit, idle.passed) == ("", None)
    assert idle.message == "does not apply: ten bands"


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("png", {}, "max abs difference 0.5"),
        (
            "yaml",
            {"max_abs_difference": None, "fields": ("first", "second")},
            "no tensor; first; second",
        ),
        ("export", {}, "max abs logit difference 0.001, top-1 agreement 100.00%"),
        (
            "int8",
            {},
            "loss +1.23 points (95 % interval +0.50 to +1.50), top-1 0.9123 and 0.9000, agreement "
            "98.50%, cosine mean 0.9980 min 0.9100, SQNR 31.3 dB",
        ),
    ],
)
def test_a_leg_says_what_was_found(name, changes, message):
    assert judged(name, **changes).message == message


def test_outputs_without_any_noise_have_no_ratio():
    assert judged("int8", sqnr_db=None).message.endswith("SQNR without noise")


def test_a_leg_for_programs_has_its_name_first_and_the_verdict_last():
    assert list(judged("yaml").document().items()) == [
        ("name", "yaml"),
        ("source", "one"),
        ("target", "other"),
        ("n", 60),
        ("values", {"max_abs_difference": 1e-5, "fields": ()}),
        ("obstacle", ""),
        ("limit", "1e-05"),
        ("passed", True),
        ("words", "max abs difference 1e-05"),
    ]


def test_the_legs_of_distill_and_calibrate_are_what_these_recorded_or_what_was_measured_anew():
    distill = SimpleNamespace(n_val=7, export=ExportFacts(1e-3, 1.0))
    leg = export_leg(distill)
    assert leg == ExportLeg(
        "torch student", "ONNX student in onnxruntime", 7, ExportFacts(1e-3, 1.0)
    )
    assert export_leg(distill, ExportFacts(0.5, 0.9)).values == ExportFacts(0.5, 0.9)
    comparison = ComparisonFacts(
        n_val=7,
        score_float=0.9123,
        score_int8=0.9,
        measured_on="host-emulation",
        agreement=0.985,
        logits_cosine_mean=0.998,
        logits_cosine_min=0.91,
        logits_sqnr_db=31.26,
        int8_loss_points=1.23,
        int8_loss_interval95_points=(0.5, 1.5),
    )
    calibrate = SimpleNamespace(backend="emulator", **structs.asdict(comparison))
    target = "int8 on the host (emulator, host-emulation)"
    assert int8_leg(calibrate) == Int8Leg("float ONNX", target, 7, INT8)
    anew = structs.replace(comparison, n_val=9)
    assert int8_leg(calibrate, anew) == Int8Leg("float ONNX", target, 9, INT8)
