"""Opens the user's patches by the table of data formats."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from pipeline.params.formats import FORMATS

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from pipeline.data.source import PatchSource
    from pipeline.params.sources import DataParams


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
    module, _, name = FORMATS[data.format].opener.partition(":")
    source: PatchSource = getattr(import_module(module), name)(data, path, labels, classes)
    return source
