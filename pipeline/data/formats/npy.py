"""Patches in .npy files, mapped and never read whole."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.data.source import PatchSource, check_patches, common_length, pick_bands
from pipeline.run.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from pipeline.params.sources import DataParams


def from_npy(
    data: DataParams, path: Path, labels: Path | None, classes: Sequence[str]
) -> PatchSource:
    """Format npy; see `pipeline.params.formats`."""
    return open_npy(path, data.only_modality(), labels)


def open_npy(path: Path, modality: str, labels: Path | None) -> PatchSource:
    """One .npy of patches (N, H, W, bands), and one of class indices (N,).

    Raises:
        InputError: no .npy, another form, or another length.
    """
    arrays = {modality: _map_npy(path)}
    if labels is None:
        return array_source(path, arrays, None, {modality: path.name}, "")
    return array_source(path, arrays, _map_npy(labels), {modality: path.name}, labels.name)


def array_source(
    path: Path,
    arrays: Mapping[str, NDArray[Any]],
    indices: NDArray[Any] | None,
    names: Mapping[str, str],
    labels_name: str,
) -> PatchSource:
    """The source over mapped arrays of one file.

    Args:
        path: of the file, for messages.
        arrays: by modality, (N, H, W, bands).
        indices: class of each patch, if it is known.
        names: by modality, what messages call its array.
        labels_name: what they call the labels.
    """
    for modality, array in arrays.items():
        check_patches(path, names[modality], array)
    labels = None if indices is None else _class_indices(path, indices, labels_name)
    lengths = {names[modality]: len(array) for modality, array in arrays.items()}
    if labels is not None:
        lengths[labels_name] = len(labels)
    return PatchSource(
        path=path,
        count=common_length(path, lengths),
        shapes={m: array.shape[1:] for m, array in arrays.items()},
        labels=labels,
        reader=lambda modality, rows, bands: pick_bands(arrays[modality][rows], bands),
    )


def _map_npy(path: Path) -> NDArray[Any]:
    try:
        array: NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise InputError(f"{path.name} is not a readable .npy file: {error}") from error
    return array


def _class_indices(path: Path, labels: NDArray[Any], name: str) -> NDArray[np.int64]:
    if labels.ndim != 1 or labels.dtype.kind not in "ui":
        raise InputError(
            f"{path.name}: {name!r} must be one class index per patch, not {labels.dtype} of shape "
            f"{labels.shape}"
        )
    indices: NDArray[np.int64] = labels.astype(np.int64)
    return indices
