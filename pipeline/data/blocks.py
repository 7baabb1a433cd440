"""The one reader of the user's patches: blocks of them as float32, without bad patches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np

from pipeline.data.prefetch import prefetch
from pipeline.data.source import pick_bands

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from numpy.typing import NDArray

    from pipeline.data.splits import Split


#: Rows of a block. The names of kept logits depend on it.
BLOCK = 1024

#: Rows handled at once inside a block, so that they stay in the processor's cache.
PIECE = 32


class Viewer(Protocol):
    """A teacher or a student: it sees some bands of a modality."""

    @property
    def modality(self) -> str:
        """Of its bands."""

    @property
    def bands(self) -> Sequence[int]:
        """Zero-based, in channel order."""


def bands_by_modality(viewers: Iterable[Viewer]) -> dict[str, tuple[int, ...]]:
    """By modality, the bands that somebody sees, ascending."""
    bands: dict[str, set[int]] = {}
    for viewer in viewers:
        bands.setdefault(viewer.modality, set()).update(viewer.bands)
    return {modality: tuple(sorted(numbers)) for modality, numbers in bands.items()}


@dataclass(frozen=True)
class Block:
    """Neighboring patches of a split; valid until the next block but one is read."""

    rows: NDArray[np.int64]  # of the source, ascending
    bands: Mapping[str, Sequence[int]]  # by modality, ascending
    patches: Mapping[str, NDArray[np.float32]]  # by modality, (rows, H, W, bands)

    def select(self, viewer: Viewer) -> NDArray[np.float32]:
        """The patches as one viewer sees them, (rows, H, W, C): its modality, bands and order."""
        return self.pick(viewer.modality, viewer.bands)

    def pick(self, modality: str, bands: Sequence[int]) -> NDArray[np.float32]:
        """Some bands of a modality in this order, (rows, H, W, bands)."""
        columns = [self.bands[modality].index(band) for band in bands]
        return pick_bands(self.patches[modality], columns)


class BlockReader:
    """Reads a split once, in blocks of `BLOCK` good patches.

    Every computation starts from float32, so that is what blocks hold. Their arrays are used again
    for the next block but one: the operating system takes longer to give fresh memory for a block
    than to read it. What is known of the stored values, their extremes and which patches have NaN
    or infinity, is in the attributes once the blocks have been read.
    """

    def __init__(self, split: Split, bands: Mapping[str, Sequence[int]]) -> None:
        self._split = split
        self._bands = bands
        self._bad: list[NDArray[np.int64]] = []
        self._extremes: dict[str, tuple[NDArray[np.generic], NDArray[np.generic]]] = {}

    @property
    def bad(self) -> NDArray[np.int64]:
        """Rows that were left out: NaN or infinity in a band that somebody sees."""
        return np.concatenate(self._bad) if self._bad else np.empty(0, np.int64)

    def extremes(self, modality: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Smallest and largest stored value per band, (bands,) each."""
        low, high = self._extremes[modality]
        count = len(self._bands[modality])
        return (
            low.reshape(-1, count).min(axis=0).astype(np.float64),
            high.reshape(-1, count).max(axis=0).astype(np.float64),
        )

    def __iter__(self) -> Iterator[Block]:
        """Blocks, each read in a thread of its own while the one before is in use."""
        return prefetch(self._blocks())

    def _blocks(self) -> Iterator[Block]:
        split = self._split
        size = min(BLOCK, len(split))
        shapes = {
            modality: (size, *split.source.shape(modality)[:2], len(bands))
            for modality, bands in self._bands.items()
        }
        buffers = [{m: np.empty(s, np.float32) for m, s in shapes.items()} for _ in range(2)]
        rows = np.empty(size, np.int64)
        number = filled = start = 0
        while start < len(split):
            piece = split.rows[start : start + min(PIECE, size - filled)]
            start += len(piece)
            good, stored = self._read_rows(piece)
            end = filled + len(good)
            rows[filled:end] = good
            for modality, values in stored.items():
                buffers[number % 2][modality][filled:end] = values
            filled = end
            if filled == size or (filled and start == len(split)):
                patches = {m: array[:filled] for m, array in buffers[number % 2].items()}
                yield Block(rows[:filled].copy(), self._bands, patches)
                number, filled = number + 1, 0

    def _read_rows(
        self, rows: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], dict[str, NDArray[np.generic]]]:
        """The good ones of some rows, and their stored values by modality."""
        stored = {m: self._split.source.read(m, rows, bands) for m, bands in self._bands.items()}
        extremes = {modality: _extremes(values) for modality, values in stored.items()}
        # An extreme is finite only where every value is.
        if not all(np.isfinite(values).all() for pair in extremes.values() for values in pair):
            finite = np.ones(len(rows), bool)
            for values in stored.values():
                finite &= np.isfinite(values).all(axis=(1, 2, 3))
            self._bad.append(rows[~finite])
            rows = rows[finite]
            stored = {modality: values[finite] for modality, values in stored.items()}
            if not len(rows):
                return rows, stored
            extremes = {modality: _extremes(values) for modality, values in stored.items()}
        for modality, (low, high) in extremes.items():
            lowest, highest = self._extremes.get(modality, (low, high))
            self._extremes[modality] = np.minimum(lowest, low), np.maximum(highest, high)
        return rows, stored


def _extremes(values: NDArray[np.generic]) -> tuple[NDArray[np.generic], NDArray[np.generic]]:
    """Smallest and largest value at each place of some patches, (H * W * C,) each."""
    flat = values.reshape(len(values), -1)
    return flat.min(axis=0), flat.max(axis=0)
