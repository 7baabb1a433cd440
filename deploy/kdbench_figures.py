"""From raw times to statistics, and from what was asked and reached to a verdict. numpy only."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from preprocessing.scores import METRICS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from kdbench_load import OfflineResult, Minima, SingleStreamResult
    from preprocessing.scores import Score

#: What a run needs to be VALID; a shorter one is a SMOKE run, never compared.
VALID_SECONDS = 60.0
VALID_QUERIES = 1024  # SingleStream
VALID_SAMPLES = 24_576  # Offline; MLPerf's minimum for ResNet-50

#: A percentile of a shorter run is null. Source: MLPerf LoadGen's early stopping at 99 % confidence
#: with one slower query allowed.
PERCENTILES = {
    "p50": (0.50, 1),
    "p90": (0.90, 64),
    "p95": (0.95, 130),
    "p99": (0.99, 662),
    "p999": (0.999, 6636),
}

#: Percentiles that get LoadGen's early-stopping bound beside them.
BOUNDED = ("p90", "p95", "p99", "p999")

#: A query this many times slower than the median is counted, never dropped.
SLOW = 5.0

#: The spread of fewer repeats says nothing.
SPREAD_REPEATS = 3


def summary(ns: NDArray[np.int64], scope: str, measured_on: str) -> dict[str, Any]:
    """Statistics of latencies in ms; a percentile is sorted[floor(q n)], as MLPerf LoadGen's."""
    ms = np.sort(ns) / 1e6
    is_long_enough = {name: len(ms) >= minimum for name, (_, minimum) in PERCENTILES.items()}
    figures = {
        name: float(ms[math.floor(q * len(ms))]) if is_long_enough[name] else None
        for name, (q, _) in PERCENTILES.items()
    }
    bounds = {
        name: early_stopping_bound(ms, PERCENTILES[name][0]) if is_long_enough[name] else None
        for name in BOUNDED
    }
    return {
        "scope": scope,
        "unit": "ms",
        "measured_on": measured_on,
        "n": len(ms),
        "min": float(ms[0]),
        "mean": float(ms.mean()),
        "std": float(ms.std()),
        **figures,
        "max": float(ms[-1]),
        "bounds": bounds,
    }


def early_stopping_bound(ordered: NDArray[np.float64], quantile: float) -> float | None:
    """What the true percentile does not exceed, at 99 % confidence; None for too few values.

    It is ordered[n - t] with the largest t >= 1 for which t or fewer values out of n beyond the
    true percentile have a probability of at most 1 %.

    Args:
        ordered: latencies, ascending.
        quantile: 0.9 for p90.

    Source:
        MLPerf LoadGen, early_stopping.cc and results.cc.
    """
    n = len(ordered)
    counts = np.arange(math.ceil(n * (1 - quantile)) + 1)
    steps = np.log((n - counts[:-1]) / (counts[:-1] + 1)) + math.log((1 - quantile) / quantile)
    log_probability = n * math.log(quantile) + np.concatenate([[0.0], np.cumsum(steps)])
    cumulated = np.cumsum(np.exp(log_probability))
    t = int(np.searchsorted(cumulated, 0.01, side="right")) - 1
    return float(ordered[n - t]) if t >= 1 else None


def stability(
    streams: Sequence[SingleStreamResult], offline_runs: Sequence[OfflineResult]
) -> dict[str, Any]:
    """Drift within a repeat, slow queries, and how far repeats lie apart; null where unknown.

    The drift is that of the repeat in which it is largest.
    """
    all_ns = np.concatenate([s.all_ns for s in streams]) if streams else np.empty(0, np.int64)
    median = float(np.median(all_ns)) if len(all_ns) else math.nan
    has_spread = len(streams) >= SPREAD_REPEATS
    p90 = [summary(s.all_ns, "", "")["p90"] for s in streams]
    rates = [f.frames / f.seconds for f in offline_runs]
    return {
        "drift": max(filter(None, map(_drift, streams)), key=_distance, default=None),
        "slow_queries": int((all_ns > SLOW * median).sum()),
        "slow_limit_ms": SLOW * median / 1e6 if len(all_ns) else None,
        "repeats": max(len(streams), len(offline_runs)),
        "spread_p90": _spread(p90) if has_spread and None not in p90 else None,
        "spread_throughput": _spread(rates) if len(rates) >= SPREAD_REPEATS else None,
    }


