"""A .npy file that is written front to back: nothing of it stays in memory."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from pathlib import Path
    from types import TracebackType

    from numpy.typing import DTypeLike, NDArray


class ArrayFile:
    """A .npy file of at most so many entries, appended to and closed; the bytes are NumPy's own.

    A memory map would do as well, but every page of it that was touched counts as memory of the
    process, so that a large split would look like a large process.
    """

    def __init__(
        self, path: Path, dtype: DTypeLike, count: int, entry_shape: tuple[int, ...]
    ) -> None:
        self._dtype = np.dtype(dtype)
        self._entry_shape = entry_shape
        self._reserved = count
        self._written = 0
        self._file = path.open("wb")
        self._file.write(self._header(count))

    def append(self, entries: NDArray[np.generic]) -> None:
        """Write entries, (n, *entry_shape), of any type that casts to the file's."""
        self._file.write(np.ascontiguousarray(entries, self._dtype).data)
        self._written += len(entries)

    def close(self) -> None:
        """Say in the header how many entries there are, should they be fewer than were reserved."""
        if self._file.closed:
            return
        if self._written != self._reserved:
            reserved = len(self._header(self._reserved))
            text = self._header(self._written)[10:-1]
            self._file.seek(0)
            header = self._header(self._reserved)[:10] + text.ljust(reserved - 11) + b"\n"
            self._file.write(header)
        self._file.close()

    def __enter__(self) -> ArrayFile:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _header(self, count: int) -> bytes:
        buffer = io.BytesIO()
        description = {
            "descr": np.lib.format.dtype_to_descr(self._dtype),
            "fortran_order": False,
            "shape": (count, *self._entry_shape),
        }
        np.lib.format.write_array_header_1_0(buffer, description)
        return buffer.getvalue()
