import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from metis.voyager.device_constants import constant_error, exact_range


def test_the_error_of_the_lcz42_statistics_by_hand():
    # sigma of B2 is 3.605 of 255: 0.014137 is printed as 0.014, so the scale is off by 0.98 %.
    error = constant_error(mean=11.271, std=3.605)
    assert error.mean_kept == pytest.approx(0.044 * 255)
    assert error.std_kept == pytest.approx(0.014 * 255)
    assert error.scale_error == pytest.approx(3.605 / 3.57 - 1)
    # At z = 3: ((11.271 + 3 * 3.605) - 11.22) / 3.57 - 3 = 0.0437.
    assert error.worst == pytest.approx((11.271 + 3 * 3.605 - 11.22) / 3.57 - 3)
    assert error.worst == pytest.approx(0.0437, abs=5e-4)


def test_the_worst_scale_error_of_the_lcz42_statistics_is_the_published_one():
    """1.24 % among red, green and blue; 1.50 % among all ten bands."""
    sigmas = [3.605, 4.351, 6.044, 5.791, 7.053, 8.289, 8.395, 9.257, 9.100, 7.997]
    errors = [abs(constant_error(10.0, s).scale_error) for s in sigmas]
    assert max(errors[:3]) == pytest.approx(0.0124, abs=2e-4)
    assert max(errors) == pytest.approx(0.0150, abs=2e-4)


def test_a_std_below_half_a_thousandth_of_full_scale_vanishes():
    assert constant_error(10.0, 0.0004 * 255).worst is None
    assert constant_error(10.0, 0.0006 * 255).worst is not None


def test_constants_of_three_decimals_have_no_error():
    error = constant_error(0.485 * 255, 0.229 * 255)
    assert error.worst == pytest.approx(0, abs=1e-12)


@given(
    mu=st.floats(-50, 300),
    sigma=st.floats(0.01, 100),
    below=st.floats(0.5, 12),
    above=st.floats(0.5, 12),
)
def test_a_fitted_range_covers_what_it_must_and_its_constants_are_exact(mu, sigma, below, above):
    low, high = mu - below * sigma, mu + above * sigma
    lo, hi = exact_range(mu, sigma, low, high)
    slack = 1e-6 * sigma
    assert lo <= low + slack
    assert hi >= high - slack
    mean, std = (mu - lo) / (hi - lo) * 255, sigma / (hi - lo) * 255
    assert constant_error(mean, std).worst == pytest.approx(0, abs=1e-6)
    # And it wastes little: under a tenth of the levels.
    assert (hi - lo) < 1.1 * (high - low)


@given(st.floats(1, 400), st.floats(0.01, 10), st.floats(0.1, 5))
def test_a_mean_outside_the_range_is_served_too(offset, sigma, width):
    """Without z-score the mean is 0, which the data may never reach."""
    low, high = offset, offset + width
    assume(sigma > width / 900)
    lo, hi = exact_range(0.0, sigma, low, high)
    assert lo <= low + 1e-6
    assert hi >= high - 1e-6
    mean, std = (0 - lo) / (hi - lo) * 255, sigma / (hi - lo) * 255
    assert round(mean / 255, 3) == pytest.approx(mean / 255, abs=1e-7)
    assert round(std / 255, 3) == pytest.approx(std / 255, abs=1e-7)


def test_a_range_that_is_too_wide_is_refused():
    with pytest.raises(ValueError, match=r"over 1000 standard deviations of 0\.1 wide"):
        exact_range(0.0, 0.1, -60.0, 60.0)
