"""ONNX networks in onnxruntime on the host: the float reference, and the teachers."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from metis.graph.sessions import open_session
from preprocessing.scores import without_positions

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from numpy.typing import NDArray

    Network = Callable[[NDArray[np.float32]], NDArray[np.float32]]


def reference_network(path: Path) -> Network:
    """A batch-1 ONNX network, opened once: (N, C, H, W) to logits (N, classes, ...), float32."""
    session = open_session(path)
    name = session.get_inputs()[0].name

    def logits(tensors: NDArray[np.float32]) -> NDArray[np.float32]:
        outputs = [session.run(None, {name: tensor[None]})[0] for tensor in tensors]
        return without_positions(np.concatenate(outputs))

    return logits


def reference_logits(path: Path, tensors: NDArray[np.float32]) -> NDArray[np.float32]:
    """Run a batch-1 ONNX network once; see `reference_network`."""
    return reference_network(path)(tensors)
