import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from pipeline.teachers.ensemble import combine, fit_temperature, gives_probabilities, to_logits

LOGITS = arrays(np.float32, (7, 4), elements=st.floats(-20, 20, width=32))


def softmax(z):
    e = np.exp(z.astype(np.float64) - z.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


@given(LOGITS, st.sampled_from([1.0, 2.0, 8.0]))
def test_the_logarithm_of_probabilities_serves_like_the_logits(logits, temperature):
    probabilities = softmax(logits).astype(np.float32)
    assert gives_probabilities(probabilities)
    recovered = to_logits(probabilities, True)
    assert softmax(recovered / temperature) == pytest.approx(
        softmax(logits / temperature), abs=1e-5
    )


def test_logits_are_not_taken_for_probabilities():
    assert not gives_probabilities(np.array([[1.0, -1.0]], np.float32))
    assert not gives_probabilities(np.array([[0.9, 0.3]], np.float32))
    assert np.isfinite(to_logits(np.array([[1.0, 0.0]], np.float32), True)).all()


@given(LOGITS, LOGITS, st.floats(0.1, 10))
def test_weights_are_shares(one, other, scale):
    mean = combine([one, other], [1, 3])
    assert mean.dtype == np.float32
    assert mean == pytest.approx(0.25 * one + 0.75 * other, abs=1e-4)
    assert combine([one, other], [scale, 3 * scale]) == pytest.approx(mean, abs=1e-4)


@given(LOGITS, LOGITS)
def test_the_mean_of_probabilities_is_one(one, other):
    found = softmax(combine([one, other], [1, 3], "mean_probabilities"))
    assert found == pytest.approx(0.25 * softmax(one) + 0.75 * softmax(other), abs=1e-5)


@given(LOGITS, LOGITS)
def test_each_member_is_divided_by_its_own_temperature(one, other):
    found = combine([one, other], [1, 1], temperatures=[2.0, 0.5])
    assert found == pytest.approx(one / 4 + other, abs=1e-4)


@pytest.mark.parametrize("temperature", [0.3, 1.0, 4.0])
def test_a_temperature_that_was_put_on_is_found_again(temperature):
    random = np.random.default_rng(0)
    logits = random.normal(0, 2, (20_000, 4))
    labels = np.array([random.choice(4, p=p) for p in softmax(logits)])
    found = fit_temperature((logits * temperature).astype(np.float32), labels)
    assert found == pytest.approx(temperature, rel=0.05)
