import json

import msgspec
import pytest

from metis.backend import BackendError, QuantizedModel
from pipeline.calibration.schemes import quantize_best
from pipeline.facts import ComparisonFacts

#: By scheme: top-1 of the int8 model, SQNR of its logits in dB.
FIGURES = {"a": (0.8, 30.0), "b": (0.9, 20.0), "c": (0.9, 25.0), "exact": (0.9, None)}


def quantize(scheme, into):
    if scheme.startswith("no"):
        raise BackendError(f"the SDK refused {scheme}")
    into.mkdir()
    model = QuantizedModel(into, "x", "voyager", "1.8.0", scheme, (), ())
    model.save()
    return model


def measure(model):
    score, sqnr = FIGURES[model.scheme]
    return ComparisonFacts(
        n_val=10,
        score_float=0.9,
        score_int8=score,
        measured_on="host-emulation",
        agreement=1.0,
        logits_cosine_mean=1.0,
        logits_cosine_min=1.0,
        logits_sqnr_db=sqnr,
        int8_loss_points=0.0,
        int8_loss_interval95_points=(0.0, 0.0),
    )


@pytest.mark.parametrize(
    ("schemes", "best"),
    [("a", "a"), ("ab", "b"), ("abc", "c"), ("cba", "c"), (["a", "c", "exact"], "exact")],
)
def test_the_best_score_is_kept_then_the_best_sqnr(tmp_path, schemes, best):
    model, figures, rows = quantize_best(quantize, measure, schemes, tmp_path / "int8")
    assert model.scheme == best
    assert figures.score_int8 == FIGURES[best][0]
    assert [row.scheme for row in rows] == list(schemes)
    assert [row.scheme for row in rows if row.chosen] == [best]
    assert list(tmp_path.iterdir()) == [tmp_path / "int8"]
    assert json.loads((tmp_path / "int8" / "quantized.json").read_text())["scheme"] == best


def test_a_scheme_that_is_refused_is_a_row_and_all_of_them_are_an_error(tmp_path):
    _, _, rows = quantize_best(quantize, measure, ["no1", "a"], tmp_path / "int8")
    assert msgspec.to_builtins(rows[0]) == {
        "scheme": "no1",
        "refused": "the SDK refused no1",
        "chosen": False,
    }
    with pytest.raises(BackendError, match="the SDK refused no1"):
        quantize_best(quantize, measure, ["no1", "no2"], tmp_path / "other")
