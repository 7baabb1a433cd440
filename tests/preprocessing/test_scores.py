import math
import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from preprocessing.scores import (
    METRICS,
    Comparison,
    StreamedSum,
    Top1,
    cosines,
    decibels,
    decide,
    without_positions,
)


def compare(reference, network, targets, block=None):
    comparison = Comparison("classification", len(reference))
    for start in range(0, len(reference), block or len(reference)):
        rows = slice(start, start + (block or len(reference)))
        comparison.add(reference[rows], network[rows], targets[rows])
    return comparison


def test_top1_and_agreement_by_hand():
    one = np.array([[0.1, 0.9], [0.8, 0.2], [0.3, 0.7], [0.6, 0.4]])
    other = one.copy()
    other[3] = [0.4, 0.6]
    comparison = compare(one, other, np.array([1, 0, 0, 0]))
    assert comparison.reference.score().value == 0.75
    assert comparison.network.score().value == 0.5
    assert comparison.network.score().n == comparison.n == 4
    assert comparison.agreement() == 0.75
    assert comparison.max_difference == pytest.approx(0.2)


def test_where_networks_differ_by_more_than_best_and_second_nothing_is_disputed_but_ties():
    one = np.array([[1.0, 0.9], [5.0, 0.0]])
    other = np.array([[1.0, 1.2], [5.0, 0.0]])
    comparison = compare(one, other, np.array([0, 0]))
    assert comparison.agreement() == 0.5
    assert comparison.undisputed_agreement() == 1.0


def test_the_class_axis_is_the_second_whatever_follows():
    logits = np.zeros((2, 3, 4, 5))
    logits[:, 2, 1:] = 1.0
    assert decide(logits).shape == (2, 4, 5)
    assert decide(logits)[0, :, 0].tolist() == [0, 2, 2, 2]
    maps = Comparison("classification", 2)
    maps.add(logits, logits, decide(logits))
    assert maps.agreement() == maps.undisputed_agreement() == 1.0
    assert maps.cosines() == pytest.approx([1.0, 1.0])


@pytest.mark.parametrize("shape", [(7, 5), (7, 5, 1, 1), (7, 1, 1, 5)])
def test_a_single_position_is_none(shape):
    assert without_positions(np.zeros(shape, np.float32)).shape == (7, 5)


@pytest.mark.parametrize("shape", [(7, 5, 2, 1), (7, 5, 2, 2), (1, 1), (7, 1), (7,)])
def test_other_outputs_stay_as_they_are(shape):
    assert without_positions(np.zeros(shape, np.float32)).shape == shape


def test_one_patch_stays_a_patch():
    assert without_positions(np.zeros((1, 5, 1, 1), np.float32)).shape == (1, 5)


def test_sqnr_by_hand():
    signal = np.array([[3.0, 4.0]])
    noisy = compare(signal, signal + np.array([[0.5, 0.0]]), np.array([0]))
    assert noisy.sqnr_db() == pytest.approx(10 * math.log10(25 / 0.25))
    assert compare(signal, signal, np.array([0])).sqnr_db() is None
    assert decibels(0.0, 1.0) is None


def test_cosines_by_hand_also_of_rows_of_zeros():
    one = np.array([[3.0, 4.0], [1.0, 0.0], [1.0, 2.0], [0.0, 0.0], [0.0, 0.0]])
    other = np.array([[4.0, 3.0], [0.0, 5.0], [-2.0, -4.0], [0.0, 0.0], [1.0, 0.0]])
    assert cosines(one, other) == pytest.approx([24 / 25, 0.0, -1.0, 1.0, 0.0])


def test_cosines_of_large_float32_rows_do_not_overflow():
    rows = np.full((2, 3), 1e30, np.float32)
    assert cosines(rows, -rows) == pytest.approx([-1.0, -1.0])


def counted(right):
    metric = Top1()
    metric.add(right.astype(np.int64), np.ones(len(right), np.int64))
    return metric


