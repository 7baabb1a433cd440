"""Patches in HDF5 files of So2Sat's form."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import h5py
import numpy as np

from pipeline.data.source import PatchSource, check_patches, common_length, pick_bands
from pipeline.data.synthetic import MARK
from pipeline.run.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from pipeline.params.sources import DataParams


#: HDF5 slabs are read whole when at least this share of their rows is wanted.
_DENSE = 0.25


def from_so2sat(
    data: DataParams, path: Path, labels: Path | None, classes: Sequence[str]
) -> PatchSource:
    """Format so2sat-h5; see `pipeline.params.formats`."""
    modalities = data.modalities or {"optical": "sen2", "sar": "sen1"}
    return open_so2sat(path, modalities, data.labels or "label")


def open_so2sat(path: Path, modalities: Mapping[str, str], labels: str) -> PatchSource:
    """So2Sat LCZ42 in HDF5: sen1 (N, 32, 32, 8), sen2 (N, 32, 32, 10), label (N, 17) one-hot.

    Raises:
        InputError: truncated or no HDF5, a dataset missing, of another rank or length, labels that
            are not one-hot.
    """
    try:
        # Slabs are read once: a chunk that passes through HDF5's cache is copied once more.
        file = h5py.File(path, "r", rdcc_nbytes=0)
    except OSError as error:
        raise InputError(f"{path.name} is not a readable HDF5 file: {error}") from error
    datasets = {name: _dataset(path, file, key) for name, key in modalities.items()}
    for name, dataset in datasets.items():
        check_patches(path, modalities[name], dataset)
    lengths = {modalities[name]: len(dataset) for name, dataset in datasets.items()}
    indices = None
    if labels in file:
        indices = _from_one_hot(path, np.asarray(_dataset(path, file, labels)), labels)
        lengths[labels] = len(indices)

    def read_rows(
        modality: str, rows: NDArray[np.int64], bands: Sequence[int]
    ) -> NDArray[np.generic]:
        parts = []
        # Contiguous slabs, never a list of indices: on files with a chunk per patch h5py is slower
        # with a sorted list than with opening the file for each sample.
        for run in _dense_runs(rows):
            try:
                slab = datasets[modality][int(run[0]) : int(run[-1]) + 1]
            except OSError as error:
                raise InputError(
                    f"{path.name}: {modalities[modality]!r} can't be read in rows {run[0]} to "
                    f"{run[-1]} (truncated?): {error}"
                ) from error
            patches = slab if len(slab) == len(run) else slab[run - run[0]]
            parts.append(pick_bands(patches, bands))
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    return PatchSource(
        path=path,
        count=common_length(path, lengths),
        shapes={m: (d.shape[1], d.shape[2], d.shape[3]) for m, d in datasets.items()},
        labels=indices,
        reader=read_rows,
        synthetic=str(file.attrs.get(MARK, "")),
    )


def _dataset(path: Path, file: h5py.File, key: str) -> h5py.Dataset:
    dataset = file.get(key)
    if not isinstance(dataset, h5py.Dataset):
        raise InputError(f"{path.name} has no dataset {key!r}; it has {', '.join(file)}")
    return dataset


def _from_one_hot(path: Path, labels: NDArray[Any], name: str) -> NDArray[np.int64]:
    if labels.ndim != 2:
        raise InputError(
            f"{path.name}: {name!r} must be one-hot, (patches, classes), not of shape "
            f"{labels.shape}"
        )
    binary = ((labels == 0) | (labels == 1)).all(axis=1)
    bad = np.flatnonzero(~(binary & (labels.sum(axis=1) == 1)))
    if len(bad):
        raise InputError(
            f"{path.name}: {name!r} is not one-hot in {len(bad)} rows, the first is row {bad[0]}: "
            f"{labels[bad[0]].tolist()}"
        )
    indices: NDArray[np.int64] = np.nonzero(labels)[1]
    return indices


def _dense_runs(rows: NDArray[np.int64]) -> Iterator[NDArray[np.int64]]:
    """Cut ascending rows so that each piece covers its span densely enough to read it whole."""
    if not len(rows):
        return
    if len(rows) >= _DENSE * (rows[-1] - rows[0] + 1):
        yield rows
        return
    breaks = np.flatnonzero(np.diff(rows) > 1 / _DENSE) + 1
    yield from np.split(rows, breaks) if len(breaks) else [rows]
