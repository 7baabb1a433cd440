"""One pass over a split: what is bad, what is where, which patches are the same."""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import blake2b
from typing import TYPE_CHECKING

import numpy as np

from preprocessing.apply import scale

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from numpy.typing import NDArray

    from pipeline.data.splits import Split
    from preprocessing.contract import Contract


#: Patches handled at a time.
BLOCK = 2048

#: Values per band that are kept for quantiles.
SAMPLE = 400_000


@dataclass(frozen=True)
class BandStatistics:
    """Statistics of the bands of one modality; arrays have one entry per band asked for."""

    bands: tuple[int, ...]
    minimum: NDArray[np.float64]  # stored values
    maximum: NDArray[np.float64]  # stored values
    mean: NDArray[np.float64]  # contract units (after scaling)
    sigma: NDArray[np.float64]  # contract units, population
    sample: NDArray[np.float32]  # contract units, evenly spaced over the split, (values, bands)


@dataclass(frozen=True)
class Survey:
    """What one pass over a split found."""

    bad: NDArray[np.int64]  # rows with NaN or infinity in a band that somebody sees
    rows: NDArray[np.int64]  # the others
    hashes: NDArray[np.uint64]  # of their contents
    statistics: dict[str, BandStatistics]  # by modality, of the others


def survey(
    split: Split,
    bands: Mapping[str, Sequence[int]],
    contract: Contract,
    progress: Callable[[int], object] = lambda n: None,
) -> Survey:
    """Read a split once, in blocks.

    Args:
        split: what to read.
        bands: by modality, those that somebody sees.
        contract: gives the scaling.
        progress: called with the number of patches just read.
    """
    bad: list[NDArray[np.int64]] = []
    good: list[NDArray[np.int64]] = []
    hashes: list[int] = []
    running = {
        modality: _Running(tuple(some), _stride(split, modality))
        for modality, some in bands.items()
    }
    for start in range(0, len(split), BLOCK):
        rows = split.rows[start : start + BLOCK]
        patches = {m: split.source.read(m, rows, some) for m, some in bands.items()}
        finite = np.ones(len(rows), bool)
        for some in patches.values():
            if some.dtype.kind == "f":
                finite &= np.isfinite(some).all(axis=(1, 2, 3))
        bad.append(rows[~finite])
        good.append(rows[finite])
        kept = {m: some if finite.all() else some[finite] for m, some in patches.items()}
        for i in range(int(finite.sum())):
            digest = blake2b(digest_size=8)
            for some in kept.values():
                digest.update(np.ascontiguousarray(some[i]).data)
            hashes.append(int.from_bytes(digest.digest(), "little"))
        for modality, some in kept.items():
            running[modality].add(some, scale(some, contract.scaling_of(modality)))
        progress(len(rows))
    return Survey(
        bad=np.concatenate(bad),
        rows=np.concatenate(good),
        hashes=np.array(hashes, np.uint64),
        statistics={m: r.result() for m, r in running.items()} if hashes else {},
    )


def _stride(split: Split, modality: str) -> int:
    height, width, _ = split.source.shape(modality)
    # Odd, so that it does not walk along one column of the patches.
    return max(1, len(split) * height * width // SAMPLE) | 1


class _Running:
    """Extremes, mean and variance over blocks (Chan, Golub, LeVeque 1983), and a thin sample."""

    def __init__(self, bands: tuple[int, ...], stride: int) -> None:
        self._bands = bands
        self._stride = stride
        self._seen = 0
        self._minimum = np.full(len(bands), np.inf)
        self._maximum = np.full(len(bands), -np.inf)
        self._mean = np.zeros(len(bands))
        self._squares = np.zeros(len(bands))
        self._sample: list[NDArray[np.float32]] = []

    def add(self, stored: NDArray[np.generic], scaled: NDArray[np.float32]) -> None:
        if not len(stored):
            return
        raw = stored.reshape(-1, len(self._bands))
        self._minimum = np.minimum(self._minimum, raw.min(axis=0))
        self._maximum = np.maximum(self._maximum, raw.max(axis=0))
        values = scaled.reshape(-1, len(self._bands))
        self._sample.append(values[-self._seen % self._stride :: self._stride].copy())
        mean = values.mean(axis=0, dtype=np.float64)
        squares = np.square(values - mean).sum(axis=0)
        total = self._seen + len(values)
        shift = mean - self._mean
        self._squares += squares + shift**2 * (self._seen * len(values) / total)
        self._mean += shift * (len(values) / total)
        self._seen = total

    def result(self) -> BandStatistics:
        return BandStatistics(
            bands=self._bands,
            minimum=self._minimum,
            maximum=self._maximum,
            mean=self._mean,
            sigma=np.sqrt(self._squares / self._seen),
            sample=np.concatenate(self._sample),
        )


@dataclass(frozen=True)
class Leak:
    """The same patch in two splits."""

    one: str  # names of the splits
    other: str
    pairs: tuple[tuple[int, int], ...]  # rows in their sources
    count: int


def find_leaks(surveys: Mapping[str, Survey], shown: int = 5) -> list[Leak]:
    """Patches whose content is in two splits; each leak lists the first `shown` pairs of rows."""
    leaks = []
    names = list(surveys)
    for i, one in enumerate(names):
        for other in names[i + 1 :]:
            a, b = surveys[one], surveys[other]
            _, first, second = np.intersect1d(a.hashes, b.hashes, return_indices=True)
            if len(first):
                order = np.argsort(a.rows[first])[:shown]
                pairs = zip(a.rows[first[order]], b.rows[second[order]], strict=True)
                listed = tuple((int(x), int(y)) for x, y in pairs)
                leaks.append(Leak(one, other, listed, len(first)))
    return leaks


def rows_elsewhere(surveys: Mapping[str, Survey]) -> NDArray[np.int64]:
    """Rows of train whose content is in val or test too, ascending; all of them."""
    train = surveys["train"]
    others = [surveys[name].hashes for name in ("val", "test") if name in surveys]
    found: NDArray[np.int64] = np.sort(train.rows[np.isin(train.hashes, np.concatenate(others))])
    return found
