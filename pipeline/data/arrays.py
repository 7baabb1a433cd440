"""Patches in npz and npy files, mapped and never read whole."""

from __future__ import annotations

import shutil
import tempfile
import zipfile
import zlib
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from pipeline.data.source import PatchSource, check_patches, common_length, pick_bands
from pipeline.run.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from pipeline.params.sources import DataParams

    #: (modality, ascending rows, bands) -> stored values, (rows, H, W, bands)
    Reader = Callable[[str, NDArray[np.int64], Sequence[int]], NDArray[np.generic]]


def from_npz(
    data: DataParams, path: Path, labels: Path | None, classes: Sequence[str]
) -> PatchSource:
    """Format npz; see `pipeline.params.formats`."""
    return open_npz(path, data.modalities or {"optical": "images"}, data.labels or "labels")


def from_npy(
    data: DataParams, path: Path, labels: Path | None, classes: Sequence[str]
) -> PatchSource:
    """Format npy; see `pipeline.params.formats`."""
    return open_npy(path, data.only_modality(), labels)


def open_npz(path: Path, modalities: Mapping[str, str], labels: str) -> PatchSource:
    """A NumPy archive: per modality an array (N, H, W, bands), and class indices (N,).

    Raises:
        InputError: no archive, an array missing, of another form or of another length.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            members = {
                info.filename.removesuffix(".npy"): info
                for info in archive.infolist()
                if info.filename.endswith(".npy")
            }
            for name, key in modalities.items():
                if key not in members:
                    raise InputError(
                        f"{path.name} has no array {key!r} (data.modalities.{name}); "
                        f"it has {', '.join(members)}"
                    )
            arrays = {
                name: _map_member(archive, path, members[key]) for name, key in modalities.items()
            }
            indices = _map_member(archive, path, members[labels]) if labels in members else None
    except (OSError, EOFError, zipfile.BadZipFile, zlib.error, _NpyError) as error:
        raise InputError(f"{path.name} is not a readable .npz file: {error}") from error
    return _array_source(path, arrays, indices, modalities, labels)


def open_npy(path: Path, modality: str, labels: Path | None) -> PatchSource:
    """One .npy of patches (N, H, W, bands), and one of class indices (N,).

    Raises:
        InputError: no .npy, another form, or another length.
    """
    arrays = {modality: _map_npy(path)}
    if labels is None:
        return _array_source(path, arrays, None, {modality: path.name}, "")
    return _array_source(path, arrays, _map_npy(labels), {modality: path.name}, labels.name)


def _array_source(
    path: Path,
    arrays: Mapping[str, NDArray[Any]],
    indices: NDArray[Any] | None,
    names: Mapping[str, str],
    labels_name: str,
) -> PatchSource:
    for modality, array in arrays.items():
        check_patches(path, names[modality], array)
    labels = None if indices is None else _class_indices(path, indices, labels_name)
    lengths = {names[modality]: len(array) for modality, array in arrays.items()}
    if labels is not None:
        lengths[labels_name] = len(labels)
    return PatchSource(
        path=path,
        count=common_length(path, lengths),
        shapes={m: (a.shape[1], a.shape[2], a.shape[3]) for m, a in arrays.items()},
        labels=labels,
        reader=lambda modality, rows, bands: pick_bands(arrays[modality][rows], bands),
    )


class _NpyError(ValueError):
    """An array of an archive can't be mapped."""


def _map_member(archive: zipfile.ZipFile, path: Path, info: zipfile.ZipInfo) -> NDArray[Any]:
    """Map one array of an archive: in place when stored, from an unnamed temporary file else."""
    with archive.open(info) as member:
        try:
            version = np.lib.format.read_magic(member)
            header = np.lib.format.read_array_header_1_0
            if version != (1, 0):
                header = np.lib.format.read_array_header_2_0
            shape, fortran, dtype = header(member)
        except ValueError as error:
            raise _NpyError(f"{info.filename}: {error}") from error
        if dtype.hasobject:
            raise _NpyError(f"{info.filename} holds Python objects")
        order: Literal["C", "F"] = "F" if fortran else "C"
        if not np.prod(shape):
            return np.empty(shape, dtype)
        if info.compress_type != zipfile.ZIP_STORED:
            with tempfile.TemporaryFile() as unpacked:  # the map outlives the open file
                shutil.copyfileobj(member, unpacked, 1 << 20)
                return np.memmap(unpacked, dtype=dtype, mode="r", shape=shape, order=order)
        header_bytes = member.tell()
    with path.open("rb") as file:
        # The local header's own lengths count: they may differ from the central directory's.
        file.seek(info.header_offset + 26)
        name_bytes, extra_bytes = (int(n) for n in np.frombuffer(file.read(4), "<u2"))
    offset = info.header_offset + 30 + name_bytes + extra_bytes + header_bytes
    try:
        return np.memmap(path, dtype=dtype, mode="r", offset=offset, shape=shape, order=order)
    except ValueError as error:
        raise _NpyError(f"{info.filename}: {error}") from error


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
