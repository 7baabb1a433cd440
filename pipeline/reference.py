"""The float reference: ONNX networks in onnxruntime on the host."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnxruntime as ort

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray


def open_session(path: Path) -> ort.InferenceSession:
    """Open an ONNX file on the CPU; onnxruntime's own exceptions pass through."""
    options = ort.SessionOptions()
    options.log_severity_level = 3  # errors come as exceptions; warnings are for its developers
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def reference_logits(path: Path, tensors: NDArray[np.float32]) -> NDArray[np.float32]:
    """Run a batch-1 ONNX classifier: (N, C, H, W) in, logits (N, classes) out, float32."""
    session = open_session(path)
    name = session.get_inputs()[0].name
    return np.concatenate([session.run(None, {name: tensor[None]})[0] for tensor in tensors])
