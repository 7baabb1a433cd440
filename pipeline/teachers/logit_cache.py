"""The teachers' outputs for every patch, kept in blocks as they are finished.

A block is some neighboring rows of a split, all views of them, one teacher. It lies under a name
made of everything that decides its contents, so a run that was killed goes on at the last complete
block, several processes or machines can each make some, and a teacher that did not change is never
asked twice.
"""

from __future__ import annotations

import json
import zipfile
from dataclasses import dataclass, replace
from hashlib import sha256
from typing import TYPE_CHECKING

import msgspec
import numpy as np

from pipeline.data.blocks import BLOCK, BlockReader, bands_by_modality
from pipeline.data.views import take_view
from pipeline.run.files import replacing

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from pipeline.data.blocks import Block
    from pipeline.data.splits import Split
    from pipeline.params.sources import ViewParams
    from pipeline.teachers.teacher import Teacher


_SCHEMA = 1


@dataclass(frozen=True)
class LogitCache:
    """Some teachers, and where their outputs are kept."""

    teachers: Sequence[Teacher]
    digests: Sequence[str]  # of each teacher: everything that decides what it says of a patch
    views: ViewParams
    seed: int
    folder: Path  # of all blocks

    def fill(
        self,
        split: Split,
        source_digest: str,
        views: int,
        *,
        shard: tuple[int, int] = (0, 1),
        progress: Callable[[int], object] = lambda n: None,
    ) -> None:
        """Ask the teachers about the blocks of a split that are not there yet.

        Args:
            split: patches.
            source_digest: of the file or folder they come from.
            views: how many views of each patch, from view 0 on.
            shard: (i, n): only every n-th block, from the i-th on.
            progress: called with the number of patches of every block that is there.
        """
        blocks = list(_row_blocks(split))[shard[0] :: shard[1]]
        absent = [rows for rows in blocks if not self._is_there(rows, source_digest, views)]
        progress(sum(map(len, blocks)) - sum(map(len, absent)))
        if not absent:
            return
        # Of all blocks of a split the last alone may be short, so the reader cuts them alike.
        rest = replace(split, rows=np.concatenate(absent))
        for block in BlockReader(rest, bands_by_modality(self.teachers)):
            self.ask(block, source_digest, views)
            progress(len(block.rows))

    def ask(self, block: Block, source_digest: str, views: int) -> None:
        """Ask those teachers whose outputs for a block are not there yet, and keep them."""
        for teacher, path in zip(
            self.teachers, self._paths(block.rows, source_digest, views), strict=True
        ):
            if not _is_whole(path):
                self._make(teacher, block.rows, block.select(teacher), views, path)

    def count_missing(self, split: Split, source_digest: str, views: int) -> tuple[int, int]:
        """How many blocks are still to be made, and of how many."""
        present = [self._is_there(rows, source_digest, views) for rows in _row_blocks(split)]
        return present.count(False), len(present)

    def read_blocks(
        self, split: Split, source_digest: str, views: int
    ) -> Iterator[tuple[slice, list[list[NDArray[np.float32]]]]]:
        """Read the blocks of a split back, all of which are there.

        Yields:
            Which patches, and per teacher its outputs (views, n, ...): logits or probabilities
            first, then its features.
        """
        start = 0
        for rows in _row_blocks(split):
            outputs = []
            for path in self._paths(rows, source_digest, views):
                with np.load(path) as archive:
                    outputs.append([archive[f"arr_{i}"] for i in range(len(archive.files))])
            yield slice(start, start + len(rows)), outputs
            start += len(rows)

    def _paths(self, rows: NDArray[np.int64], source_digest: str, views: int) -> list[Path]:
        """The file of each teacher for a block of rows."""
        contents = {
            "source": source_digest,
            "rows": sha256(rows.astype("<i8").tobytes()).hexdigest(),
            "views": [views, msgspec.to_builtins(self.views) if views > 1 else None],
            "seed": self.seed if views > 1 else None,
        }
        name = sha256(json.dumps(contents).encode()).hexdigest()[:32]
        return [self.folder / digest[:32] / f"{name}.npz" for digest in self.digests]

    def _is_there(self, rows: NDArray[np.int64], source_digest: str, views: int) -> bool:
        return all(map(_is_whole, self._paths(rows, source_digest, views)))

    def _make(
        self,
        teacher: Teacher,
        rows: NDArray[np.int64],
        patches: NDArray[np.generic],
        views: int,
        path: Path,
    ) -> None:
        per_view = [
            teacher.outputs(take_view(patches, rows, view, self.views, self.seed))
            for view in range(views)
        ]
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as partial, partial.open("wb") as file:
            np.savez(file, *(np.stack(arrays) for arrays in zip(*per_view, strict=True)))


def _row_blocks(split: Split) -> Iterator[NDArray[np.int64]]:
    """The rows of each block of a split."""
    for start in range(0, len(split), BLOCK):
        yield split.rows[start : start + BLOCK]


def _is_whole(path: Path) -> bool:
    """Whether a block is there; what was cut short while somebody copied it is not."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None
    except (OSError, EOFError, zipfile.BadZipFile):
        return False


def teacher_digest(teacher: Teacher, contract_sha256: str, file_digests: Sequence[str]) -> str:
    """Everything that decides what a teacher says of a patch."""
    contents = [_SCHEMA, contract_sha256, list(file_digests), teacher.params.inference]
    return sha256(json.dumps(contents, sort_keys=True).encode()).hexdigest()
