import numpy as np
import pytest

from pipeline.tasks.classification import TASK


def table(logits, targets, block=None):
    found = TASK.table(logits.shape[1])
    for start in range(0, len(logits), block or len(logits)):
        rows = slice(start, start + (block or len(logits)))
        found.add(logits[rows], targets[rows])
    return found


def test_a_row_of_confusions_is_a_label():
    found = table(np.eye(3)[[0, 2, 2, 1]], np.array([0, 1, 1, 1]))
    assert found.confusion.tolist() == [[1, 0, 0], [0, 1, 2], [0, 0, 0]]


def test_figures_by_hand():
    # Labels 0, 0, 0, 1; decisions 0, 0, 1, 1. Class 2 neither is a label nor a decision.
    logits = np.log(np.array([[7, 2, 1], [8, 1, 1], [2, 6, 2], [1, 8, 1]]) / 10)
    found = table(logits, np.array([0, 0, 0, 1])).figures()
    assert next(iter(found)) == "score"
    assert found["score"] == 0.75
    assert found["macro_f1"] == pytest.approx((2 * 2 / (3 + 2) + 2 * 1 / (1 + 2)) / 2)
    assert found["balanced_accuracy"] == pytest.approx((2 / 3 + 1) / 2)
    # Confidences 0.7, 0.8, 0.6, 0.8, each alone in its bin of 15 but the two of 0.8.
    gaps = abs(1 - 0.7) + abs(2 - 1.6) + abs(0 - 0.6)
    assert found["ece"] == pytest.approx(gaps / 4)


def test_figures_do_not_depend_on_the_blocks():
    random = np.random.default_rng(0)
    logits = random.normal(size=(1000, 7)).astype(np.float32)
    targets = random.integers(7, size=1000)
    whole, parts = table(logits, targets), table(logits, targets, 37)
    assert whole.figures() == parts.figures()
    assert np.array_equal(whole.confusion, parts.confusion)


@pytest.mark.parametrize(
    ("shape", "fault"),
    [
        ((8, 3), ""),
        ((8, 4), "has 4 classes, but preprocessing.json labels 3"),
        ((8, 3, 16, 16), "gives (3, 16, 16) per patch, not one value per class"),
        ((8,), "gives () per patch, not one value per class"),
    ],
)
def test_an_output_has_one_value_per_class(shape, fault):
    assert TASK.output_fault(shape, 3, (16, 16)) == fault


def test_a_label_is_an_index_into_the_classes():
    assert TASK.target_fault(np.array([0, 2, 1]), 3) == ""
    assert TASK.target_fault(np.array([0, 3, 1, -1]), 3).startswith(
        "its labels hold 3 in row 1 (2 such rows), but preprocessing.json labels 3 classes: 0 to 2"
    )


def test_class_counts_know_classes_without_a_patch_and_leave_out_what_has_no_label():
    assert TASK.class_counts(np.array([0, 2, 2, -1]), 4) == [1, 0, 2, 0]


def test_every_class_gives_its_share_and_keeps_a_patch():
    targets = np.repeat([0, 1, 2], [100, 50, 1])
    drawn = TASK.stratify(targets, 0.2, seed=0)
    assert TASK.class_counts(targets[drawn], 3) == [20, 10, 0]
    assert np.array_equal(drawn, TASK.stratify(targets, 0.2, seed=0))
    assert not np.array_equal(drawn, TASK.stratify(targets, 0.2, seed=1))
