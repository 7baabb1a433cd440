"""What ingest hands to distill besides images: soft targets, or the teachers."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import msgspec
import numpy as np

from pipeline.data.array_file import ArrayFile
from pipeline.data.blocks import Block, bands_by_modality
from pipeline.data.views import take_view
from pipeline.teachers.ensemble import Ensemble
from pipeline.teachers.open import open_teachers
from pipeline.teachers.teacher import Teacher
from preprocessing.contract import load_contract

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from pipeline.data.splits import Split


@dataclass(frozen=True)
class EnsembleOutputs:
    """What the ensemble says of a batch."""

    logits: NDArray[np.float32]  # (n, classes)
    features: list[NDArray[np.float32]]  # (n, ...) each, in the order of `feature_names`


class SoftTargets:
    """The artifact `teaching`: read it by split, view and index.

    The folder holds ensemble.json; cached: <split>-logits.npy (views, N, classes) and
    <split>-feature<i>.npy (views, N, ...); live: teachers/<i>/<file>, <split>-<modality>.npy
    (N, H, W, bands) and <split>-rows.npy; and val-members.npy (members, N, classes).
    """

    def __init__(self, folder: Path, contract: Path) -> None:
        """Map what is there; nothing is read yet.

        Args:
            folder: that `write_cached` or `write_live` filled.
            contract: preprocessing.json.
        """
        self._folder = folder
        self._contract = contract
        document = json.loads((folder / "ensemble.json").read_text())
        self.mode: Literal["cached", "live"] = document.pop("mode")
        self.ensemble = msgspec.convert(document, Ensemble)
        self._arrays: dict[str, NDArray[Any]] = {}
        self._teachers: list[Teacher] | None = None

    def outputs(self, split: str, indices: NDArray[np.int64], view: int) -> EnsembleOutputs:
        """What the ensemble says of some patches of a split.

        Args:
            split: "train" or "unlabeled".
            indices: (n,), position in the split.
            view: 0 .. views.count - 1.
        """
        if self.mode == "live":
            return self._ask(split, indices, view)
        names = ["logits", *(f"feature{i}" for i in range(len(self.ensemble.feature_names)))]
        logits, *features = (self._array(f"{split}-{name}")[view, indices] for name in names)
        return EnsembleOutputs(logits, features)

    def val_members(self) -> NDArray[np.float32]:
        """Logits of every member for the validation split, (members, N, classes)."""
        return self._array("val-members")

    def _array(self, name: str) -> NDArray[Any]:
        if name not in self._arrays:
            self._arrays[name] = np.load(self._folder / f"{name}.npy", mmap_mode="r")
        return self._arrays[name]

    def _ask(self, split: str, indices: NDArray[np.int64], view: int) -> EnsembleOutputs:
        if self._teachers is None:
            contract = load_contract(self._contract)
            files = [
                (
                    self._file(i),
                    m.params,
                    contract.bind(m.params.modality, m.params.bands, m.bands_in_data),
                )
                for i, m in enumerate(self.ensemble.members)
            ]
            self._teachers, _ = open_teachers(files, contract)
        bands = bands_by_modality(self._teachers)
        rows = self._array(f"{split}-rows")[indices]
        patches = {
            m: take_view(
                self._array(f"{split}-{m}")[indices],
                rows,
                view,
                self.ensemble.views,
                self.ensemble.seed,
            )
            for m in bands
        }
        block = Block(rows, bands, patches)
        outputs = [t.outputs(block.select(t)) for t in self._teachers]
        logits = self.ensemble.logits([first for first, *_ in outputs])
        features = [feature for _, *rest in outputs for feature in rest]
        return EnsembleOutputs(logits, features)

    def _file(self, member: int) -> Path | None:
        folder = self._folder / "teachers" / str(member)
        name = self.ensemble.members[member].params.path
        return folder / name if name else None

    def __getstate__(self) -> dict[str, Any]:
        """Without maps and sessions: a worker process opens its own."""
        return {**self.__dict__, "_arrays": {}, "_teachers": None}


def write_val_members(
    folder: Path, count: int, blocks: Iterable[tuple[slice, Sequence[NDArray[np.float32]]]]
) -> NDArray[np.float32]:
    """Start the artifact with each member's logits of the validation split.

    Args:
        folder: of the artifact.
        count: patches of the split.
        blocks: positions in it, and per member logits (n, classes, ...).

    Returns:
        float32, (members, N, classes, ...), memory-mapped.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "val-members.npy"
    file: NDArray[np.float32] | None = None
    for part, members in blocks:
        if file is None:
            shape = (len(members), count, *members[0].shape[1:])
            file = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=shape)
        for row, logits in zip(file, members, strict=True):
            row[part] = logits
    del file  # written; what is mapped anew can't be changed
    mapped: NDArray[np.float32] = np.load(path, mmap_mode="r")
    return mapped


