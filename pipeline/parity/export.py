"""The leg of parity from torch to ONNX, computed anew; needs the extra `train`."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from pipeline.networks.export import export_facts, torch_logits
from pipeline.networks.inference import reference_network
from pipeline.training.job import load_trained_student

if TYPE_CHECKING:
    from pathlib import Path

    from pipeline.data.dataset import StudentData
    from pipeline.facts import ExportFacts
    from pipeline.params.distill import DistillParams


def measure_export(
    params: DistillParams, weights: Path, data: StudentData, onnx: Path
) -> ExportFacts:
    """Torch student against ONNX student on the validation split.

    Args:
        params: see `load_trained_student`.
        weights: see there.
        data: of the run.
        onnx: the exported student.
    """
    network = load_trained_student(params, weights, data)
    comparison = data.compare(data.val, partial(torch_logits, network), reference_network(onnx))
    return export_facts(comparison)
