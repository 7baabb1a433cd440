"""Which training patches calibrate: every class in its share, none twice, none without content."""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import sha256
from typing import TYPE_CHECKING

import numpy as np

from pipeline.facts import CalibrationSetFacts
from pipeline.run.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping
    from pathlib import Path

    from numpy.typing import NDArray

    from pipeline.data.dataset import DatasetSplit, StudentData


#: What ingest finds unfit, by its keys in the artifact `unfit`: train's patches that ...
UNFIT = {
    "elsewhere": "are in val or test too",
    "outside": "lie mostly outside the encoding's range",
}

_ONE_COLOR, _REPEATED = _OTHERS = "are one color all over", "repeat another"

#: Rows that a warning lists.
_SHOWN = 10

#: Tensors made at a time.
_BLOCK = 64


@dataclass(frozen=True)
class Choice:
    """The calibration patches, and what was left out."""

    indices: NDArray[np.int64]  # into the training split, in the order in which they calibrate
    left_out: Mapping[str, list[int]]  # why -> rows of the training split, ascending

    def warnings(self) -> list[str]:
        """What a user should know about the patches that were not taken."""
        return [
            f"{len(rows)} training patches {words} and were not taken for calibration: rows "
            + ", ".join(map(str, rows[:_SHOWN]))
            + (", ..." if len(rows) > _SHOWN else "")
            for words, rows in self.left_out.items()
        ]


def choose_samples(
    train: DatasetSplit,
    count: int,
    classes: int,
    seed: int,
    unfit: Mapping[str, Collection[int]] | None = None,
    asker: str = "calibrate.samples",
) -> Choice:
    """Draw training samples, every class in its share and no image twice, in a random fixed order.

    Args:
        train: the training split.
        count: how many.
        classes: number of classes.
        seed: of the choice and the order.
        unfit: by the keys of UNFIT, rows of the split that ingest found unfit.
        asker: who says how many, for the error.

    Raises:
        InputError: there are not as many different images.
    """
    random = np.random.default_rng(seed)
    contents: set[bytes] = set()
    refused = {row: UNFIT[reason] for reason, rows in (unfit or {}).items() for row in rows}
    left_out: dict[str, list[int]] = {words: [] for words in (*UNFIT.values(), *_OTHERS)}
    queues: list[list[int]] = []
    for label in range(classes):
        members = random.permutation(np.flatnonzero(train.labels == label))
        queue = []
        for index in members.tolist():
            # The SDK's deploy script stops when two of the first images are the same.
            image, row = train.images[index], int(train.rows[index])
            content = image.tobytes()
            if row in refused:
                left_out[refused[row]].append(row)
            elif (image == image[0, 0]).all():
                left_out[_ONE_COLOR].append(row)
            elif content in contents:
                left_out[_REPEATED].append(row)
            else:
                contents.add(content)
                queue.append(index)
        queues.append(queue)
    total = sum(map(len, queues))
    left_out = {words: sorted(rows) for words, rows in left_out.items() if rows}
    if total < count:
        reasons = ", ".join(f"{len(rows)} {words}" for words, rows in left_out.items())
        raise InputError(
            f"{asker} is {count}, but the training split has only {total} different images that "
            f"can calibrate{reasons and f' ({reasons})'}; ask for fewer"
        )
    shares = _shares([len(queue) for queue in queues], count)
    indices = [
        index for queue, share in zip(queues, shares, strict=True) for index in queue[:share]
    ]
    order = random.permutation(np.array(indices, np.int64))
    return Choice(order, left_out)


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


def write_samples(path: Path, data: StudentData, choice: Choice) -> CalibrationSetFacts:
    """Write samples.npy, float32 (N, 1, C, H, W), block by block; describe it."""
    train, indices = data.train, choice.indices
    shape = (len(indices), 1, len(data.student_input.bands), *data.student_input.size_hw)
    file = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=shape)
    digest = sha256()
    for start in range(0, len(indices), _BLOCK):
        block = data.tensors(train, indices[start : start + _BLOCK])
        file[start : start + len(block), 0] = block
        digest.update(np.ascontiguousarray(block).tobytes())
    file.flush()
    return CalibrationSetFacts(
        split="train",
        samples=len(indices),
        classes=tuple(data.task.class_counts(train.labels[indices], data.classes)),
        left_out={words: len(rows) for words, rows in choice.left_out.items()},
        sha256=digest.hexdigest(),
    )
