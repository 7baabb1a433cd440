"""Sources of patches, whatever their format.

A source never holds a whole file in memory: arrays are mapped, HDF5 is read in contiguous slabs,
images are decoded when they are asked for.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from hashlib import sha256
from importlib import import_module
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.params.formats import FORMATS
from pipeline.run.errors import InputError
from pipeline.run.files import replacing

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path
    from typing import TypeVar

    import h5py
    from numpy.typing import NDArray

    from pipeline.params.sources import DataParams

    Scalar = TypeVar("Scalar", bound=np.generic)

    #: (modality, ascending rows, bands) -> stored values, (rows, H, W, bands)
    Reader = Callable[[str, NDArray[np.int64], Sequence[int]], NDArray[np.generic]]


@dataclass(frozen=True)
class PatchSource:
    """Patches in one file or folder, by row."""

    path: Path
    count: int
    shapes: Mapping[str, tuple[int, int, int]]  # height, width, bands of each modality
    labels: NDArray[np.int64] | None  # class index per row; None for unlabeled patches
    reader: Reader
    synthetic: str = ""  # how the patches were made up, when they were

    def shape(self, modality: str) -> tuple[int, int, int]:
        """Height, width and number of bands of a modality's patches.

        Raises:
            InputError: lists the modalities there are.
        """
        if modality not in self.shapes:
            raise InputError(
                f"{self.path.name} has no modality {modality!r} (data.modalities); "
                f"it has {', '.join(self.shapes)}"
            )
        return self.shapes[modality]

    def read(
        self, modality: str, rows: NDArray[np.int64], bands: Sequence[int]
    ) -> NDArray[np.generic]:
        """Some bands of some rows: stored values, (len(rows), H, W, len(bands)).

        Args:
            modality: which.
            rows: ascending, int64.
            bands: zero-based, in the order wanted.

        Raises:
            InputError: the modality is not there, or the data can't be read.
        """
        self.shape(modality)
        return self.reader(modality, rows, bands)


def open_source(
    data: DataParams, path: Path, labels: Path | None, classes: Sequence[str]
) -> PatchSource:
    """Open one file or folder, in the format that the data section names.

    Args:
        data: the section `ingest.data`.
        path: the file or folder.
        labels: format npy: the file of class indices, if there is one.
        classes: names; format image-folder knows its folders by them; empty: one flat folder of
            images without labels.

    Raises:
        InputError: not a source of this format, or not as described.
    """
    module, _, name = FORMATS[data.format].opener.partition(":")
    source: PatchSource = getattr(import_module(module), name)(data, path, labels, classes)
    return source


def pick_bands(patches: NDArray[Scalar], bands: Sequence[int]) -> NDArray[Scalar]:
    """Some bands of (N, H, W, bands); a copy only where it must be."""
    first, count = bands[0], len(bands)
    step = bands[1] - first if count > 1 else 1
    if step and list(bands) == list(range(first, first + count * step, step)):
        return patches[..., first::step][..., :count]
    return patches[..., list(bands)]


def check_patches(path: Path, name: str, array: NDArray[Any] | h5py.Dataset) -> None:
    """Refuse what is not numbers of shape (patches, height, width, bands)."""
    if array.ndim != 4 or array.dtype.kind not in "uif":
        raise InputError(
            f"{path.name}: {name!r} must be numbers of shape (patches, height, width, bands), "
            f"not {array.dtype} of shape {array.shape}"
        )


def common_length(path: Path, lengths: Mapping[str, int]) -> int:
    """The length of all arrays of a file; refused where they differ."""
    if len(set(lengths.values())) > 1:
        counts = ", ".join(f"{name!r} has {count}" for name, count in lengths.items())
        raise InputError(f"{path.name}: its arrays differ in length: {counts}")
    return next(iter(lengths.values()))


def copy_bands(
    source: PatchSource, bands: Mapping[str, Sequence[int]], digest: str, folder: Path, block: int
) -> PatchSource:
    """The same source over a copy of just the bands that somebody sees, float32, mapped.

    Every later computation starts from float32, so nothing changes by it. The copy is written once
    and renamed when complete, under a name made of the source's digest, the modality and the bands.

    Args:
        source: where the patches are.
        bands: by modality, ascending.
        digest: of the source's content.
        folder: of all copies.
        block: rows read at a time.
    """
    maps = {}
    for modality, numbers in bands.items():
        key = sha256(json.dumps([1, digest, modality, list(numbers)]).encode()).hexdigest()
        path = folder / f"{key}.npy"
        if not path.exists():
            _write_copy(source, modality, numbers, path, block)
        maps[modality] = np.load(path, mmap_mode="r")

    def read_rows(
        modality: str, rows: NDArray[np.int64], selected: Sequence[int]
    ) -> NDArray[np.generic]:
        columns = [bands[modality].index(band) for band in selected]
        return pick_bands(maps[modality][rows], columns)

    return replace(source, reader=read_rows)


def _write_copy(
    source: PatchSource, modality: str, bands: Sequence[int], path: Path, block: int
) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    height, width, _ = source.shape(modality)
    shape = (source.count, height, width, len(bands))
    with replacing(path) as partial:
        copy = np.lib.format.open_memmap(partial, mode="w+", dtype=np.float32, shape=shape)
        for start in range(0, source.count, block):
            rows = np.arange(start, min(start + block, source.count), dtype=np.int64)
            copy[start : start + len(rows)] = source.read(modality, rows, bands)
        copy.flush()
