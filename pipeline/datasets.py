"""Sources of labelled patches, and how they are split into train, val and test."""

from __future__ import annotations

import zipfile
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.stage import InputError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from numpy.typing import NDArray

    from pipeline.sources import DataParams, SplitParams

SPLITS = ("train", "val", "test")


class NpzSource:
    """Patches in a NumPy .npz file: one array per modality, (N, H, W, bands), and class indices."""

    def __init__(self, path: Path, modalities: Mapping[str, str], labels: str) -> None:
        """Open and check the file.

        Args:
            path: the .npz file.
            modalities: name of a modality -> key of its array in the file.
            labels: key of the class indices in the file.

        Raises:
            InputError: not an .npz file, a key is not in it, or an array has another form.
        """
        self.path = path
        self._keys = dict(modalities)
        try:
            with np.load(path, allow_pickle=False) as archive:
                arrays = {key: archive[key] for key in archive.files}
        except (OSError, ValueError, zipfile.BadZipFile) as error:
            raise InputError(f"{path.name} is not a readable .npz file: {error}") from error
        self._patches = {
            name: self._rank4(arrays, key, f"data.modalities.{name}")
            for name, key in modalities.items()
        }
        self.labels = self._class_indices(arrays, labels)
        for name, patches in self._patches.items():
            if len(patches) != len(self.labels):
                raise InputError(
                    f"{path.name}: {self._keys[name]!r} has {len(patches)} patches and "
                    f"{labels!r} has {len(self.labels)} labels"
                )

    def __len__(self) -> int:
        """The number of patches."""
        return len(self.labels)

    def shape(self, modality: str) -> tuple[int, int, int]:
        """Height, width and number of bands of a modality's patches."""
        _, height, width, bands = self._array(modality).shape
        return height, width, bands

    def read(self, modality: str, rows: NDArray[np.int64]) -> NDArray[np.generic]:
        """Patches of some rows, stored values, (len(rows), H, W, bands).

        Raises:
            InputError: a patch holds NaN or infinity.
        """
        patches = self._array(modality)[rows]
        if patches.dtype.kind == "f":
            bad = ~np.isfinite(patches).all(axis=(1, 2, 3))
            if bad.any():
                raise InputError(
                    f"{self.path.name}: {self._keys[modality]!r} has NaN or infinity in "
                    f"{int(bad.sum())} of {len(rows)} patches, the first in row {rows[bad][0]}"
                )
        return patches

    def _array(self, modality: str) -> NDArray[np.generic]:
        if modality not in self._patches:
            raise InputError(
                f"{self.path.name}: data.modalities has no {modality!r}; "
                f"it has {', '.join(self._patches)}"
            )
        return self._patches[modality]

    def _rank4(self, arrays: Mapping[str, NDArray[Any]], key: str, where: str) -> NDArray[Any]:
        array = self._get(arrays, key, where)
        if array.ndim != 4 or array.dtype.kind not in "uif":
            raise InputError(
                f"{self.path.name}: {key!r} must be numbers of shape (patches, height, width, "
                f"bands), not {array.dtype} of shape {array.shape}"
            )
        return array

    def _class_indices(self, arrays: Mapping[str, NDArray[Any]], key: str) -> NDArray[np.int64]:
        labels = self._get(arrays, key, "data.labels")
        if labels.ndim != 1 or labels.dtype.kind not in "ui":
            raise InputError(
                f"{self.path.name}: {key!r} must be one class index per patch, "
                f"not {labels.dtype} of shape {labels.shape}"
            )
        return labels.astype(np.int64)

    def _get(self, arrays: Mapping[str, NDArray[Any]], key: str, where: str) -> NDArray[Any]:
        if key not in arrays:
            raise InputError(
                f"{self.path.name} has no array {key!r} ({where}); it has {', '.join(arrays)}"
            )
        return arrays[key]


@dataclass(frozen=True)
class Split:
    """Some rows of a source, in ascending order."""

    name: str
    source: NpzSource
    rows: NDArray[np.int64]

    @property
    def labels(self) -> NDArray[np.int64]:
        """Class index of every row."""
        return self.source.labels[self.rows]

    def __len__(self) -> int:
        """The number of rows."""
        return len(self.rows)