def _drift(stream: SingleStreamResult) -> float | None:
    """Median of the last tenth / of the first."""
    tenth = len(stream.all_ns) // 10
    if not tenth:
        return None
    return float(np.median(stream.all_ns[-tenth:]) / np.median(stream.all_ns[:tenth]))


def _distance(ratio: float) -> float:
    """From 1, alike for twice and half."""
    return abs(math.log(ratio))


def _spread(values: Sequence[float]) -> float:
    """(largest - smallest) / median."""
    return float((max(values) - min(values)) / np.median(values))


def throughput(offline_runs: Sequence[OfflineResult], measured_on: str) -> dict[str, Any]:
    """Frames per second of one way of buffering, over all its repeats."""
    frames, seconds = sum(f.frames for f in offline_runs), sum(f.seconds for f in offline_runs)
    buffering = "double" if offline_runs[0].double_buffer else "single"
    return {
        "value": frames / seconds,
        "unit": "frames/s",
        "measured_on": measured_on,
        "n": frames,
        "scope": f"tensor to logits, {offline_runs[0].instances} instances, {buffering} buffering",
    }


def accuracy(
    task: str,
    classes: NDArray[np.int64],
    targets: NDArray[np.int64],
    reference: NDArray[np.int64],
) -> tuple[Score, dict[str, float]]:
    """The score, and what it is below the float student's on the same images.

    Args:
        task: of the bundle.
        classes: decided here, (N, ...).
        targets: what is right, (N, ...).
        reference: decided by the float student on the host, (N, ...).

    Returns:
        The score; agreement as a fraction, loss and its 95 % interval in points of the score.
    """
    metric, float_metric = METRICS[task](), METRICS[task]()
    metric.add(classes, targets)
    float_metric.add(reference, targets)
    loss = float_metric.difference(metric)
    return metric.score(), {
        "agreement": float((classes == reference).mean()),
        "loss_points": 100 * loss.value,
        "loss_low": 100 * loss.low,
        "loss_high": 100 * loss.high,
    }


def judge(
    minima: Minima,
    streams: Sequence[SingleStreamResult],
    offline_runs: Sequence[OfflineResult],
    faults: Sequence[str],
) -> dict[str, Any]:
    """VALID; SMOKE when less was asked for; INVALID when less was reached or something was wrong.

    Args:
        minima: asked for.
        streams: every SingleStream, none if it was not asked for.
        offline_runs: every Offline, none if it was not asked for.
        faults: why the figures can't be trusted.
    """
    reasons = [*faults]
    for stream in streams:
        reasons += _short("SingleStream", stream.seconds, minima.seconds, "s")
        reasons += _short("SingleStream", len(stream.all_ns), minima.queries, "queries")
    for offline_run in offline_runs:
        reasons += _short("Offline", offline_run.seconds, minima.seconds, "s")
        reasons += _short("Offline", offline_run.frames, minima.samples, "samples")
    if reasons:
        return {"word": "INVALID", "reasons": list(dict.fromkeys(reasons))}
    asked = [f"{minima.seconds:g} s"] if minima.seconds < VALID_SECONDS else []
    needed = [f"{VALID_SECONDS:g} s"] if asked else []
    if streams and minima.queries < VALID_QUERIES:
        asked.append(f"{minima.queries} queries")
        needed.append(f"{VALID_QUERIES} queries")
    if offline_runs and minima.samples < VALID_SAMPLES:
        asked.append(f"{minima.samples} samples")
        needed.append(f"{VALID_SAMPLES} samples")
    if asked:
        words = f"asked for {', '.join(asked)}; VALID needs {', '.join(needed)}"
        return {"word": "SMOKE", "reasons": [words]}
    return {"word": "VALID", "reasons": []}


def _short(scenario: str, reached: float, asked: float, unit: str) -> list[str]:
    if reached >= asked:
        return []
    return [f"{scenario} measured {reached:.4g} of {asked:g} {unit}; measure longer"]


def per_interval(done_ns: NDArray[np.int64], batch: int, seconds: float) -> list[float]:
    """Frames per second in each whole interval of this length."""
    edges = np.arange(0.0, float(done_ns[-1]) + 1, seconds * 1e9)
    if len(edges) < 2:
        return [float(len(done_ns) * batch / (done_ns[-1] / 1e9))]
    counts, _ = np.histogram(done_ns, edges)
    return [float(count * batch / seconds) for count in counts]