def write_ensemble(folder: Path, mode: str, ensemble: Ensemble) -> None:
    """Write how the outputs are combined."""
    document = {"mode": mode, **msgspec.to_builtins(ensemble)}
    (folder / "ensemble.json").write_text(json.dumps(document, indent=1) + "\n")


class SoftTargetWriter:
    """Fills the cached arrays of one split, block by block."""

    def __init__(self, folder: Path, split: str, ensemble: Ensemble, count: int) -> None:
        self._folder = folder
        self._split = split
        self._ensemble = ensemble
        self._count = count
        self._arrays: list[NDArray[np.float32]] = []

    def add(self, part: slice, outputs: Sequence[Sequence[NDArray[np.float32]]]) -> None:
        """Keep what the teachers say of some patches; per member its outputs (views, n, ...)."""
        views, n, *rest = outputs[0][0].shape
        flat = [first.reshape(views * n, *rest) for first, *_ in outputs]
        logits = self._ensemble.logits(flat).reshape(views, n, *rest)
        arrays = [logits, *(feature for _, *features in outputs for feature in features)]
        if not self._arrays:
            names = ["logits", *(f"feature{i}" for i in range(len(arrays) - 1))]
            self._arrays = [
                np.lib.format.open_memmap(
                    self._folder / f"{self._split}-{name}.npy",
                    mode="w+",
                    dtype=np.float32,
                    shape=(len(array), self._count, *array.shape[2:]),
                )
                for name, array in zip(names, arrays, strict=True)
            ]
        for target, array in zip(self._arrays, arrays, strict=True):
            target[:, part] = array


def write_live_teachers(folder: Path, teachers: Sequence[Teacher]) -> None:
    """Copy the teachers' files into the artifact, each with its weights outside beside it."""
    for i, teacher in enumerate(teachers):
        for file in teacher.files:
            copy = folder / "teachers" / str(i) / file.relative_to(teacher.files[0].parent)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, copy)


class LivePatchWriter:
    """Copies the bands of a split that the teachers see, float32, block by block."""

    def __init__(self, folder: Path, split: Split, teachers: Sequence[Teacher]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._rows = folder / f"{split.name}-rows.npy"
        self._files = []
        for modality, bands in bands_by_modality(teachers).items():
            height, width, _ = split.source.shape(modality)
            path = folder / f"{split.name}-{modality}.npy"
            shape = (height, width, len(bands))
            self._files.append((modality, bands, ArrayFile(path, np.float32, len(split), shape)))

    def add(self, block: Block) -> None:
        """Take the next patches."""
        for modality, bands, file in self._files:
            file.append(block.pick(modality, bands))

    def finish(self, split: Split) -> None:
        """Write the rows of the patches that were added."""
        self.close()
        np.save(self._rows, split.rows)

    def close(self) -> None:
        """Close the files."""
        for _, _, file in self._files:
            file.close()