def test_paired_difference_by_hand():
    # 100 rows, 5 right for one only, 2 for the other only (Bonett and Price 2012, eq. 2).
    one = counted(np.array([True] * 5 + [False] * 2 + [True] * 93))
    other = counted(np.array([False] * 5 + [True] * 2 + [True] * 93))
    found = one.difference(other)
    p12, p21 = 6 / 102, 3 / 102
    half = 1.959964 * math.sqrt((p12 + p21 - (p12 - p21) ** 2) / 102)
    assert found.value == pytest.approx(0.03)
    assert (found.low, found.high) == pytest.approx((p12 - p21 - half, p12 - p21 + half))


@given(st.integers(1, 300).flatmap(lambda n: hnp.arrays(bool, (2, n))))
def test_the_interval_holds_the_shrunk_difference_and_turns_with_the_sides(rows):
    one, other = map(counted, rows)
    found, back = one.difference(other), other.difference(one)
    assert -1 <= found.low <= found.high <= 1
    assert back.value == pytest.approx(-found.value)
    assert (back.low, back.high) == pytest.approx((-found.high, -found.low))


def test_the_interval_covers_the_truth_about_as_often_as_it_says():
    random = np.random.default_rng(0)
    covered = 0
    for _ in range(400):
        u = random.random(300)
        one, other = counted(u < 0.9), counted((u < 0.87) | (u > 0.985))  # truth 0.9 - 0.885
        found = one.difference(other)
        covered += found.low <= 0.015 <= found.high
    assert 0.91 <= covered / 400 <= 0.99


@given(st.integers(1, 400_000), st.integers(1, 70_000), st.integers(0, 2**32))
def test_a_sum_does_not_depend_on_the_blocks(size, block, seed):
    values = np.random.default_rng(seed).normal(size=size) ** 2
    sums = []
    for step in (block, size):
        total = StreamedSum(size)
        for start in range(0, size, step):
            total.add(values[start : start + step])
        sums.append(total.total())
    assert sums[0] == sums[1] == pytest.approx(math.fsum(values), rel=1e-12)


@given(st.integers(2, 200), st.integers(2, 9), st.integers(1, 64), st.integers(0, 2**32))
def test_a_comparison_does_not_depend_on_the_blocks(patches, classes, block, seed):
    random = np.random.default_rng(seed)
    reference = random.normal(size=(patches, classes)).astype(np.float32)
    network = reference + random.normal(size=reference.shape).astype(np.float32) / 4
    targets = random.integers(classes, size=patches)
    whole, parts = (compare(reference, network, targets, step) for step in (None, block))
    assert parts.loss() == whole.loss()
    assert parts.sqnr_db() == whole.sqnr_db()
    assert parts.agreement() == whole.agreement()
    assert parts.undisputed_agreement() == whole.undisputed_agreement()
    assert parts.max_difference == whole.max_difference
    assert np.array_equal(parts.cosines(), whole.cosines())


def test_a_comparison_of_many_classes_keeps_a_few_numbers_per_patch():
    """20,000 patches of 1,000 classes are 80 MB of logits a network; a block of 100 is 0.4 MB."""
    patches, classes, block = 20_000, 1000, 100
    random = np.random.default_rng(0)
    logits = random.normal(size=(block, classes)).astype(np.float32)
    comparison = Comparison("classification", patches)
    tracemalloc.start()
    for _ in range(0, patches, block):
        comparison.add(logits, logits + 1, np.zeros(block, np.int64))
    comparison.sqnr_db(), comparison.loss()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    # A float64 copy of the block and its squares, a few at once, and 30 bytes per patch.
    assert peak < 12 * block * classes * 8 + 30 * patches


def test_every_task_has_its_metric():
    from pipeline.tasks.task import TASKS, open_task

    assert METRICS.keys() == TASKS.keys()
    for name in TASKS:
        task = open_task(name)
        assert task.name == name
        assert (task.score, task.title) == (task.metric().name, task.metric().title)
