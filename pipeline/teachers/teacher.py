"""Teacher networks: open, check, run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.data.prefetch import prefetch
from preprocessing.apply import teacher_tensor
from preprocessing.scores import without_positions

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from numpy.typing import NDArray

    from pipeline.params.sources import TeacherParams
    from preprocessing.contract import Channels


#: Patches per call where a model's batch size is free.
BATCH = 256


@dataclass(frozen=True)
class Teacher:
    """One checked teacher."""

    name: str  # file name without suffix
    files: tuple[Path, ...]  # its file and those with weights outside; none when from a hub
    params: TeacherParams
    channels: Channels  # its bands, as the contract has them
    size_hw: tuple[int, int]
    layout: str
    batch: int | None  # fixed batch size, None when free
    dtype: type[np.floating[Any]]  # of the input
    opset: int | None  # None for a torch teacher
    ending: str  # "logits"; "softmax cut off" when its own output came after a softmax
    infer: Callable[[NDArray[Any]], list[NDArray[Any]]]  # one batch in; logits, then features

    @property
    def modality(self) -> str:
        """Of its bands."""
        return self.params.modality

    @property
    def bands(self) -> tuple[int, ...]:
        """That it sees, in channel order."""
        return self.params.bands

    def prepare(self, patches: NDArray[np.generic]) -> NDArray[np.float32]:
        """Stored patches of its bands, in its order, (N, H, W, C), as the contract wants them.

        Returns:
            float32, (N, C, H', W'), see `teacher_tensor`.
        """
        by_graph = self.params.zscore == "graph"
        channels = self.channels.without_zscore() if by_graph else self.channels
        return teacher_tensor(patches, channels, self.size_hw, interpolation=self.params.resize)

    def outputs(
        self,
        patches: NDArray[np.generic],
        prepare: Callable[[NDArray[np.generic]], NDArray[np.float32]] | None = None,
    ) -> list[NDArray[np.float32]]:
        """What the network says of some patches.

        Args:
            patches: stored values of its bands, in its order, (N, H, W, C).
            prepare: makes tensors of them in another way than the contract's.

        Returns:
            float32: its final output (N, classes, ...), then every tensor of `params.features`.
        """
        step = self.batch or BATCH
        tensors = prefetch(self._batches(patches, step, prepare or self.prepare))
        parts = [
            [part[:count].astype(np.float32) for part in self._run(tensor)]
            for tensor, count in tensors
        ]
        first, *features = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
        return [without_positions(first), *features]

    def _batches(
        self,
        patches: NDArray[np.generic],
        step: int,
        prepare: Callable[[NDArray[np.generic]], NDArray[np.float32]],
    ) -> Iterator[tuple[NDArray[Any], int]]:
        for start in range(0, len(patches), step):
            tensor: NDArray[Any] = prepare(patches[start : start + step])
            count = len(tensor)
            if self.layout == "NHWC":
                tensor = np.ascontiguousarray(tensor.transpose(0, 2, 3, 1))
            if self.batch and count < step:  # a fixed batch needs its size; the rest is thrown away
                tensor = np.concatenate([tensor, np.repeat(tensor[-1:], step - count, axis=0)])
            yield tensor.astype(self.dtype, copy=False), count

    def _run(self, tensor: NDArray[Any]) -> list[NDArray[Any]]:
        return self.infer(tensor)
