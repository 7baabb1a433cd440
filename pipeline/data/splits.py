"""How sources are divided into train, val and test, and the dataset that ingest makes of them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from pipeline.data.source import open_source
from pipeline.params.sources import UNLABELED
from pipeline.run.errors import InputError
from pipeline.tasks.task import DEFAULT_TASK, open_task

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from pipeline.data.source import PatchSource
    from pipeline.params.sources import DataParams, SplitParams
    from pipeline.tasks.task import Task


@dataclass(frozen=True)
class Split:
    """Some rows of a source, in ascending order."""

    name: str
    source: PatchSource
    rows: NDArray[np.int64]

    @cached_property
    def labels(self) -> NDArray[np.int64]:
        """Class index of every row; UNLABELED throughout the split of that name."""
        if self.name == "unlabeled":
            return np.full(len(self.rows), UNLABELED, np.int64)
        labels = self.source.labels
        if labels is None:
            raise InputError(f"data.{self.name}: {self.source.path.name} has no labels")
        return labels[self.rows]

    def __len__(self) -> int:
        return len(self.rows)

    def without(self, rows: NDArray[np.int64]) -> Split:
        """The split with some rows left out."""
        return Split(self.name, self.source, np.setdiff1d(self.rows, rows))


def open_splits(
    data: DataParams,
    files: Mapping[str, Path],
    classes: Sequence[str],
    seed: int,
    task: Task | None = None,
) -> dict[str, Split]:
    """Open the sources and divide them; every label is checked, no row is in two splits.

    Args:
        data: the section `ingest.data`.
        files: paths by the names that `ingest` gives its sources: data.train, data.train.labels ...
        classes: names; labels must be indices into them.
        seed: of the random choice for splits given as a fraction.
        task: what a label is; None: the default.

    Raises:
        InputError: a source is not as described, a label is out of range, a split is empty, lacks
            a class in training, or shares rows with another.
    """
    task = task or open_task(DEFAULT_TASK)
    sources: dict[Path, PatchSource] = {}
    splits: dict[str, Split] = {}
    for name, params in data.splits.items():
        if params.fraction is None:
            path = files[f"data.{name}"]
            if path not in sources:
                labels = files.get(f"data.{name}.labels")
                sources[path] = open_source(
                    data, path, labels, classes if name != "unlabeled" else ()
                )
            if name != "unlabeled":
                _check_labels(sources[path], name, len(classes), task)
            rows = _rows(name, params, sources[path], files.get(f"data.{name}.indices"))
            splits[name] = Split(name, sources[path], rows)
    for name, params in data.splits.items():
        if params.fraction is not None:
            train = splits["train"]
            drawn = task.stratify(train.labels, params.fraction, seed)
            splits[name] = Split(name, train.source, train.rows[drawn])
            splits["train"] = Split("train", train.source, train.rows[~drawn])
    _check_splits(splits, len(classes))
    return {name: splits[name] for name in data.splits}


def _check_labels(source: PatchSource, name: str, classes: int, task: Task) -> None:
    if source.labels is None:
        raise InputError(
            f"data.{name}: {source.path.name} has no labels; name their array or file (data.labels)"
        )
    if fault := task.target_fault(source.labels, classes):
        raise InputError(f"{source.path.name}: {fault}")


def _rows(
    name: str, params: SplitParams, source: PatchSource, indices: Path | None
) -> NDArray[np.int64]:
    count = source.count
    if indices is not None:
        return _listed_rows(name, indices, count)
    if not count:
        raise InputError(f"data.{name}: {source.path.name} has no patches")
    start, stop = params.rows or (0, count)
    if not 0 <= start < stop <= count:
        raise InputError(
            f"data.{name}.rows is [{start}, {stop}], but {source.path.name} has rows 0 to "
            f"{count}; give [first, one past the last]"
        )
    return np.arange(start, stop, dtype=np.int64)


def _listed_rows(name: str, path: Path, count: int) -> NDArray[np.int64]:
    try:
        listed = (
            np.load(path, allow_pickle=False)
            if path.suffix == ".npy"
            else np.array([int(word) for word in path.read_text().split()], np.int64)
        )
    except (OSError, ValueError) as error:
        raise InputError(f"data.{name}.indices: {path.name} is no list of rows: {error}") from error
    if listed.ndim != 1 or listed.dtype.kind not in "ui":
        raise InputError(f"data.{name}.indices: {path.name} must be a list of whole numbers")
    rows, occurrences = np.unique(listed.astype(np.int64), return_counts=True)
    if len(rows) and (rows[0] < 0 or rows[-1] >= count):
        raise InputError(
            f"data.{name}.indices: {path.name} names row {rows[-1] if rows[0] >= 0 else rows[0]}; "
            f"there are rows 0 to {count - 1}"
        )
    if (occurrences > 1).any():
        raise InputError(
            f"data.{name}.indices: {path.name} names row {rows[occurrences > 1][0]} twice"
        )
    return rows


def _check_splits(splits: Mapping[str, Split], classes: int) -> None:
    for name, split in splits.items():
        if not len(split):
            raise InputError(f"data.{name} has no patches")
    check_classes(splits["train"], classes)
    names = list(splits)
    for i, name in enumerate(names):
        for second_name in names[i + 1 :]:
            first, second = splits[name], splits[second_name]
            if first.source is not second.source:
                continue
            shared = np.intersect1d(first.rows, second.rows)
            if len(shared):
                raise InputError(
                    f"data.{name} and data.{second_name} share {len(shared)} rows of "
                    f"{first.source.path.name}, the first is {shared[0]}; splits must not overlap"
                )


def check_classes(train: Split, classes: int) -> None:
    """Refuse a training split without a sample of some class.

    Raises:
        InputError: names the classes.
    """
    absent = sorted(set(range(classes)) - set(train.labels.tolist()))
    if absent:
        raise InputError(
            f"data.train has no patch of class {', '.join(map(str, absent))}; "
            "a class without a sample can't be learned"
        )
