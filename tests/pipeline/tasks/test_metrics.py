import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from pipeline.tasks.metrics import (
    agreement,
    cosines,
    paired_difference,
    proportion_interval,
    sqnr_db,
    top1,
    undisputed_agreement,
)


def test_top1_and_agreement_by_hand():
    one = np.array([[0.1, 0.9], [0.8, 0.2], [0.3, 0.7], [0.6, 0.4]])
    other = one.copy()
    other[3] = [0.4, 0.6]
    assert top1(one, np.array([1, 0, 0, 0])) == 0.75
    assert agreement(one, other) == 0.75
    assert undisputed_agreement(one, other, tolerance=0.1) == 0.75
    assert undisputed_agreement(one, other, tolerance=0.25) == 1.0  # the last row was a tie


def test_sqnr_by_hand():
    signal = np.array([3.0, 4.0])
    assert sqnr_db(signal, signal + np.array([0.5, 0.0])) == pytest.approx(
        10 * math.log10(25 / 0.25)
    )
    assert sqnr_db(signal, signal) is None


def test_cosines_by_hand_also_of_rows_of_zeros():
    one = np.array([[3.0, 4.0], [1.0, 0.0], [1.0, 2.0], [0.0, 0.0], [0.0, 0.0]])
    other = np.array([[4.0, 3.0], [0.0, 5.0], [-2.0, -4.0], [0.0, 0.0], [1.0, 0.0]])
    assert cosines(one, other) == pytest.approx([24 / 25, 0.0, -1.0, 1.0, 0.0])


def test_cosines_of_large_float32_rows_do_not_overflow():
    rows = np.full((2, 3), 1e30, np.float32)
    assert cosines(rows, -rows) == pytest.approx([-1.0, -1.0])


def test_paired_difference_by_hand():
    # 100 rows, 5 right for one only, 2 for the other only (Bonett and Price 2012, eq. 2).
    one = np.array([True] * 5 + [False] * 2 + [True] * 93)
    other = np.array([False] * 5 + [True] * 2 + [True] * 93)
    difference, (low, high) = paired_difference(one, other)
    p12, p21 = 6 / 102, 3 / 102
    half = 1.959964 * math.sqrt((p12 + p21 - (p12 - p21) ** 2) / 102)
    assert difference == pytest.approx(0.03)
    assert (low, high) == pytest.approx((p12 - p21 - half, p12 - p21 + half))


@given(st.integers(1, 300).flatmap(lambda n: hnp.arrays(bool, (2, n))))
def test_the_interval_holds_the_shrunk_difference_and_turns_with_the_sides(rows):
    difference, (low, high) = paired_difference(*rows)
    back, (back_low, back_high) = paired_difference(*rows[::-1])
    assert -1 <= low <= high <= 1
    assert back == pytest.approx(-difference)
    assert (back_low, back_high) == pytest.approx((-high, -low))


def test_the_interval_of_a_fraction_is_wilsons():
    # 81 of 263: Newcombe 1998, table I
    assert proportion_interval(81 / 263, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    low, high = proportion_interval(1.0, 60)
    assert 0.93 < low < 0.95
    assert high == 1.0


def test_the_interval_covers_the_truth_about_as_often_as_it_says():
    random = np.random.default_rng(0)
    covered = 0
    for _ in range(400):
        u = random.random(300)
        one, other = u < 0.9, (u < 0.87) | (u > 0.985)  # true difference 0.9 - 0.885 = 0.015
        _, (low, high) = paired_difference(one, other)
        covered += low <= 0.015 <= high
    assert 0.91 <= covered / 400 <= 0.99