def open_splits(
    data: DataParams, files: Mapping[str, Path], classes: int, seed: int
) -> dict[str, Split]:
    """Open the sources and divide them; every label is checked, no row is in two splits.

    Args:
        data: the section `ingest.data`.
        files: path of every split that names one.
        classes: labels must lie in 0 .. classes - 1.
        seed: of the random choice for splits given as a fraction.

    Raises:
        InputError: a source is not as described, a label is out of range, a split is empty, lacks
            a class in training, or shares rows with another.
    """
    sources = {
        path: NpzSource(path, data.modalities, data.labels)
        for path in dict.fromkeys(files.values())
    }
    for source in sources.values():
        _check_labels(source, data.labels, classes)
    given: dict[str, SplitParams] = {name: getattr(data, name) for name in SPLITS}
    splits: dict[str, Split] = {}
    for name, params in given.items():
        if params.fraction is None:
            source = sources[files[name]]
            splits[name] = Split(name, source, _rows(name, params, source))
    for name, params in given.items():
        if params.fraction is not None:
            train = splits["train"]
            taken, left = _stratified(train.rows, train.labels, params.fraction, seed)
            splits[name] = Split(name, train.source, taken)
            splits["train"] = Split("train", train.source, left)
    _check_splits(splits, classes)
    return {name: splits[name] for name in SPLITS}


def _check_labels(source: NpzSource, key: str, classes: int) -> None:
    bad = np.flatnonzero((source.labels < 0) | (source.labels >= classes))
    if len(bad):
        raise InputError(
            f"{source.path.name}: {key!r} holds {source.labels[bad[0]]} in row {bad[0]} "
            f"({len(bad)} such rows), but preprocessing.json labels {classes} classes: 0 to "
            f"{classes - 1}"
        )


def _rows(name: str, params: SplitParams, source: NpzSource) -> NDArray[np.int64]:
    start, stop = params.rows or (0, len(source))
    if not 0 <= start < stop <= len(source):
        raise InputError(
            f"data.{name}.rows is [{start}, {stop}], but {source.path.name} has rows 0 to "
            f"{len(source)}; give [first, one past the last]"
        )
    return np.arange(start, stop, dtype=np.int64)


def _stratified(
    rows: NDArray[np.int64], labels: NDArray[np.int64], fraction: float, seed: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Take a share of every class at random; at least one row of each stays."""
    random = np.random.default_rng(seed)
    taken = np.zeros(len(rows), bool)
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        count = min(max(1, round(fraction * len(members))), len(members) - 1)
        taken[random.permutation(members)[:count]] = True
    return rows[taken], rows[~taken]


def _check_splits(splits: Mapping[str, Split], classes: int) -> None:
    for name, split in splits.items():
        if not len(split):
            raise InputError(f"data.{name} has no patches")
    absent = sorted(set(range(classes)) - set(splits["train"].labels.tolist()))
    if absent:
        raise InputError(
            f"data.train has no patch of class {', '.join(map(str, absent))}; "
            "a class without a sample can't be learned"
        )
    names = list(splits)
    for i, one in enumerate(names):
        for other in names[i + 1 :]:
            a, b = splits[one], splits[other]
            if a.source is not b.source:
                continue
            shared = np.intersect1d(a.rows, b.rows)
            if len(shared):
                raise InputError(
                    f"data.{one} and data.{other} share {len(shared)} rows of "
                    f"{a.source.path.name}, the first is {shared[0]}; splits must not overlap"
                )


@dataclass(frozen=True)
class DatasetSplit:
    """One split as ingest stored it for the later stages."""

    images: NDArray[np.uint8]  # (N, H, W, channels), as the device receives them
    labels: NDArray[np.int64]  # (N,)
    rows: NDArray[np.int64]  # (N,), row in the source

    @staticmethod
    def load(dataset: Path, name: str) -> DatasetSplit:
        """Map one split of the `dataset` artifact into memory; nothing is read yet."""
        folder = dataset / name
        return DatasetSplit(
            images=np.load(folder / "images.npy", mmap_mode="r"),
            labels=np.load(folder / "labels.npy", mmap_mode="r"),
            rows=np.load(folder / "rows.npy", mmap_mode="r"),
        )


def class_histogram(labels: NDArray[np.int64], classes: int) -> list[int]:
    """How many patches each class has."""
    return [int(n) for n in np.bincount(labels, minlength=classes)]


def band_statistics(
    sums: NDArray[np.float64], squares: NDArray[np.float64], count: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean and (population) standard deviation per band from running sums over `count` values."""
    mean = sums / count
    return mean, np.sqrt(np.maximum(squares / count - mean**2, 0))
