import pytest

from pipeline.tasks.metrics import proportion_interval


def test_the_interval_of_a_fraction_is_wilsons():
    # 81 of 263: Newcombe 1998, table I
    assert proportion_interval(81 / 263, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    low, high = proportion_interval(1.0, 60)
    assert 0.93 < low < 0.95
    assert high == 1.0
