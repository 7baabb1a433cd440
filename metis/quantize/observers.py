"""Histograms of activations, and the ranges that observers choose from them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx

from metis.backend import OBSERVERS
from metis.graph.edit import show_tensors
from metis.graph.sessions import open_session

if TYPE_CHECKING:
    from numpy.typing import NDArray


#: Bins over -2^k .. 2^k; when a value lies outside, k grows and pairs of bins are merged.
BINS = 4096

#: About as many values per tensor and sample are counted; extremes and means use all of them.
COUNTED = 32_768

#: A quantile cuts this fraction off each end of a tensor.
PERCENTILE_CUT = 1e-4

#: Fractions of the observed extreme that the searching observers try.
_SHRINK = np.linspace(1.0, 0.1, 91)

#: Occupied bins that the entropy observer leaves inside a range, a few for each code.
_LEAST_BINS = 512

#: Bytes of activations that may be in memory at a time; a batch is as large as this allows.
_ACTIVATIONS_BYTES = 32 << 20

_MAX_BATCH = 32


class Histogram:
    """Counts of one tensor's values, its exact extremes, in 32 KB however many values come."""

    def __init__(self) -> None:
        self.counts: NDArray[np.int64] = np.zeros(BINS, np.int64)
        self.reach = 2.0**-16  # the bins cover -reach .. reach
        self.lo = math.inf
        self.hi = -math.inf

    def add(self, batch: NDArray[np.float32], extremes: tuple[float, float] | None = None) -> None:
        """Take in a batch, (N, ...); its extremes, where they are known, need no second look."""
        values = batch.reshape(len(batch), -1)
        sample = values[:, :: max(1, values.shape[1] // COUNTED) | 1]
        lo, hi = extremes or (float(values.min()), float(values.max()))
        self.lo, self.hi = min(self.lo, lo), max(self.hi, hi)
        while max(-self.lo, self.hi) >= self.reach:
            self._double()
        # The factor is a power of two, so no value is rounded, and none moves to another bin.
        bins = np.floor(sample.ravel() * np.float32(BINS / 2 / self.reach)).astype(np.intp)
        self.counts += np.bincount(bins + BINS // 2, minlength=BINS)

    def _double(self) -> None:
        merged = self.counts.reshape(-1, 2).sum(axis=1)
        self.counts = np.pad(merged, BINS // 4)
        self.reach *= 2

    @property
    def centers(self) -> NDArray[np.float64]:
        """Middle of every bin, (BINS,), kept inside what was seen."""
        middle = (np.arange(BINS) + 0.5) * (2 * self.reach / BINS) - self.reach
        return np.clip(middle, self.lo, self.hi)


def min_max(histogram: Histogram) -> tuple[float, float]:
    """The exact extremes."""
    return min(histogram.lo, 0.0), max(histogram.hi, 0.0)


def percentile(histogram: Histogram) -> tuple[float, float]:
    """Extremes without the outermost 0.01 % of the values at each end."""
    cumulative = np.cumsum(histogram.counts) / histogram.counts.sum()
    lo = histogram.centers[np.searchsorted(cumulative, PERCENTILE_CUT)]
    hi = histogram.centers[np.searchsorted(cumulative, 1 - PERCENTILE_CUT)]
    return min(float(lo), 0.0), max(float(hi), 0.0)


def mse(histogram: Histogram) -> tuple[float, float]:
    """The range whose 256 codes represent the values with the least squared error."""
    return _search(histogram, _squared_errors)


def entropy(histogram: Histogram) -> tuple[float, float]:
    """The range that loses least information: KL(values || values as 256 codes carry them).

    Source:
        Migacz 2017, "8-bit inference with TensorRT", on 4096 bins, for asymmetric ranges, and
        without the spikes at 0 and at the ends, which drove it to absurdly small ranges.
    """
    return _search(histogram, _divergences)


def find_range(observer: str, histogram: Histogram) -> tuple[float, float]:
    """The range (lo, hi) that an observer of the table chooses."""
    choose: Callable[[Histogram], tuple[float, float]] = resolve_name(OBSERVERS[observer])
    return choose(histogram)


_Cost = Callable[
    ["NDArray[np.float64]", "NDArray[np.float64]", "NDArray[np.float64]", "NDArray[np.float64]"],
    "NDArray[np.float64]",
]


def _search(histogram: Histogram, cost: _Cost) -> tuple[float, float]:
    """Shrink each end by the fraction that costs least, in turns until both ends stay."""
    used = np.flatnonzero(histogram.counts)
    centers = histogram.centers[used]
    counts = histogram.counts[used].astype(np.float64)
    ends = list(min_max(histogram))
    extremes = tuple(ends)
    for _ in range(3):
        previous = tuple(ends)
        for end in (0, 1):
            if extremes[end] == 0:
                continue
            candidates = _SHRINK * extremes[end]
            lo, hi = (
                (candidates, np.full_like(candidates, ends[1]))
                if end == 0
                else (np.full_like(candidates, ends[0]), candidates)
            )
            ends[end] = float(candidates[int(np.argmin(cost(centers, counts, lo, hi)))])
        if tuple(ends) == previous or 0 in extremes:
            break
    return ends[0], ends[1]


def _codes(
    centers: NDArray[np.float64], lo: NDArray[np.float64], hi: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Code 0..255 of every value for every candidate, (candidates, values), and the steps."""
    step = np.maximum((hi - lo) / 255, np.finfo(np.float32).tiny)[:, None]
    zero = np.rint(-lo[:, None] / step)
    return np.clip(np.rint(centers / step) + zero, 0, 255) - zero, step


def _squared_errors(
    centers: NDArray[np.float64],
    counts: NDArray[np.float64],
    lo: NDArray[np.float64],
    hi: NDArray[np.float64],
) -> NDArray[np.float64]:
    codes, step = _codes(centers, lo, hi)
    result: NDArray[np.float64] = np.square(codes * step - centers) @ counts
    return result


def _divergences(
    centers: NDArray[np.float64],
    counts: NDArray[np.float64],
    lo: NDArray[np.float64],
    hi: NDArray[np.float64],
) -> NDArray[np.float64]:
    counts = _without_spikes(centers, counts)
    share = counts / counts.sum()
    codes, _ = _codes(centers, lo, hi)
    result = np.full(len(lo), np.inf)
    for i, row in enumerate(codes.astype(np.int64)):
        inside = (centers >= lo[i] - 1e-12) & (centers <= hi[i] + 1e-12)
        if i and inside.sum() < _LEAST_BINS:
            continue  # with a bin or less for every code nothing is lost, by construction
        # A code gives its share to the bins that it stands for, evenly. What was cut off weighs on
        # the outermost bins, where the codes have nothing to set against it.
        cell = row - row[0]
        members = np.bincount(cell, weights=inside)
        mass = np.bincount(cell, weights=share * inside)
        carried = np.where(inside, (mass / np.maximum(members, 1))[cell], 0.0)
        first, last = np.flatnonzero(inside)[[0, -1]]
        target = np.where(inside, share, 0.0)
        target[first] += share[:first].sum()
        target[last] += share[last + 1 :].sum()
        is_positive = target > 0
        ratio = target[is_positive] / np.maximum(carried[is_positive] / carried.sum(), 1e-30)
        result[i] = float((target[is_positive] * np.log(ratio)).sum())
    return result


def _without_spikes(
    centers: NDArray[np.float64], counts: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Counts in which 0 and the ends, where a Relu or a Clip heaps values up, are like others.

    Codes stand for these exactly, so no information is lost there, whatever the range.
    """
    result: NDArray[np.float64] = counts.copy()
    typical = np.median(counts)
    for spike in {int(np.abs(centers).argmin()), 0, len(counts) - 1}:
        result[spike] = min(result[spike], typical)
    return result


class Observations:
    """What the tensors of a float graph hold while it runs over samples, once."""

    def __init__(
        self,
        model: onnx.ModelProto,
        tensors: Iterable[str],
        *,
        means_of: Iterable[str] = (),
        channels_of: Iterable[str] = (),
        preamble: onnx.ModelProto | None = None,
    ) -> None:
        """Open the graph.

        Args:
            model: float32, with a free batch, one input.
            tensors: whose values are counted; the graph's input may be among them.
            means_of: tensors whose channel means are kept.
            channels_of: tensors whose extremes are kept per channel.
            preamble: a graph that the samples go through first.
        """
        self.samples = 0
        self.histograms = {name: Histogram() for name in tensors}
        self.channel_lo: dict[str, NDArray[np.float32]] = {}
        self.channel_hi: dict[str, NDArray[np.float32]] = {}
        self._sums: dict[str, Any] = dict.fromkeys(means_of, 0.0)
        self._channels = set(channels_of)
        self._input = model.graph.input[0].name
        names = {*self.histograms, *self._sums, *self._channels}
        self._outputs = sorted(names - {self._input})
        self._session = open_session(show_tensors(model, self._outputs))
        self._preamble = open_session(preamble) if preamble is not None else None
        self._batch = 1

    def add(self, samples: NDArray[np.float32], progress: Callable[[int], object]) -> None:
        """Run samples, float32 (N, C, H, W), in their order; calls progress with counts."""
        start = 0
        while start < len(samples):
            batch = np.ascontiguousarray(samples[start : start + self._batch])
            if self._preamble is not None:
                batch = self._preamble.run(None, {self._preamble.get_inputs()[0].name: batch})[0]
            arrays = self._session.run(self._outputs, {self._input: batch}) if self._outputs else []
            bytes_each = sum(self._take(*pair) for pair in zip(self._outputs, arrays, strict=True))
            bytes_each = (bytes_each + self._take(self._input, batch)) // len(batch)
            self.samples += len(batch)
            progress(len(batch))
            start += len(batch)
            self._batch = max(1, min(_MAX_BATCH, _ACTIVATIONS_BYTES // max(1, bytes_each)))

    def means(self, tensor: str) -> NDArray[np.float64]:
        """Mean of every channel over all samples and positions, (C,)."""
        result: NDArray[np.float64] = self._sums[tensor] / self.samples
        return result

    def _take(self, name: str, array: NDArray[np.float32]) -> int:
        extremes = None
        rows = array.reshape(*array.shape[:2], -1)
        if name in self._sums:
            weights = np.full(rows.shape[2], 1 / rows.shape[2], np.float32)
            self._sums[name] += (rows @ weights).sum(axis=0, dtype=np.float64)
        if name in self._channels:
            lo, hi = rows.min(axis=(0, 2)), rows.max(axis=(0, 2))
            extremes = float(lo.min()), float(hi.max())
            self.channel_lo[name] = np.minimum(self.channel_lo.get(name, lo), lo)
            self.channel_hi[name] = np.maximum(self.channel_hi.get(name, hi), hi)
        if name in self.histograms:
            self.histograms[name].add(array, extremes)
        return array.nbytes
