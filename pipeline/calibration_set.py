"""Which training patches calibrate: every class in its share, none twice, none without content."""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import sha256
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.splits import class_histogram
from pipeline.stage import InputError
from preprocessing.apply import student_tensor

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

    from numpy.typing import NDArray

    from pipeline.splits import DatasetSplit
    from preprocessing.contract import StudentInput

#: A patch of which more than this share lies at the ends of the encoding has lost its values.
_SATURATED = 0.5

#: Rows that a warning lists.
_SHOWN = 10

#: Tensors made at a time.
_BLOCK = 64


@dataclass(frozen=True)
class Choice:
    """The calibration patches, and what was left out."""

    indices: NDArray[np.int64]  # into the training split, in the order in which they calibrate
    duplicates: int  # patches left out because another is equal
    constant_rows: list[int]  # rows of patches left out because every pixel is the same

    def warnings(self, train: DatasetSplit, leaks: Iterable[Mapping[str, Any]]) -> list[str]:
        """What a user should know about the chosen patches.

        Args:
            train: the training split.
            leaks: as ingest recorded them.
        """
        words = []
        if self.constant_rows:
            words.append(
                f"{len(self.constant_rows)} training patches are one color all over and were not "
                f"taken for calibration: rows {_listed(self.constant_rows)}"
            )
        cut = [
            int(train.rows[i])
            for i in self.indices
            if np.isin(train.images[i], (0, 255)).mean() > _SATURATED
        ]
        if cut:
            words.append(
                f"{len(cut)} calibration patches lie mostly outside the encoding's range (0 or "
                f"255): rows {_listed(cut)}; see ingest.student.encoding"
            )
        chosen = set(train.rows[self.indices].tolist())
        for leak in leaks:
            if {leak["one"], leak["other"]} == {"train", "test"}:
                side = 0 if leak["one"] == "train" else 1
                rows = sorted(chosen & {pair[side] for pair in leak["pairs"]})
                if rows:
                    words.append(f"calibration patches that are in test too: rows {_listed(rows)}")
        return words


def _listed(rows: list[int]) -> str:
    return ", ".join(map(str, rows[:_SHOWN])) + (", ..." if len(rows) > _SHOWN else "")


def choose_samples(train: DatasetSplit, count: int, classes: int, seed: int) -> Choice:
    """Draw training samples, every class in its share and no image twice, in a random fixed order.

    Args:
        train: the training split.
        count: how many.
        classes: number of classes.
        seed: of the choice and the order.

    Raises:
        InputError: there are not as many different images.
    """
    random = np.random.default_rng(seed)
    seen: set[bytes] = set()
    constant, duplicates = [], 0
    queues: list[list[int]] = []
    for label in range(classes):
        members = random.permutation(np.flatnonzero(train.labels == label))
        queue = []
        for index in members.tolist():
            # The SDK's deploy script stops when two of the first images are the same.
            image = train.images[index]
            content = image.tobytes()
            if (image == image[0, 0]).all():
                constant.append(int(train.rows[index]))
            elif content in seen:
                duplicates += 1
            else:
                seen.add(content)
                queue.append(index)
        queues.append(queue)
    total = sum(map(len, queues))
    if total < count:
        raise InputError(
            f"calibrate.samples is {count}, but the training split has only {total} different "
            f"images ({duplicates} are repeated, {len(constant)} are one color all over); "
            "ask for fewer"
        )
    shares = _shares([len(queue) for queue in queues], count)
    chosen = [index for queue, share in zip(queues, shares, strict=True) for index in queue[:share]]
    order = random.permutation(np.array(chosen, np.int64))
    return Choice(order, duplicates, sorted(constant))


def _shares(sizes: list[int], count: int) -> list[int]:
    """Divide `count` in proportion to `sizes`, by largest remainders; at least one where it can."""
    total = sum(sizes)
    exact = [count * size / total for size in sizes]
    shares = [min(size, max(int(share), 1)) for size, share in zip(sizes, exact, strict=True)]
    order = sorted(range(len(sizes)), key=lambda i: exact[i] - int(exact[i]), reverse=True)
    while sum(shares) != count:
        step = 1 if sum(shares) < count else -1
        for i in order if step > 0 else reversed(order):
            if sum(shares) != count and 0 <= shares[i] + step <= sizes[i]:
                shares[i] += step
    return shares


def write_samples(
    path: Path, train: DatasetSplit, choice: Choice, given: StudentInput, classes: int
) -> dict[str, Any]:
    """Write samples.npy, float32 (N, 1, C, H, W), block by block; describe it.

    Returns:
        Split, number, class histogram, rows in order, and the digest of the tensors' bytes.
    """
    indices = choice.indices
    shape = (len(indices), 1, len(given.bands), *given.size_hw)
    file = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=shape)
    digest = sha256()
    for start in range(0, len(indices), _BLOCK):
        block = student_tensor(train.images[indices[start : start + _BLOCK]], given)
        file[start : start + len(block), 0] = block
        digest.update(np.ascontiguousarray(block).tobytes())
    file.flush()
    return {
        "split": "train",
        "samples": len(indices),
        "classes": class_histogram(train.labels[indices], classes),
        "duplicates_left_out": choice.duplicates,
        "constant_left_out": len(choice.constant_rows),
        "rows": train.rows[indices].tolist(),
        "sha256": digest.hexdigest(),
    }
