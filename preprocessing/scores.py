"""How good are logits, and how alike are two networks: counted block by block. numpy only.

Logits are (N, classes, *positions): the class axis is 1, whatever the task. A classifier has no
positions. What is kept of a block is a few numbers per patch, so that nobody holds the logits of a
whole split. This file travels in every bundle: kdbench and the host count with one implementation.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterable

    from numpy.typing import NDArray


#: Two-sided 95 % quantile of the normal distribution.
Z95 = 1.959963984540054

#: Values that are added up in one call of numpy.
_SUMMED_AT_ONCE = 2**16


def without_positions(output: NDArray[np.float32]) -> NDArray[np.float32]:
    """Logits of a network that ends in a single position, such as (N, classes, 1, 1).

    Args:
        output: of a network, (N, ...).

    Returns:
        (N, classes) where all axes but the batch's and one other are 1; else the output as it is.
    """
    single = tuple(axis for axis in range(1, output.ndim) if output.shape[axis] == 1)
    return output.squeeze(single) if output.ndim - len(single) == 2 else output


def decide(logits: NDArray[np.floating]) -> NDArray[np.int64]:
    """The class of the largest logit: (N, classes, *positions) to (N, *positions)."""
    classes: NDArray[np.int64] = logits.argmax(axis=1)
    return classes


@dataclass(frozen=True)
class Score:
    """How good a network is, by the measure of its task."""

    name: str  # of the measure, as JSON keys and monitors spell it
    value: float  # 0..1
    n: int  # patches


@dataclass(frozen=True)
class PairedDifference:
    """By how much one network's score is above another's on the same patches."""

    value: float  # -1..1
    low: float  # 95 % interval
    high: float


class Metric(Protocol):
    """Counts the decisions of one network on a split, block by block; one class per task."""

    name: str  # of the score
    title: str  # of the score, for people

    def add(self, classes: NDArray[np.int64], targets: NDArray[np.int64]) -> None:
        """Count a block: decisions and what is right, (n, *positions)."""

    def score(self) -> Score:
        """Of all blocks so far."""

    def difference(self, reference: Metric) -> PairedDifference:
        """This score less the reference's, counted on the same patches in the same order."""


class Top1(Metric):
    """Of a classifier: the fraction of patches whose largest logit is that of the label."""

    name = "top1"
    title = "top-1"

    def __init__(self) -> None:
        self._blocks: list[NDArray[np.bool_]] = []

    def add(self, classes: NDArray[np.int64], targets: NDArray[np.int64]) -> None:
        """Count a block; both (n,)."""
        self._blocks.append(classes == targets)

    def right(self) -> NDArray[np.bool_]:
        """Per patch whether the decision is right, (N,)."""
        return np.concatenate(self._blocks)

    def score(self) -> Score:
        """Of all blocks so far."""
        right = self.right()
        return Score(self.name, float(right.mean()), len(right))

    def difference(self, reference: Metric) -> PairedDifference:
        """How much more often this network is right.

        Source:
            Bonett and Price 2012, adjusted Wald interval for paired binomial proportions.
        """
        assert isinstance(reference, Top1)
        right, reference_right = self.right(), reference.right()
        n = len(right)
        gained = int((right & ~reference_right).sum())
        lost = int((reference_right & ~right).sum())
        p12, p21 = (gained + 1) / (n + 2), (lost + 1) / (n + 2)
        center = p12 - p21
        half = Z95 * math.sqrt((p12 + p21 - center**2) / (n + 2))
        return PairedDifference(
            (gained - lost) / n, max(-1.0, center - half), min(1.0, center + half)
        )


#: By task, as `ingest.task` and bundle.json name it.
METRICS: dict[str, type[Metric]] = {"classification": Top1}


