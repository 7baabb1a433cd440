"""Patches in NumPy archives (.npz), mapped and never read whole."""

from __future__ import annotations

import shutil
import tempfile
import zipfile
import zlib
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from pipeline.data.formats.npy import array_source
from pipeline.run.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from pipeline.data.source import PatchSource
    from pipeline.params.sources import DataParams


def from_npz(
    data: DataParams, path: Path, labels: Path | None, classes: Sequence[str]
) -> PatchSource:
    """Format npz; see `pipeline.params.formats`."""
    return open_npz(path, data.modalities or {"optical": "images"}, data.labels or "labels")


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
    return array_source(path, arrays, indices, modalities, labels)


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
