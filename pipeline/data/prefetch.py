"""Make the next item while the present one is worked on."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator


T = TypeVar("T")


def prefetch(items: Iterable[T]) -> Iterator[T]:
    """The same items, each made in a thread of its own while the one before is in use.

    NumPy, h5py and onnxruntime release the interpreter while they work. An error of the maker comes
    out where its item would.
    """
    iterator = iter(items)
    end = object()
    with ThreadPoolExecutor(max_workers=1) as thread:
        coming = thread.submit(next, iterator, end)
        while (item := coming.result()) is not end:
            coming = thread.submit(next, iterator, end)
            yield item  # type: ignore[misc]  # not the end
