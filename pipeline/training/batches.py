"""What the student is trained on: batches of tensors, labels and the teachers' answers."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from pipeline.data.dataset import DatasetSplit
from pipeline.data.views import take_view
from pipeline.params.sources import UNLABELED
from preprocessing.apply import student_tensor

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from numpy.typing import NDArray
    from torch import Tensor

    from pipeline.teachers.soft_targets import SoftTargets
    from preprocessing.student_input import StudentInput


#: The view of an epoch and the samples of one batch.
Chosen = tuple[int, list[int]]


class Batch(NamedTuple):
    """One batch; the teachers' part is empty where nobody teaches."""

    tensor: Tensor  # float32, (N, C, H, W)
    labels: Tensor  # int64, (N,), UNLABELED where nobody said
    logits: Tensor  # float32, (N, classes) or (N, 0)
    features: list[Tensor]  # float32, (N, ...)


class StudentBatches(Dataset[Batch]):
    """Whole batches by view and indices: first the training split, then the unlabeled one."""

    def __init__(
        self,
        splits: Mapping[str, DatasetSplit],
        given: StudentInput,
        teaching: SoftTargets | None,
        *,
        answers: bool = True,
    ) -> None:
        """Nothing is read before a batch is asked for.

        Args:
            splits: one split, or "train" and "unlabeled".
            given: the student's input.
            teaching: gives the views and the teachers' answers; None: plain patches, no answers.
            answers: whether batches carry the answers.
        """
        self._splits = dict(splits)
        self._given = given
        self._teaching = teaching
        self._answers = answers
        self._starts = np.cumsum([0, *(len(split.labels) for split in self._splits.values())])

    def __len__(self) -> int:
        """The number of samples."""
        return int(self._starts[-1])

    def labels(self) -> NDArray[np.int64]:
        """Of all samples, (N,)."""
        return np.concatenate([split.labels for split in self._splits.values()])

    def __getitem__(self, selection: Chosen) -> Batch:
        """The batch of these samples, in some order."""
        view, positions = selection
        indices = np.sort(np.asarray(positions))  # ascending: maps are read forwards
        parts = [self._part(number, view, indices) for number in range(len(self._splits))]
        parts = [part for part in parts if len(part.labels)]
        if len(parts) == 1:
            return parts[0]
        tensors, labels, logits, features = zip(*parts, strict=True)
        return Batch(
            torch.cat(tensors),
            torch.cat(labels),
            torch.cat(logits),
            [torch.cat(pieces) for pieces in zip(*features, strict=True)],
        )

    def _part(self, number: int, view: int, indices: NDArray[np.int64]) -> Batch:
        """The samples of one split among these indices."""
        name = list(self._splits)[number]
        split = self._splits[name]
        low, high = np.searchsorted(indices, self._starts[number : number + 2])
        rows = indices[low:high] - self._starts[number]
        images = split.images[rows]
        logits, features = torch.empty(len(rows), 0), []
        if self._teaching is not None and len(rows):
            ensemble = self._teaching.ensemble
            images = take_view(images, split.rows[rows], view, ensemble.views, ensemble.seed)
            if self._answers:
                outputs = self._teaching.outputs(name, rows, view)
                logits = torch.from_numpy(outputs.logits)
                features = [torch.from_numpy(feature) for feature in outputs.features]
        tensor = torch.from_numpy(student_tensor(images, self._given))
        return Batch(tensor, torch.from_numpy(split.labels[rows]), logits, features)


class Order(Sampler[Chosen]):
    """Which samples make which batch, decided by the seed and the epoch alone.

    So a training that was killed goes on exactly as it would have, and several processes each take
    their part of the same order.
    """

    def __init__(
        self,
        count: int,
        batch_size: int,
        *,
        seed: int,
        views: int = 1,
        steps: int | None = None,
        weights: NDArray[np.float64] | None = None,
        first_epoch: int = 0,
        rank: int = 0,
        processes: int = 1,
    ) -> None:
        """Describe the batches of an epoch.

        Args:
            count: samples.
            batch_size: of one process.
            seed: of the order.
            views: epoch e takes view e mod this.
            steps: batches of an epoch; None: as many as are full.
            weights: chance of every sample, drawn with replacement; None: each once.
            first_epoch: the number of the first epoch, where a training goes on with another's.
            rank: of this process.
            processes: how many there are.
        """
        self._count = count
        self._size = min(batch_size, max(1, count // processes))
        self._seed = seed
        self._views = views
        self._weights = None if weights is None else weights / weights.sum()
        self._rank = rank
        self._processes = processes
        # The last, short batch is left out: batch normalization needs more than one sample.
        self._steps = steps or count // (self._size * processes)
        self._first_epoch = first_epoch
        self._epoch = first_epoch

    def set_epoch(self, epoch: int) -> None:
        """Lightning says which epoch comes, also when it resumes."""
        self._epoch = self._first_epoch + epoch

    def __len__(self) -> int:
        """Batches of an epoch."""
        return self._steps

    def __iter__(self) -> Iterator[Chosen]:
        """The batches of this process."""
        random = np.random.default_rng([self._seed, self._epoch])
        size = self._size * self._processes
        needed = self._steps * size
        if self._weights is not None:
            order = random.choice(self._count, needed, p=self._weights)
        else:
            rounds = -(-needed // self._count)
            order = np.concatenate([random.permutation(self._count) for _ in range(rounds)])
        for step in range(self._steps):
            start = step * size + self._rank * self._size
            yield self._epoch % self._views, order[start : start + self._size].tolist()


class InOrder(Sampler[Chosen]):
    """Every sample once, in order, as it is."""

    def __init__(self, count: int, batch_size: int) -> None:
        self._count = count
        self._size = batch_size

    def __len__(self) -> int:
        """Batches."""
        return -(-self._count // self._size)

    def __iter__(self) -> Iterator[Chosen]:
        """All batches; the last may be short."""
        for start in range(0, self._count, self._size):
            yield 0, list(range(start, min(start + self._size, self._count)))


def loader(data: StudentBatches, sampler: Sampler[Chosen], workers: int) -> DataLoader[Batch]:
    """Batches as the sampler chooses them, made by worker processes if there are any."""
    return DataLoader(
        data,
        batch_size=None,
        sampler=sampler,
        num_workers=workers,
        persistent_workers=workers > 0,
    )


def class_shares(labels: NDArray[np.int64], classes: int) -> NDArray[np.float64]:
    """Share of every class among the labelled samples, (classes,); they sum to 1."""
    labeled = labels[labels != UNLABELED]
    counts = np.bincount(labeled, minlength=classes).astype(np.float64)
    shares: NDArray[np.float64] = counts / counts.sum()
    return shares


def balanced_weights(labels: NDArray[np.int64], classes: int) -> NDArray[np.float64]:
    """Chance of every sample, (N,), that makes all classes equally frequent.

    Unlabeled samples together keep the share that they have.
    """
    shares = class_shares(labels, classes)
    labeled = labels != UNLABELED
    weights = np.ones(len(labels))
    weights[labeled] = 1 / (shares[labels[labeled]] * (shares > 0).sum())
    return weights
