"""Sources of patches: NumPy files, So2Sat HDF5, folders of images.

A source never holds a whole file in memory: arrays are mapped, HDF5 is read in contiguous slabs,
images are decoded when they are asked for.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import zipfile
import zlib
from dataclasses import dataclass, replace
from hashlib import sha256
from typing import TYPE_CHECKING, Any, Literal

import h5py
import numpy as np

from pipeline.image_files import SUFFIXES, read_image
from pipeline.stage import InputError
from pipeline.synthetic import MARK
from preprocessing.images import class_folders

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from pipeline.sources import DataParams

    #: (modality, ascending rows, bands) -> stored values, (rows, H, W, bands)
    Reader = Callable[[str, NDArray[np.int64], Sequence[int]], NDArray[np.generic]]

#: HDF5 slabs are read whole when at least this share of their rows is wanted.
_DENSE = 0.25


@dataclass(frozen=True)
class PatchSource:
    """Patches in one file or folder, by row."""

    path: Path
    count: int
    shapes: Mapping[str, tuple[int, int, int]]  # height, width, bands of each modality
    labels: NDArray[np.int64] | None  # class index per row; None for unlabelled patches
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
    if data.format == "so2sat-h5":
        modalities = data.modalities or {"optical": "sen2", "sar": "sen1"}
        return open_so2sat(path, modalities, data.labels or "label")
    modalities = data.modalities or {"optical": "images"}
    if data.format == "npz":
        return open_npz(path, modalities, data.labels or "labels")
    if len(modalities) != 1:
        raise InputError(f"format {data.format} holds one modality; data.modalities names more")
    (modality,) = modalities
    if data.format == "npy":
        return open_npy(path, modality, labels)
    return open_image_folder(path, modality, classes)


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
        _check_patches(path, names[modality], array)
    labels = None if indices is None else _class_indices(path, indices, labels_name)
    lengths = {names[modality]: len(array) for modality, array in arrays.items()}
    if labels is not None:
        lengths[labels_name] = len(labels)
    return PatchSource(
        path=path,
        count=_common_length(path, lengths),
        shapes={m: (a.shape[1], a.shape[2], a.shape[3]) for m, a in arrays.items()},
        labels=labels,
        reader=lambda modality, rows, bands: pick_bands(arrays[modality][rows], bands),
    )


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
        _check_patches(path, modalities[name], dataset)
    lengths = {modalities[name]: len(dataset) for name, dataset in datasets.items()}
    indices = None
    if labels in file:
        indices = _from_one_hot(path, np.asarray(_dataset(path, file, labels)), labels)
        lengths[labels] = len(indices)

    def read(modality: str, rows: NDArray[np.int64], bands: Sequence[int]) -> NDArray[np.generic]:
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
            whole = slab if len(slab) == len(run) else slab[run - run[0]]
            parts.append(pick_bands(whole, bands))
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    return PatchSource(
        path=path,
        count=_common_length(path, lengths),
        shapes={m: (d.shape[1], d.shape[2], d.shape[3]) for m, d in datasets.items()},
        labels=indices,
        reader=read,
        synthetic=str(file.attrs.get(MARK, "")),
    )


def pick_bands(patches: NDArray[np.generic], bands: Sequence[int]) -> NDArray[np.generic]:
    """Some bands of (N, H, W, bands); a copy only where it must be."""
    first, count = bands[0], len(bands)
    if list(bands) == list(range(first, first + count)):
        return patches[..., first : first + count]
    return patches[..., list(bands)]


def _dataset(path: Path, file: h5py.File, key: str) -> h5py.Dataset:
    found = file.get(key)
    if not isinstance(found, h5py.Dataset):
        raise InputError(f"{path.name} has no dataset {key!r}; it has {', '.join(file)}")
    return found


def open_image_folder(path: Path, modality: str, classes: Sequence[str]) -> PatchSource:
    """Class folders of PNG, JPEG or TIFF images: 8 or 16 bit, 1 to 4 channels, all of one size.

    Folders are called like the classes, or as `class_folders` calls them.

    Raises:
        InputError: no folder, folders that are no classes, a class without a folder, no image.
    """
    if not path.is_dir():
        raise InputError(f"{path.name} is a file; format image-folder needs a folder of classes")
    if not classes:
        files = [p for p in sorted(path.iterdir()) if p.suffix.lower() in SUFFIXES]
        return _image_source(path, modality, files, None)
    found = sorted(p.name for p in path.iterdir() if p.is_dir())
    named = list(classes) if set(found) == set(classes) else class_folders(classes)
    if set(found) != set(named):
        raise InputError(
            f"{path.name}: its folders are {', '.join(found) or 'none'}; needed is one per class, "
            f"called {', '.join(classes)} or {', '.join(class_folders(classes))}"
        )
    files = []
    labels: list[int] = []
    for label, name in enumerate(named):
        images = [p for p in sorted((path / name).iterdir()) if p.suffix.lower() in SUFFIXES]
        files += images
        labels += [label] * len(images)
    return _image_source(path, modality, files, np.array(labels, np.int64))


def _image_source(
    path: Path, modality: str, files: Sequence[Path], labels: NDArray[np.int64] | None
) -> PatchSource:
    if not files:
        raise InputError(f"{path.name}: no image ({', '.join(SUFFIXES)}) in it")
    height, width, channels = _image(path, files[0]).shape

    def read(modality: str, rows: NDArray[np.int64], bands: Sequence[int]) -> NDArray[np.generic]:
        images = []
        for row in rows.tolist():
            image = _image(path, files[row])
            if image.shape != (height, width, channels):
                raise InputError(
                    f"{files[row].relative_to(path.parent)} is {image.shape} (height, width, "
                    f"channels), the first image is {(height, width, channels)}; all must be equal"
                )
            images.append(image[..., list(bands)])
        return np.stack(images)

    return PatchSource(
        path=path,
        count=len(files),
        shapes={modality: (height, width, channels)},
        labels=labels,
        reader=read,
    )


def _image(folder: Path, file: Path) -> NDArray[Any]:
    try:
        return read_image(file)
    except (OSError, ValueError) as error:
        shown = file.relative_to(folder.parent)
        raise InputError(f"{shown} is not a readable image: {error}") from error


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


def _check_patches(path: Path, name: str, array: NDArray[Any] | h5py.Dataset) -> None:
    if array.ndim != 4 or array.dtype.kind not in "uif":
        raise InputError(
            f"{path.name}: {name!r} must be numbers of shape (patches, height, width, bands), "
            f"not {array.dtype} of shape {array.shape}"
        )


def _common_length(path: Path, lengths: Mapping[str, int]) -> int:
    if len(set(lengths.values())) > 1:
        counts = ", ".join(f"{name!r} has {count}" for name, count in lengths.items())
        raise InputError(f"{path.name}: its arrays differ in length: {counts}")
    return next(iter(lengths.values()))


def _class_indices(path: Path, labels: NDArray[Any], name: str) -> NDArray[np.int64]:
    if labels.ndim != 1 or labels.dtype.kind not in "ui":
        raise InputError(
            f"{path.name}: {name!r} must be one class index per patch, not {labels.dtype} of shape "
            f"{labels.shape}"
        )
    indices: NDArray[np.int64] = labels.astype(np.int64)
    return indices


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
    indices: NDArray[np.int64] = labels.argmax(axis=1).astype(np.int64)
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


def stream(
    source: PatchSource,
    modality: str,
    rows: NDArray[np.int64],
    bands: Sequence[int],
    *,
    batch: int,
    block: int = 64,
    buffer: int = 32,
    seed: int = 0,
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.float32]]]:
    """Batches in an order that is random enough to train on, from contiguous reads.

    The rows are cut into blocks of neighbours, the blocks are shuffled, and the patches of every
    `buffer` blocks are shuffled among themselves. How random that is: a batch of b patches comes
    from about `buffer * (1 - (1 - 1 / buffer) ** b)` different blocks, chosen at random from the
    whole file (64 patches from 28 of 32 blocks with the defaults); with `buffer * block >= N` the
    order is a uniform random permutation. Memory: `buffer * block` patches, and a batch. Of blocks
    from 4 to 128 patches those of 64 were the fastest (10 bands of 32x32, float64).

    Args:
        source: of the patches.
        modality: which.
        rows: ascending.
        bands: which, in this order.
        batch: rows per batch; the last may be shorter.
        block: neighbours read at once.
        buffer: blocks whose patches are mixed.
        seed: of the order; every row appears exactly once whatever it is.

    Yields:
        The rows of a batch, (batch,), and their patches as float32, which every later computation
        starts from.
    """
    random = np.random.default_rng(seed)
    blocks = np.array_split(rows, np.arange(block, len(rows), block))
    order = np.concatenate([blocks[number] for number in random.permutation(len(blocks))])
    mixed = min(len(order), -(-block * buffer // batch) * batch)  # whole batches
    height, width, _ = source.shape(modality)
    held = np.empty((mixed, height, width, len(bands)), np.float32)
    for start in range(0, len(order), mixed):
        coming = order[start : start + mixed]
        for first in range(0, len(coming), block):
            wanted = coming[first : first + block]
            wanted.sort()  # a short block shifts the others
            held[first : first + len(wanted)] = source.read(modality, wanted, bands)
        shuffled = random.permutation(len(coming))
        for first in range(0, len(coming), batch):
            chosen = shuffled[first : first + batch]
            yield coming[chosen], held[chosen]


def cached(
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
    for modality, some in bands.items():
        key = sha256(json.dumps([1, digest, modality, list(some)]).encode()).hexdigest()
        path = folder / f"{key}.npy"
        if not path.exists():
            _write_copy(source, modality, some, path, block)
        maps[modality] = np.load(path, mmap_mode="r")

    def read(modality: str, rows: NDArray[np.int64], wanted: Sequence[int]) -> NDArray[np.generic]:
        columns = [bands[modality].index(band) for band in wanted]
        return pick_bands(maps[modality][rows], columns)

    return replace(source, reader=read)


def _write_copy(
    source: PatchSource, modality: str, bands: Sequence[int], path: Path, block: int
) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.stem}.{os.getpid()}.partial")
    height, width, _ = source.shape(modality)
    shape = (source.count, height, width, len(bands))
    try:
        copy = np.lib.format.open_memmap(partial, mode="w+", dtype=np.float32, shape=shape)
        for start in range(0, source.count, block):
            rows = np.arange(start, min(start + block, source.count), dtype=np.int64)
            copy[start : start + len(rows)] = source.read(modality, rows, bands)
        copy.flush()
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
