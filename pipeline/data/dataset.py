"""A split as ingest stored it: the 8-bit images that later stages read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from pipeline.params.sources import UNLABELED

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray


@dataclass(frozen=True)
class DatasetSplit:
    """One split as ingest stored it for the later stages."""

    images: NDArray[np.uint8]  # (N, H, W, channels), as the device receives them
    labels: NDArray[np.int64]  # (N,)
    rows: NDArray[np.int64]  # (N,), row in the source

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
        last = len(self.labels) - 1
        chosen = np.unique(np.linspace(0, last, min(count, last + 1)).round().astype(int))
        return DatasetSplit(self.images[chosen], self.labels[chosen], self.rows[chosen])


def class_histogram(labels: NDArray[np.int64], classes: int) -> list[int]:
    """How many patches each class has; unlabeled ones have none."""
    return [int(n) for n in np.bincount(labels[labels != UNLABELED], minlength=classes)]
