"""A torch student as ONNX for the chip."""

from __future__ import annotations

import os
import sys
import warnings
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
import onnx
import onnxsim
import torch
from torch import nn

from metis.operators.legalizer import RewriteError, legalize
from pipeline.facts import ExportFacts
from pipeline.run.errors import StageError, first_line

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from numpy.typing import NDArray

    from metis.operators.legalizer import Legalized
    from preprocessing.scores import Comparison
    from preprocessing.student_input import StudentInput


#: What Metis compilers take; torch's newer exporter starts at 18.
OPSET = 17


def export_student(
    network: nn.Module,
    student_input: StudentInput,
    path: Path,
    tensors: NDArray[np.float32] | None = None,
) -> Legalized:
    """Write a network for the student's input as ONNX. See `export_network`."""
    return export_network(
        network, (len(student_input.bands), *student_input.size_hw), path, tensors
    )


def export_network(
    network: nn.Module,
    shape: tuple[int, int, int],
    path: Path,
    tensors: NDArray[np.float32] | None = None,
) -> Legalized:
    """Write a network as ONNX in the form that the chip takes: opset 17, NCHW, batch 1.

    Its input is `input`, its output `logits`.

    Args:
        network: of torch.
        shape: of its input, (C, H, W).
        path: the file to write.
        tensors: (N, C, H, W), real inputs on which the rewrites for the chip are proven too.

    Returns:
        What was rewritten for the chip, and what of it is refused all the same.

    Raises:
        StageError: torch can't export the network, or the simplified or the rewritten graph is not
            proven equal to the exported one.
    """
    network.eval()
    try:
        with _silent_exporter():
            torch.onnx.export(
                network,
                (torch.zeros(1, *shape),),
                str(path),
                opset_version=OPSET,
                dynamo=False,
                input_names=["input"],
                output_names=["logits"],
            )
    except torch.onnx.OnnxExporterError as error:
        reason = first_line(error)[:200]
        raise StageError(f"torch can't write the network as ONNX: {reason}") from error
    simplified, proven = onnxsim.simplify(onnx.load(path))
    if not proven:
        raise StageError("onnxsim could not prove the simplified student equal to the exported one")
    try:
        legalized = legalize(simplified, [] if tensors is None else list(tensors[:, None]))
    except RewriteError as error:
        raise StageError(f"the student's graph, rewritten for the chip: {error}") from error
    onnx.checker.check_model(legalized.model, full_check=True)
    onnx.save(legalized.model, path)
    return legalized


@contextmanager
def _silent_exporter() -> Iterator[None]:
    """Keep standard output for what kdpipe has to say.

    On an error torch prints its whole graph from C++, past sys.stdout; and it warns that shapes
    become constants, which is what we want.
    """
    sys.stdout.flush()
    stdout, devnull = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    os.dup2(devnull, 1)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", torch.jit.TracerWarning)  # type: ignore[attr-defined]
            yield
    finally:
        os.dup2(stdout, 1)
        os.close(stdout)
        os.close(devnull)


def torch_logits(
    network: nn.Module, tensors: NDArray[np.float32], batch: int = 256
) -> NDArray[np.float32]:
    """Run the torch network in evaluation mode: (N, C, H, W) in, logits (N, classes) out."""
    network.eval()
    with torch.no_grad():
        parts = [
            network(torch.from_numpy(tensors[i : i + batch])).float().cpu().numpy()
            for i in range(0, len(tensors), batch)
        ]
    return np.concatenate(parts)


def export_facts(comparison: Comparison) -> ExportFacts:
    """The torch student, as reference, beside its ONNX file."""
    return ExportFacts(comparison.max_difference, comparison.undisputed_agreement())
