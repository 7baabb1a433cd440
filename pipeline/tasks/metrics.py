"""How sure a score is."""

from __future__ import annotations

from scipy.stats import binomtest


def proportion_interval(fraction: float, n: int) -> tuple[float, float]:
    """The 95 % interval of a fraction that was counted on n rows (Wilson 1927)."""
    interval = binomtest(round(fraction * n), n).proportion_ci(method="wilson")
    return float(interval.low), float(interval.high)
