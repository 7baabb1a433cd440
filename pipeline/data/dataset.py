"""What ingest made for the later stages: contract, student input, splits of 8-bit images."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from pipeline.tasks.task import DEFAULT_TASK, open_task
from preprocessing.apply import student_tensor
from preprocessing.contract import load_contract
from preprocessing.scores import decide
from preprocessing.student_input import StudentInput

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from numpy.typing import NDArray

    from pipeline.artifacts import Artifacts
    from pipeline.networks.inference import Network
    from pipeline.tasks.task import Task
    from preprocessing.contract import Contract
    from preprocessing.scores import Comparison, Score


#: Tensors made at a time: 300 MB of RGB at 224x224.
BLOCK = 512


@dataclass(frozen=True)
class DatasetSplit:
    """One split as ingest stored it for the later stages."""

    images: NDArray[np.uint8]  # (N, H, W, channels), as the device receives them
    labels: NDArray[np.int64]  # (N,)
    rows: NDArray[np.int64]  # (N,), row in the source

    def __len__(self) -> int:
        """Number of patches."""
        return len(self.labels)

    @staticmethod
    def load(folder: Path) -> DatasetSplit:
        """Map a folder that ingest wrote into memory; nothing is read yet."""
        return DatasetSplit(
            images=np.load(folder / "images.npy", mmap_mode="r"),
            labels=np.load(folder / "labels.npy", mmap_mode="r"),
            rows=np.load(folder / "rows.npy", mmap_mode="r"),
        )

    def spread(self, count: int) -> DatasetSplit:
        """At most `count` patches of it, evenly spaced, in memory."""
        last = len(self) - 1
        rows = np.unique(np.linspace(0, last, min(count, last + 1)).round().astype(int))
        return DatasetSplit(self.images[rows], self.labels[rows], self.rows[rows])


@dataclass(frozen=True)
class StudentData:
    """The data of a student: what it sees, what its classes are, and its splits.

    A part is read when it is first asked for, and only once; images and labels stay on disk.
    """

    artifacts: Artifacts  # of a run

    @cached_property
    def contract(self) -> Contract:
        """The preprocessing contract.

        Raises:
            ContractError: see `load_contract`.
        """
        return load_contract(self.artifacts.contract)

    @cached_property
    def student_input(self) -> StudentInput:
        """Which part of the contract the student sees.

        Raises:
            ContractError: see `StudentInput.load`.
        """
        return StudentInput.load(self.artifacts.student_input)

    @cached_property
    def task(self) -> Task:
        """What its labels are and what a score is."""
        summary = json.loads((self.artifacts.dataset / "dataset.json").read_bytes())
        return open_task(summary.get("task", DEFAULT_TASK))

    @property
    def labels(self) -> tuple[str, ...]:
        """Name of every class."""
        return self.contract.labels

    @property
    def classes(self) -> int:
        """Number of classes."""
        return len(self.labels)

    @cached_property
    def train(self) -> DatasetSplit:
        """The training split."""
        return DatasetSplit.load(self.artifacts.dataset / "train")

    @cached_property
    def val(self) -> DatasetSplit:
        """The validation split."""
        return DatasetSplit.load(self.artifacts.dataset / "val")

    @cached_property
    def unlabeled(self) -> DatasetSplit | None:
        """Patches without labels, if the run has any."""
        folder = self.artifacts.dataset / "unlabeled"
        return DatasetSplit.load(folder) if folder.exists() else None

    @cached_property
    def test(self) -> DatasetSplit:
        """The test split, an artifact of its own: no stage reads it before benchmark."""
        return DatasetSplit.load(self.artifacts.test_set)

    def tensors(
        self, split: DatasetSplit, rows: slice | NDArray[np.integer] = slice(None)
    ) -> NDArray[np.float32]:
        """What the student sees of some patches.

        Args:
            split: any.
            rows: positions in the split.

        Returns:
            float32, (n, C, H, W), in standard deviations.
        """
        return student_tensor(split.images[rows], self.student_input)

    def blocks(
        self, split: DatasetSplit, size: int = BLOCK
    ) -> Iterator[tuple[slice, NDArray[np.float32]]]:
        """A split in order, never in memory all at once: positions, and their `tensors`."""
        for start in range(0, len(split), size):
            rows = slice(start, min(start + size, len(split)))
            yield rows, self.tensors(split, rows)

    def score(self, split: DatasetSplit, network: Network) -> Score:
        """How good a network is on a split, in one pass over its blocks."""
        metric = self.task.metric()
        for rows, tensors in self.blocks(split):
            metric.add(decide(network(tensors)), split.labels[rows])
        return metric.score()

    def compare(self, split: DatasetSplit, reference: Network, network: Network) -> Comparison:
        """Two networks on a split, in one pass over its blocks."""
        return self.compare_all(split, reference, {"": network})[""]

    def compare_all(
        self, split: DatasetSplit, reference: Network, networks: Mapping[str, Network]
    ) -> dict[str, Comparison]:
        """Several networks, by name, each beside the reference, in one pass over the blocks."""
        comparisons = {name: self.task.comparison(len(split)) for name in networks}
        for rows, tensors in self.blocks(split):
            exact = reference(tensors)
            for name, network in networks.items():
                comparisons[name].add(exact, network(tensors), split.labels[rows])
        return comparisons
