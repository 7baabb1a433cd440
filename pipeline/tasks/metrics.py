"""How good, how equal: numbers from logits and labels."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from scipy.special import softmax
from scipy.stats import binomtest

if TYPE_CHECKING:
    from numpy.typing import NDArray


def top1(logits: NDArray[np.floating], labels: NDArray[np.int64]) -> float:
    """Fraction 0..1 of rows whose largest logit is the label; logits (N, classes), labels (N,)."""
    return float((logits.argmax(axis=1) == labels).mean())


def agreement(one: NDArray[np.floating], other: NDArray[np.floating]) -> float:
    """Fraction 0..1 of rows on which two (N, classes) arrays of logits choose the same class."""
    return float((one.argmax(axis=1) == other.argmax(axis=1)).mean())


def expected_calibration_error(
    logits: NDArray[np.floating], labels: NDArray[np.int64], bins: int = 15
) -> float:
    """How far confidence is from accuracy, 0..1: their gap per bin, weighted by the bin's rows.

    Args:
        logits: (N, classes).
        labels: (N,), class indices.
        bins: of equal width over the confidence, the softmax probability of the chosen class.

    Source:
        Guo, Pleiss, Sun, Weinberger 2017, section 2.
    """
    confidence = softmax(logits.astype(np.float64), axis=1).max(axis=1)
    right = logits.argmax(axis=1) == labels
    bin_of = np.minimum((confidence * bins).astype(int), bins - 1)
    gaps = np.bincount(bin_of, weights=right - confidence, minlength=bins)
    return float(np.abs(gaps).sum() / len(labels))


def proportion_interval(fraction: float, n: int) -> tuple[float, float]:
    """The 95 % interval of a fraction that was counted on n rows (Wilson 1927)."""
    found = binomtest(round(fraction * n), n).proportion_ci(method="wilson")
    return float(found.low), float(found.high)
