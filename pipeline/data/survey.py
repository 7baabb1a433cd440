"""One pass over a split: what is bad, what is where, which patches are the same."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from pipeline.data.blocks import PIECE, Block, BlockReader
from preprocessing.apply import scale

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from numpy.typing import NDArray

    from pipeline.data.splits import Split
    from preprocessing.contract import Channels


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
    hashes: NDArray[np.int64]  # of their contents, see `hash_patches`
    statistics: dict[str, BandStatistics]  # by modality, of the others


def survey(
    split: Split,
    channels: Mapping[str, Channels],
    follow: Callable[[Block], object] = lambda block: None,
    progress: Callable[[int], object] = lambda n: None,
) -> Survey:
    """Read a split once, in blocks.

    Args:
        split: what to read.
        channels: by modality, the bands that somebody sees, ascending.
        follow: called with every block of good patches, in order: who else needs them.
        progress: called with the number of patches just read.
    """
    reader = BlockReader(split, {modality: bound.bands for modality, bound in channels.items()})
    moments = {m: _Moments(bound, _stride(split, m)) for m, bound in channels.items()}
    rows: list[NDArray[np.int64]] = [np.empty(0, np.int64)]
    hashes: list[NDArray[np.int64]] = [np.empty(0, np.int64)]
    for block in reader:
        rows.append(block.rows)
        hashes.append(hash_patches(list(block.patches.values())))
        for modality, patches in block.patches.items():
            moments[modality].add(patches)
        follow(block)
        progress(len(block.rows))
    good = np.concatenate(rows)
    return Survey(
        bad=reader.bad,
        rows=good,
        hashes=np.concatenate(hashes),
        statistics={m: totals.result(*reader.extremes(m)) for m, totals in moments.items()}
        if len(good)
        else {},
    )


def hash_patches(modalities: Sequence[NDArray[np.float32]]) -> NDArray[np.int64]:
    """A number per patch, (N,), equal for equal contents and, in practice, for nothing else.

    Python's own hash of bytes (SipHash) is keyed anew in every process: such numbers are for
    comparing within one, and never kept.

    Args:
        modalities: the patches of each, (N, H, W, bands).
    """
    count = len(modalities[0])
    return np.fromiter(
        (hash(tuple(patches[i].tobytes() for patches in modalities)) for i in range(count)),
        np.int64,
        count,
    )


def _stride(split: Split, modality: str) -> int:
    height, width, _ = split.source.shape(modality)
    # Odd, so that it does not walk along one column of the patches.
    return max(1, len(split) * height * width // SAMPLE) | 1


class _Moments:
    """Mean and variance over blocks, and a thin sample.

    The sums run over each place of the patches on its own, which is what the processor is fast at,
    and are of differences from an early mean, so that no digits cancel.
    """

    def __init__(self, channels: Channels, stride: int) -> None:
        self._channels = channels
        self._stride = stride
        self._pixels = 0
        self._sample: list[NDArray[np.float32]] = []

    def add(self, patches: NDArray[np.float32]) -> None:
        """Count some patches, (N, H, W, bands)."""
        bands = len(self._channels.bands)
        flat = patches.reshape(len(patches), -1)
        self._sample.append(
            flat.reshape(-1, bands)[-self._pixels % self._stride :: self._stride].copy()
        )
        if not self._pixels:
            mean = self._clip(flat[:PIECE]).reshape(-1, bands).mean(axis=0, dtype=np.float64)
            self._center = np.tile(mean, flat.shape[1] // bands)
            self._sums = np.zeros((2, flat.shape[1]))
        self._pixels += flat.size // bands
        differences = np.empty((min(PIECE, len(flat)), flat.shape[1]))
        for start in range(0, len(flat), PIECE):
            values = self._clip(flat[start : start + PIECE])
            part = np.subtract(values, self._center, out=differences[: len(values)])
            self._sums[0] += part.sum(axis=0)
            self._sums[1] += np.square(part, out=part).sum(axis=0)

    def _clip(self, values: NDArray[np.float32]) -> NDArray[np.float32]:
        scaling = self._channels.scaling
        if scaling.type != "clip_linear":
            return values
        low, high = (np.float32(v) for v in scaling.src_range)
        return np.clip(values, low, high)

    def result(self, minimum: NDArray[np.float64], maximum: NDArray[np.float64]) -> BandStatistics:
        """The statistics, beside the extremes of the stored values."""
        channels = self._channels
        bands = len(channels.bands)
        # As float32, in which `scale` computes.
        gain, offset = (
            float(np.float32(v)) for v in (channels.scaling.gain, channels.scaling.offset)
        )
        shift, square = self._sums.reshape(2, -1, bands).sum(axis=1) / self._pixels
        mean = self._center[:bands] + shift
        return BandStatistics(
            bands=channels.bands,
            minimum=minimum,
            maximum=maximum,
            mean=mean * gain + offset,
            sigma=np.sqrt(np.maximum(square - shift**2, 0)) * gain,
            sample=scale(np.concatenate(self._sample), channels.scaling),
        )


@dataclass(frozen=True)
class Leak:
    """The same patch in two splits."""

    one: str  # names of the splits
    other: str
    pairs: tuple[tuple[int, int], ...]  # rows in their sources
    count: int


def find_leaks(surveys: Mapping[str, Survey], limit: int = 5) -> list[Leak]:
    """Patches whose content is in two splits; each leak lists the first `limit` pairs of rows."""
    leaks = []
    names = list(surveys)
    for i, name in enumerate(names):
        for second_name in names[i + 1 :]:
            first, second = surveys[name], surveys[second_name]
            _, in_first, in_second = np.intersect1d(
                first.hashes, second.hashes, return_indices=True
            )
            if len(in_first):
                order = np.argsort(first.rows[in_first])[:limit]
                pairs = zip(first.rows[in_first[order]], second.rows[in_second[order]], strict=True)
                listed = tuple((int(x), int(y)) for x, y in pairs)
                leaks.append(Leak(name, second_name, listed, len(in_first)))
    return leaks


def rows_elsewhere(surveys: Mapping[str, Survey]) -> NDArray[np.int64]:
    """Rows of train whose content is in val or test too, ascending; all of them."""
    train = surveys["train"]
    hashes = [surveys[name].hashes for name in ("val", "test") if name in surveys]
    rows: NDArray[np.int64] = np.sort(train.rows[np.isin(train.hashes, np.concatenate(hashes))])
    return rows
