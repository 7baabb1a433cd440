"""Writes a split of the dataset: the 8-bit images that the device receives, block by block."""

from __future__ import annotations

import tempfile
from typing import TYPE_CHECKING

import numpy as np

from pipeline.data.array_file import ArrayFile
from pipeline.data.blocks import PIECE
from preprocessing.apply import encode, share_outside

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from numpy.typing import NDArray

    from pipeline.data.blocks import Block
    from pipeline.data.splits import Split
    from preprocessing.contract import Channels
    from preprocessing.student_input import StudentInput


#: A patch of which the encoding cuts more than this share has lost its values.
_MOST = 0.5


class ImageWriter:
    """Encodes the blocks of a split as they come.

    Where the encoding is not known before the whole training split has been seen, the student's
    bands wait as float32 in an unnamed file, so that the user's file is read once all the same.
    """

    def __init__(
        self, folder: Path, split: Split, channels: Channels, student: StudentInput | None
    ) -> None:
        """Begin the folder of a split.

        Args:
            folder: to make.
            split: its patches.
            channels: the student's bands.
            student: None: known only in `finish`.
        """
        folder.mkdir(parents=True)
        self._folder = folder
        self._channels = channels
        self._student = student
        height, width, _ = split.source.shape(channels.modality)
        self._shape = (height, width, len(channels.bands))
        self._images = ArrayFile(folder / "images.npy", np.uint8, len(split), self._shape)
        # Closed in `finish`, as is the file of images.
        self._values = None if student else tempfile.TemporaryFile(dir=folder)  # noqa: SIM115
        self._outside: list[NDArray[np.intp]] = []
        self._count = 0

    def add(self, block: Block) -> None:
        """Take the next patches."""
        patches = block.select(self._channels)
        for start in range(0, len(patches), PIECE):
            piece = patches[start : start + PIECE]
            if self._values is None:
                self._write(piece)
            else:
                self._values.write(np.ascontiguousarray(piece, np.float32).data)

    def finish(self, split: Split, student: StudentInput) -> list[int]:
        """Write what is missing: labels, rows, and images that waited for their encoding.

        Args:
            split: the patches that were added.
            student: the encoding.

        Returns:
            Rows of patches of which the encoding cuts most values.
        """
        self._student = student
        for piece in self._waiting():
            self._write(piece)
        self.close()
        np.save(self._folder / "labels.npy", split.labels)
        np.save(self._folder / "rows.npy", split.rows)
        outside = np.concatenate([np.empty(0, np.intp), *self._outside])
        rows: list[int] = split.rows[outside].tolist()
        return rows

    def close(self) -> None:
        """Close the files."""
        self._images.close()
        if self._values is not None:
            self._values.close()

    def _waiting(self) -> Iterator[NDArray[np.float32]]:
        if self._values is None:
            return
        self._values.seek(0)
        size = PIECE * int(np.prod(self._shape)) * np.dtype(np.float32).itemsize
        while data := self._values.read(size):
            yield np.frombuffer(data, np.float32).reshape(-1, *self._shape)

    def _write(self, patches: NDArray[np.generic]) -> None:
        assert self._student is not None
        encoded = encode(patches, self._channels, self._student)
        self._images.append(encoded)
        # 0 and 255 are the two ends; less one, in 8 bits, they are 255 and 254.
        at_ends = np.count_nonzero(encoded - np.uint8(1) >= 254, axis=(1, 2, 3))
        doubtful = np.flatnonzero(at_ends > _MOST * encoded[0].size)
        if len(doubtful):
            shares = share_outside(patches[doubtful], self._channels, self._student)
            self._outside.append(self._count + doubtful[shares > _MOST])
        self._count += len(patches)
