"""The table of data formats, and how a file of one is opened."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from pipeline.data.arrays import open_npy, open_npz
from pipeline.data.hdf5 import open_so2sat
from pipeline.data.image_folder import open_image_folder
from pipeline.data.source import PatchSource
from pipeline.run.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from pipeline.params.sources import DataParams

    #: (modality, ascending rows, bands) -> stored values, (rows, H, W, bands)
    Reader = Callable[[str, NDArray[np.int64], Sequence[int]], NDArray[np.generic]]


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
