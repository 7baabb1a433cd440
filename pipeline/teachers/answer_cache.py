"""Ask the teachers about every patch, in blocks that are kept as they are finished.

A block is some neighbouring rows of a split, all views of them, one teacher. It lies under a name
made of everything that decides its contents, so a run that was killed goes on at the last complete
block, several processes or machines can each make some, and a teacher that did not change is never
asked twice.
"""

from __future__ import annotations

import json
import zipfile
from dataclasses import dataclass
from hashlib import sha256
from typing import TYPE_CHECKING

import msgspec
import numpy as np

from pipeline.data.prefetch import prefetched
from pipeline.data.source import pick_bands
from pipeline.data.views import take_view
from pipeline.run.files import replacing

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from pipeline.data.splits import Split
    from pipeline.params.sources import ViewParams
    from pipeline.teachers.teacher import Teacher

    #: By modality, patches with the bands that the teachers see.
    Patches = Mapping[str, NDArray[np.generic]]


#: Rows of a block.
BLOCK = 1024

#: Rows read at once: they are converted to float32 in the processor's cache.
_PIECE = 32

_SCHEMA = 1


@dataclass(frozen=True)
class Labelling:
    """Some teachers, and where their answers are kept."""

    teachers: Sequence[Teacher]
    digests: Sequence[str]  # of each teacher: everything that decides what it says of a patch
    views: ViewParams
    seed: int
    folder: Path  # of all blocks

    def label(
        self,
        split: Split,
        source_digest: str,
        views: int,
        *,
        shard: tuple[int, int] = (0, 1),
        done: Callable[[int], object] = lambda n: None,
    ) -> None:
        """Make the blocks of a split that are not there yet.

        Args:
            split: patches.
            source_digest: of the file or folder they come from.
            views: how many views of each patch, from view 0 on.
            shard: (i, n): only every n-th block, from the i-th on.
            done: called with the number of patches of every block that is there.
        """
        blocks = list(self._blocks(split, source_digest, views))[shard[0] :: shard[1]]
        missing = [block for block in blocks if not all(map(_is_whole, block.paths))]
        done(sum(len(block.rows) for block in blocks) - sum(len(block.rows) for block in missing))
        bands = seen_bands(self.teachers)
        for block, patches in prefetched(_read(missing, split, bands)):
            for teacher, path in zip(self.teachers, block.paths, strict=True):
                if not _is_whole(path):
                    self._make(teacher, block.rows, picked(patches, bands, teacher), views, path)
            done(len(block.rows))

    def missing(self, split: Split, source_digest: str, views: int) -> tuple[int, int]:
        """How many blocks are still to be made, and of how many."""
        blocks = list(self._blocks(split, source_digest, views))
        absent = [block for block in blocks if not all(map(_is_whole, block.paths))]
        return len(absent), len(blocks)

    def answers(
        self, split: Split, source_digest: str, views: int
    ) -> Iterator[tuple[slice, list[list[NDArray[np.float32]]]]]:
        """Read the blocks of a split back, all of which are there.

        Yields:
            Which patches, and per teacher its outputs (views, n, ...): logits or probabilities
            first, then its features.
        """
        start = 0
        for block in self._blocks(split, source_digest, views):
            found = []
            for path in block.paths:
                with np.load(path) as archive:
                    found.append([archive[f"arr_{i}"] for i in range(len(archive.files))])
            yield slice(start, start + len(block.rows)), found
            start += len(block.rows)

    def _blocks(self, split: Split, source_digest: str, views: int) -> Iterator[_Block]:
        for start in range(0, len(split), BLOCK):
            rows = split.rows[start : start + BLOCK]
            about = {
                "source": source_digest,
                "rows": sha256(rows.astype("<i8").tobytes()).hexdigest(),
                "views": [views, msgspec.to_builtins(self.views) if views > 1 else None],
                "seed": self.seed if views > 1 else None,
            }
            name = sha256(json.dumps(about).encode()).hexdigest()[:32]
            yield _Block(rows, [self.folder / d[:32] / f"{name}.npz" for d in self.digests])

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
            np.savez(file, *(np.stack(same) for same in zip(*per_view, strict=True)))


@dataclass(frozen=True)
class _Block:
    rows: NDArray[np.int64]
    paths: list[Path]  # one per teacher


def _is_whole(path: Path) -> bool:
    """Whether a block is there; what was cut short while somebody copied it is not."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None
    except (OSError, EOFError, zipfile.BadZipFile):
        return False


def _read(
    blocks: Sequence[_Block], split: Split, bands: Mapping[str, Sequence[int]]
) -> Iterator[tuple[_Block, Patches]]:
    """Each block with its patches as float32, which every computation starts from.

    Their arrays are used again for the next block but one: the operating system takes longer to
    give fresh memory for a block than to read it.
    """
    shapes = {
        modality: (min(BLOCK, len(split)), *split.source.shape(modality)[:2], len(some))
        for modality, some in bands.items()
    }
    kept = [{m: np.empty(shape, np.float32) for m, shape in shapes.items()} for _ in range(2)]
    for number, block in enumerate(blocks):
        arrays = kept[number % 2]
        for modality, array in arrays.items():
            for start in range(0, len(block.rows), _PIECE):
                rows = block.rows[start : start + _PIECE]
                found = split.source.read(modality, rows, bands[modality])
                array[start : start + len(rows)] = found
        yield block, {modality: array[: len(block.rows)] for modality, array in arrays.items()}


def teacher_digest(teacher: Teacher, contract_sha256: str, file_digests: Sequence[str]) -> str:
    """Everything that decides what a teacher says of a patch."""
    params = msgspec.to_builtins(teacher.params)
    for unimportant in ("path", "weight", "recorded_top1", "recorded_logit_mean"):
        params.pop(unimportant)
    params.pop("recorded_logit_std")
    about = [_SCHEMA, contract_sha256, list(file_digests), params]
    return sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()


def seen_bands(viewers: Sequence[Teacher]) -> dict[str, list[int]]:
    """By modality, the bands that a teacher sees, ascending."""
    seen: dict[str, set[int]] = {}
    for viewer in viewers:
        seen.setdefault(viewer.modality, set()).update(viewer.bands)
    return {modality: sorted(bands) for modality, bands in seen.items()}


def picked(
    patches: Patches, bands: Mapping[str, Sequence[int]], viewer: Teacher
) -> NDArray[np.generic]:
    """The patches as one teacher sees them: its modality, its bands, its order."""
    columns = [bands[viewer.modality].index(band) for band in viewer.bands]
    return pick_bands(patches[viewer.modality], columns)