class Comparison:
    """A network beside a reference, on the same patches."""

    def __init__(self, task: str, patches: int) -> None:
        """Count nothing yet.

        Args:
            task: one of METRICS.
            patches: of all blocks that will be added.
        """
        self.reference: Metric = METRICS[task]()
        self.network: Metric = METRICS[task]()
        self.max_difference = 0.0  # of any logit
        self._patches = patches
        self._power: StreamedSum | None = None
        self._noise: StreamedSum | None = None
        self._cosines: list[NDArray[np.float64]] = []
        self._equal: list[NDArray[np.bool_]] = []
        self._margins: list[NDArray[np.floating]] = []

    def add(
        self,
        reference: NDArray[np.floating],
        network: NDArray[np.floating],
        targets: NDArray[np.int64],
    ) -> None:
        """Count a block.

        Args:
            reference: logits, (n, classes, *positions).
            network: logits, same shape.
            targets: (n, *positions).
        """
        reference_classes, classes = decide(reference), decide(network)
        self.reference.add(reference_classes, targets)
        self.network.add(classes, targets)
        self._equal.append(reference_classes == classes)
        best = np.sort(reference, axis=1)[:, -2:]
        self._margins.append(best[:, -1] - best[:, 0])
        difference = np.abs(reference - network).max()
        self.max_difference = float(np.maximum(self.max_difference, difference))
        self._cosines.append(cosines(reference, network))
        if self._power is None or self._noise is None:
            size = self._patches * reference[0].size
            self._power, self._noise = StreamedSum(size), StreamedSum(size)
        signal = reference.astype(np.float64)
        self._power.add(np.square(signal))
        self._noise.add(np.square(signal - network))

    @property
    def n(self) -> int:
        """Patches."""
        return sum(map(len, self._equal))

    def agreement(self) -> float:
        """Fraction 0..1 of positions at which both choose the same class."""
        return float(np.concatenate(self._equal).mean())

    def undisputed_agreement(self) -> float:
        """Agreement over the positions that are no tie for the reference.

        A tie: best and second logit differ by no more than the largest difference of any logit.
        Within what two implementations of one network may differ by, either class is right.
        """
        clear = np.concatenate(self._margins) > self.max_difference
        return float(np.concatenate(self._equal)[clear].mean()) if clear.any() else 1.0

    def loss(self) -> PairedDifference:
        """By how much the network's score is below the reference's."""
        return self.reference.difference(self.network)

    def sqnr_db(self) -> float | None:
        """Signal to noise ratio of the logits in dB; None without any noise."""
        assert self._power is not None and self._noise is not None
        return decibels(float(self._power.total()), float(self._noise.total()))

    def cosines(self) -> NDArray[np.float64]:
        """Per patch the cosine between both networks' logits, (N,)."""
        return np.concatenate(self._cosines)


def decibels(power: float, noise: float) -> float | None:
    """10 log10(power / noise); None where one of them is 0."""
    return 10 * math.log10(power / noise) if noise > 0 and power > 0 else None


def cosines(reference: NDArray[np.floating], network: NDArray[np.floating]) -> NDArray[np.float64]:
    """Cosine between all logits of a patch, for two arrays of logits of one shape, (N,).

    Where both are zero it is 1, where only one is, 0: an output that collapsed is not alike.
    """
    x, y = (logits.reshape(len(logits), -1).astype(np.float64) for logits in (reference, network))
    norm_x, norm_y = np.linalg.norm(x, axis=1), np.linalg.norm(y, axis=1)
    norms = norm_x * norm_y
    without_direction = np.where(norm_x == norm_y, 1.0, 0.0)
    safe = np.where(norms > 0, norms, 1)
    result: NDArray[np.float64] = np.where(norms > 0, (x * y).sum(axis=1) / safe, without_direction)
    return result


def mean_and_std(blocks: Callable[[], Iterable[NDArray[np.float32]]]) -> tuple[float, float]:
    """Mean and standard deviation of all numbers, as numpy computes them of one array.

    Args:
        blocks: the numbers, some at a time, from the beginning each time that it is called.
    """
    size = sum(block.size for block in blocks())
    total, squares = StreamedSum(size), StreamedSum(size)
    for block in blocks():
        total.add(block)
    mean = np.float32(float(total.total()) / size)
    for block in blocks():
        squares.add(np.square(block - mean))
    return float(mean), float(np.sqrt(np.float32(float(squares.total()) / size)))


class StreamedSum:
    """The sum of many numbers that come in blocks, which does not depend on the blocks.

    numpy adds a long row pairwise, in halves of halves. Here the same halves are added, so the sum
    is that of the whole row to the last digit.
    """

    def __init__(self, size: int) -> None:
        """Start at nothing; `size` numbers will come."""
        self._halves = _add_halves(size)
        self._needed = next(self._halves)
        self._pending: list[NDArray[np.floating]] = []
        self._count = 0
        self._total: np.floating | None = None

    def add(self, values: NDArray[np.floating]) -> None:
        """Take the next numbers, of any shape; all are of one type, which the sum has too."""
        self._pending.append(values.reshape(-1))
        self._count += values.size
        while self._total is None and self._count >= self._needed:
            row = np.concatenate(self._pending)
            part, rest = row[: self._needed], row[self._needed :]
            self._pending, self._count = [rest], rest.size
            try:
                self._needed = self._halves.send(part)
            except StopIteration as stop:
                self._total = stop.value

    def total(self) -> np.floating:
        """The sum; all numbers must have come."""
        assert self._total is not None, "fewer numbers came than were announced"
        return self._total


def _add_halves(size: int) -> Generator[int, NDArray[np.floating], np.floating]:
    """Ask for so many numbers, get them, and again; give the sum of all."""
    total: np.floating
    if size <= _SUMMED_AT_ONCE:
        total = (yield size).sum()
        return total
    half = size // 2
    half -= half % 8
    first = yield from _add_halves(half)
    second = yield from _add_halves(size - half)
    total = first + second
    return total
