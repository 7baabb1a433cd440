"""One class per patch: targets are class indices (N,), logits (N, classes), the score is top-1."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from scipy.special import softmax

from preprocessing.scores import Comparison, Top1, decide

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from pipeline.tasks.task import Table
    from preprocessing.scores import Metric


class Classification:
    """See `pipeline.tasks.task.Task`."""

    name = "classification"
    score = Top1.name
    title = Top1.title
    monitor = f"val_{Top1.name}"

    def output_fault(self, shape: Sequence[int], classes: int, size_hw: tuple[int, int]) -> str:
        """A value per class is needed, and no positions."""
        if len(shape) != 2:
            return f"gives {tuple(shape[1:])} per patch, not one value per class"
        if shape[1] != classes:
            return f"has {shape[1]} classes, but preprocessing.json labels {classes}"
        return ""

    def target_fault(self, targets: NDArray[np.integer], classes: int) -> str:
        """Every label must be an index into the contract's classes."""
        bad = np.flatnonzero((targets < 0) | (targets >= classes))
        if not len(bad):
            return ""
        return (
            f"its labels hold {targets[bad[0]]} in row {bad[0]} ({len(bad)} such rows), but "
            f"preprocessing.json labels {classes} classes: 0 to {classes - 1}"
        )

    def class_counts(self, targets: NDArray[np.int64], classes: int) -> list[int]:
        """How many patches each class has."""
        return [int(n) for n in np.bincount(targets[targets >= 0], minlength=classes)]

    def stratify(self, targets: NDArray[np.int64], fraction: float, seed: int) -> NDArray[np.bool_]:
        """Draw a share of every class at random; at least one patch of each stays."""
        random = np.random.default_rng(seed)
        mask = np.zeros(len(targets), bool)
        for label in np.unique(targets):
            members = np.flatnonzero(targets == label)
            count = min(max(1, round(fraction * len(members))), len(members) - 1)
            mask[random.permutation(members)[:count]] = True
        return mask

    def table(self, classes: int) -> Table:
        """Counts top-1, macro F1, balanced accuracy and calibration error."""
        return ClassificationTable(classes)

    def metric(self) -> Metric:
        """Counts top-1."""
        return Top1()

    def comparison(self, patches: int) -> Comparison:
        """Counts how alike two classifiers are."""
        return Comparison(self.name, patches)


TASK = Classification()


class ClassificationTable:
    """See `pipeline.tasks.task.Table`.

    Attributes:
        confusion: int64, (classes, classes): row = the label, column = the decision.
    """

    def __init__(self, classes: int, bins: int = 15) -> None:
        """Count nothing yet.

        Args:
            classes: number of classes.
            bins: of equal width over the confidence, for the calibration error.
        """
        self.confusion: NDArray[np.int64] = np.zeros((classes, classes), np.int64)
        self._gaps = np.zeros(bins)

    def add(self, logits: NDArray[np.floating], targets: NDArray[np.int64]) -> None:
        """Count a block: logits (n, classes), class indices (n,)."""
        classes = decide(logits)
        np.add.at(self.confusion, (targets, classes), 1)
        confidence = softmax(logits.astype(np.float64), axis=1).max(axis=1)
        bins = len(self._gaps)
        bin_of = np.minimum((confidence * bins).astype(int), bins - 1)
        np.add.at(self._gaps, bin_of, (classes == targets) - confidence)

    def figures(self) -> dict[str, float]:
        """By name; the first is the score."""
        return {
            "score": self.top1(),
            "macro_f1": self.macro_f1(),
            "balanced_accuracy": self.balanced_accuracy(),
            "ece": self.expected_calibration_error(),
        }

    def top1(self) -> float:
        """Fraction 0..1 of patches whose largest logit is that of the label."""
        return float(self.confusion.trace() / self.confusion.sum())

    def macro_f1(self) -> float:
        """F1 score 0..1, the unweighted mean over the classes that are a label or a decision."""
        labels, decisions = self.confusion.sum(axis=1), self.confusion.sum(axis=0)
        present = labels + decisions > 0
        right = self.confusion.diagonal()[present]
        return float((2 * right / (labels + decisions)[present]).mean())

    def balanced_accuracy(self) -> float:
        """Recall 0..1, the unweighted mean over the classes that are a label."""
        labels = self.confusion.sum(axis=1)
        return float((self.confusion.diagonal()[labels > 0] / labels[labels > 0]).mean())

    def expected_calibration_error(self) -> float:
        """How far confidence is from accuracy, 0..1: their gap per bin, weighted by its patches.

        The confidence is the softmax probability of the chosen class.

        Source:
            Guo, Pleiss, Sun, Weinberger 2017, section 2.
        """
        return float(np.abs(self._gaps).sum() / self.confusion.sum())
