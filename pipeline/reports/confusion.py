"""Which class is taken for which: counts as CSV and as a picture; single decisions as CSV."""

from __future__ import annotations

import csv
import math
from dataclasses import astuple, dataclass
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.figure import Figure
from scipy.special import softmax

from preprocessing.scores import decide

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from numpy.typing import NDArray


#: Patches whose decisions are listed one by one.
SHOWN = 5


@dataclass(frozen=True)
class Confusion:
    """Of one network, or of several that differ in their seed."""

    classes: tuple[str, ...]
    counts: NDArray[np.int64]  # (classes, classes): row = the label, column = the decision

    def __add__(self, addend: Confusion) -> Confusion:
        """Counts of both; their classes are the same."""
        return Confusion(self.classes, self.counts + addend.counts)


@dataclass(frozen=True)
class Decision:
    """What one network says about one patch."""

    row: int  # of the patch in its source
    label: str
    decision: str
    probability: float  # softmax of the chosen class


def first_decisions(
    logits: NDArray[np.floating],
    labels: NDArray[np.int64],
    rows: NDArray[np.int64],
    classes: Sequence[str],
) -> tuple[Decision, ...]:
    """The first few patches of a split; logits (N, classes), labels and rows (N,)."""
    head = logits[:SHOWN].astype(np.float64)
    confidence = softmax(head, axis=1).max(axis=1)
    return tuple(
        Decision(int(row), classes[label], classes[winner], float(probability))
        for row, label, winner, probability in zip(
            rows, labels, decide(head), confidence, strict=False
        )
    )


def write_decisions(rows: Sequence[tuple[str, int, Sequence[Decision]]], folder: Path) -> None:
    """Write decisions.csv; rows: network, seed of its run, decisions."""
    with (folder / "decisions.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["network", "seed", "row", "label", "decision", "probability"])
        for name, seed, decisions in rows:
            writer.writerows([name, seed, *astuple(decision)] for decision in decisions)


def write_confusions(confusions: Sequence[tuple[str, Confusion]], folder: Path) -> None:
    """Write confusion.csv (network, label, decision, n) and confusion.png, a panel per network."""
    with (folder / "confusion.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["network", "label", "decision", "n"])
        for name, confusion in confusions:
            for (row, column), count in np.ndenumerate(confusion.counts):
                writer.writerow([name, confusion.classes[row], confusion.classes[column], count])
    _picture(confusions, folder / "confusion.png")


def _picture(confusions: Sequence[tuple[str, Confusion]], path: Path) -> None:
    columns = min(3, len(confusions))
    rows = math.ceil(len(confusions) / columns)
    edge = 2.0 + 0.3 * max(len(confusion.classes) for _, confusion in confusions)
    figure = Figure(figsize=(edge * columns, edge * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for panel in axes.flat[len(confusions) :]:
        panel.set_axis_off()
    for panel, (name, confusion) in zip(axes.flat, confusions, strict=False):
        shares = confusion.counts / np.maximum(confusion.counts.sum(axis=1, keepdims=True), 1)
        panel.imshow(shares, cmap="Blues", vmin=0, vmax=1)
        for (row, column), count in np.ndenumerate(confusion.counts):
            if count:
                color = "white" if shares[row, column] > 0.5 else "black"
                panel.text(column, row, count, ha="center", va="center", color=color, fontsize=7)
        places = range(len(confusion.classes))
        panel.set_xticks(list(places), confusion.classes, rotation=90, fontsize=7)
        panel.set_yticks(list(places), confusion.classes, fontsize=7)
        panel.set_title(name, fontsize=9)
        panel.set_xlabel("decision")
        panel.set_ylabel("label")
    figure.savefig(path, dpi=150)
