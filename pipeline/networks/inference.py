"""ONNX networks in onnxruntime on the host: the float reference, and the teachers."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from metis.graph.sessions import open_session
from preprocessing.apply import student_tensor

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from numpy.typing import NDArray

    from preprocessing.student_input import StudentInput

    Network = Callable[[NDArray[np.float32]], NDArray[np.float32]]


#: Tensors made at a time: 300 MB of RGB at 224x224.
_BLOCK = 512


def reference_network(path: Path) -> Network:
    """A batch-1 ONNX classifier, opened once: (N, C, H, W) in, logits (N, classes) out, float32."""
    session = open_session(path)
    name = session.get_inputs()[0].name

    def logits(tensors: NDArray[np.float32]) -> NDArray[np.float32]:
        return np.concatenate([session.run(None, {name: tensor[None]})[0] for tensor in tensors])

    return logits


def reference_logits(path: Path, tensors: NDArray[np.float32]) -> NDArray[np.float32]:
    """Run a batch-1 ONNX classifier once; see `reference_network`."""
    return reference_network(path)(tensors)


def answers(
    images: NDArray[np.uint8], given: StudentInput, *networks: Network
) -> list[NDArray[np.float32]]:
    """Logits of networks for stored images, whose tensors are never in memory all at once.

    Args:
        images: uint8 (N, H, W, channels), as the device receives them.
        given: the student's input.
        networks: float32 (n, C, H, W) to logits (n, classes).

    Returns:
        Per network: (N, classes).
    """
    parts: list[list[NDArray[np.float32]]] = [[] for _ in networks]
    for start in range(0, len(images), _BLOCK):
        tensors = student_tensor(images[start : start + _BLOCK], given)
        for network, part in zip(networks, parts, strict=True):
            part.append(network(tensors))
    return [np.concatenate(part) for part in parts]
