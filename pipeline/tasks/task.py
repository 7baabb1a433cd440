"""The seam for tasks: what a label is, what a score is. Nothing else asks which task it is.

The numpy half of it, which travels to the device too, is `preprocessing.scores`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    from numpy.typing import NDArray

    from preprocessing.scores import Comparison, Metric


#: By the name in kdpipe.yaml, the module that defines `TASK`.
TASKS = {"classification": "pipeline.tasks.classification"}

#: What kdpipe.yaml means where it names no task.
DEFAULT_TASK = "classification"


class Table(Protocol):
    """Figures of one network beside its score, counted block by block."""

    confusion: NDArray[np.int64]  # (classes, classes): row = the label, column = the decision

    def add(self, logits: NDArray[np.floating], targets: NDArray[np.int64]) -> None:
        """Count a block: logits (n, classes, *positions), targets (n, *positions)."""

    def figures(self) -> dict[str, float]:
        """By name; the first is the score."""


class Task(Protocol):
    """A kind of problem. Logits are (N, classes, *positions), targets (N, *positions)."""

    name: str  # in kdpipe.yaml, and in `preprocessing.scores.METRICS`
    score: str  # name of the measure of how good a network is
    title: str  # of that measure, for people
    monitor: str  # its name in the history of a training

    def output_fault(self, shape: Sequence[int], classes: int, size_hw: tuple[int, int]) -> str:
        """What is wrong with the shape of a network's logits, or nothing.

        Args:
            shape: of the logits, (N, ...).
            classes: that the contract names.
            size_hw: of the network's input.
        """

    def target_fault(self, targets: NDArray[np.integer], classes: int) -> str:
        """What is wrong with the labels of a source, or nothing."""

    def class_counts(self, targets: NDArray[np.int64], classes: int) -> list[int]:
        """How many labels each class has; what is unlabeled has none."""

    def stratify(self, targets: NDArray[np.int64], fraction: float, seed: int) -> NDArray[np.bool_]:
        """Draw a share of the patches, each class in its share; (N,), True where drawn."""

    def table(self, classes: int) -> Table:
        """Counts what a table of networks says of one."""

    def metric(self) -> Metric:
        """Counts how good one network is."""

    def comparison(self, patches: int) -> Comparison:
        """Counts how alike two networks are on so many patches."""


def open_task(name: str) -> Task:
    """The task of a name in `TASKS`."""
    task: Task = import_module(TASKS[name]).TASK
    return task
