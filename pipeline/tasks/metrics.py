"""How good, how equal: numbers from logits and labels."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
from scipy.special import softmax
from scipy.stats import binomtest
from sklearn.metrics import f1_score, recall_score

if TYPE_CHECKING:
    from numpy.typing import NDArray


#: Two-sided 95 % quantile of the normal distribution.
Z95 = 1.959963984540054


def top1(logits: NDArray[np.floating], labels: NDArray[np.int64]) -> float:
    """Fraction 0..1 of rows whose largest logit is the label; logits (N, classes), labels (N,)."""
    return float((logits.argmax(axis=1) == labels).mean())


def agreement(one: NDArray[np.floating], other: NDArray[np.floating]) -> float:
    """Fraction 0..1 of rows on which two (N, classes) arrays of logits choose the same class."""
    return float((one.argmax(axis=1) == other.argmax(axis=1)).mean())


def undisputed_agreement(
    reference: NDArray[np.floating], other: NDArray[np.floating], tolerance: float
) -> float:
    """Agreement over the rows that are no tie: best and second logit differ by over `tolerance`.

    Within the tolerance that two implementations of one network are allowed, either class is right.
    """
    best = np.sort(reference, axis=1)[:, -2:]
    clear = best[:, 1] - best[:, 0] > tolerance
    return agreement(reference[clear], other[clear]) if clear.any() else 1.0


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


def macro_f1(logits: NDArray[np.floating], labels: NDArray[np.int64]) -> float:
    """F1 score 0..1, the unweighted mean over the classes that appear."""
    return float(f1_score(labels, logits.argmax(axis=1), average="macro", zero_division=0))


def balanced_accuracy(logits: NDArray[np.floating], labels: NDArray[np.int64]) -> float:
    """Recall 0..1, the unweighted mean over the classes that appear in the labels."""
    present = np.unique(labels)
    return float(recall_score(labels, logits.argmax(axis=1), labels=present, average="macro"))


def sqnr_db(signal: NDArray[np.floating], noisy: NDArray[np.floating]) -> float | None:
    """Signal to quantization noise ratio in dB: 10 log10(sum s^2 / sum (s - n)^2).

    Returns:
        None when there is no noise at all.
    """
    noise = float(np.square(signal.astype(np.float64) - noisy).sum())
    power = float(np.square(signal.astype(np.float64)).sum())
    return 10 * math.log10(power / noise) if noise > 0 and power > 0 else None


def cosines(one: NDArray[np.floating], other: NDArray[np.floating]) -> NDArray[np.float64]:
    """Cosine between the rows of two (N, classes) arrays, (N,).

    Where both rows are zero it is 1, where only one is, 0: an output that collapsed is not alike.
    """
    a, b = one.astype(np.float64), other.astype(np.float64)
    of_a, of_b = np.linalg.norm(a, axis=1), np.linalg.norm(b, axis=1)
    norms = of_a * of_b
    without_direction = np.where(of_a == of_b, 1.0, 0.0)
    safe = np.where(norms > 0, norms, 1)
    result: NDArray[np.float64] = np.where(norms > 0, (a * b).sum(axis=1) / safe, without_direction)
    return result


def proportion_interval(fraction: float, n: int) -> tuple[float, float]:
    """The 95 % interval of a fraction that was counted on n rows (Wilson 1927)."""
    found = binomtest(round(fraction * n), n).proportion_ci(method="wilson")
    return float(found.low), float(found.high)


def paired_difference(
    one: NDArray[np.bool_], other: NDArray[np.bool_]
) -> tuple[float, tuple[float, float]]:
    """How much more often `one` is right than `other` on the same rows, with a 95 % interval.

    Args:
        one: right or wrong per row, (N,).
        other: the same rows.

    Returns:
        The difference of the two fractions, and its interval.

    Source:
        Bonett and Price 2012, adjusted Wald interval for paired binomial proportions.
    """
    n = len(one)
    only_one = int((one & ~other).sum())
    only_other = int((other & ~one).sum())
    p12, p21 = (only_one + 1) / (n + 2), (only_other + 1) / (n + 2)
    half = Z95 * math.sqrt((p12 + p21 - (p12 - p21) ** 2) / (n + 2))
    center = p12 - p21
    return (only_one - only_other) / n, (max(-1.0, center - half), min(1.0, center + half))
