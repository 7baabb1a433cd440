import pytest

from pipeline.params.benchmark import Limits
from pipeline.parity.legs import Leg, export_leg, int8_leg

LIMITS = Limits(
    max_png_levels=2.0, max_yaml_difference=1e-5, max_export_difference=1e-3, max_int8_loss=1.5
)

PNG = {"max_abs_difference": 0.5, "fields": [], "grey_level": 0.25}
YAML = {"max_abs_difference": 1e-5, "fields": []}
EXPORT = {"max_abs_logit_difference": 1e-3, "top1_agreement": 1.0}
INT8 = {
    "top1_float": 0.9123,
    "top1_int8": 0.9,
    "loss_points": 1.23,
    "loss_interval95_points": [0.5, 1.5],
    "top1_agreement": 0.985,
    "cosine_mean": 0.998,
    "cosine_min": 0.91,
    "sqnr_db": 31.26,
}


def leg(name, values, **changes):
    return Leg(name, "one", "other", 60, {**values, **changes})


@pytest.mark.parametrize(
    ("name", "values", "limit"),
    [
        ("png", PNG, "0.5"),
        ("yaml", YAML, "1e-05"),
        ("export", EXPORT, "0.001, 100 %"),
        ("int8", INT8, "1.5 points"),
    ],
)
def test_a_leg_at_its_limit_passes(name, values, limit):
    assert leg(name, values).judge(LIMITS) == (limit, True)


@pytest.mark.parametrize(
    ("name", "values", "changes"),
    [
        ("png", PNG, {"max_abs_difference": 0.5001}),
        ("png", PNG, {"max_abs_difference": None}),
        ("png", PNG, {"fields": ["mean is 1, preprocessing.json gives 2"]}),
        ("yaml", YAML, {"max_abs_difference": 1.01e-5}),
        ("yaml", YAML, {"max_abs_difference": None}),
        ("yaml", YAML, {"fields": ["normalize.mean is 1, needed is 2"]}),
        ("export", EXPORT, {"max_abs_logit_difference": 1.01e-3}),
        ("export", EXPORT, {"top1_agreement": 0.9999}),
        ("int8", INT8, {"loss_interval95_points": [0.5, 1.51]}),
        ("png", PNG, {"max_abs_difference": float("nan")}),
        ("export", EXPORT, {"max_abs_logit_difference": float("nan")}),
    ],
)
def test_a_leg_beyond_its_limit_fails(name, values, changes):
    assert leg(name, values, **changes).judge(LIMITS)[1] is False


def test_where_nothing_is_resized_bilinear_not_even_rounding_is_allowed():
    exact = {"grey_level": 0.0}
    assert leg("png", PNG, **exact, max_abs_difference=0.0).judge(LIMITS) == ("0", True)
    assert leg("png", PNG, **exact, max_abs_difference=1e-9).judge(LIMITS) == ("0", False)


@pytest.mark.parametrize("name", ["png", "yaml", "export", "int8"])
def test_a_leg_that_does_not_apply_is_neither_passed_nor_failed(name):
    idle = Leg(name, "one", "other", 0, obstacle="ten bands")
    assert idle.judge(LIMITS) == ("", None)
    assert idle.words() == "does not apply: ten bands"


@pytest.mark.parametrize(
    ("found", "words"),
    [
        (leg("png", PNG), "max abs difference 0.5"),
        (
            leg("yaml", YAML, max_abs_difference=None, fields=["first", "second"]),
            "no tensor; first; second",
        ),
        (leg("export", EXPORT), "max abs logit difference 0.001, top-1 agreement 100.00%"),
        (
            leg("int8", INT8),
            "loss +1.23 points (95 % interval +0.50 to +1.50), top-1 0.9123 and 0.9000, agreement "
            "98.50%, cosine mean 0.9980 min 0.9100, SQNR 31.3 dB",
        ),
    ],
)
def test_a_leg_says_what_it_found(found, words):
    assert found.words() == words


def test_outputs_without_any_noise_have_no_ratio():
    assert leg("int8", INT8, sqnr_db=None).words().endswith("SQNR without noise")


def test_the_legs_of_distill_and_calibrate_are_what_these_recorded():
    distill = {"n_val": 7, "export": {**EXPORT, "more": 1}, "top1_val": 0.9}
    assert export_leg(distill) == Leg(
        "export", "torch student", "ONNX student in onnxruntime", 7, EXPORT
    )
    calibrate = {
        "n_val": 7,
        "backend": "emulator",
        "measured_on": "host-emulation",
        "top1_val_float": 0.9123,
        "top1_val_int8": 0.9,
        "int8_loss_points": 1.23,
        "int8_loss_interval95_points": [0.5, 1.5],
        "top1_agreement": 0.985,
        "logits_cosine_mean": 0.998,
        "logits_cosine_min": 0.91,
        "logits_sqnr_db": 31.26,
    }
    target = "int8 on the host (emulator, host-emulation)"
    assert int8_leg(calibrate) == Leg("int8", "float ONNX", target, 7, INT8)
