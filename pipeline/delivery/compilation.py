"""The int8 student lowered for the device, and what the cost model says of it."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import msgspec
import onnx

from metis.backend import CompiledModel, QuantizedModel, open_backend
from metis.estimate.cost_model import Settings
from metis.estimate.estimator import estimate
from metis.voyager.settings import RECORD
from pipeline.facts import EstimateFacts

if TYPE_CHECKING:
    from pathlib import Path

    from pipeline.params.compile import CompileParams
    from pipeline.run.stage import Job


def lower_model(job: Job, params: CompileParams, model: QuantizedModel) -> CompiledModel:
    """Compile through the backend.

    Raises:
        BackendError: the backend, or a tool of the SDK, refuses the model.
    """
    return open_backend(params.backend, params.sdk).compile(
        model,
        job.outputs.compiled_model,
        aipu_cores=params.aipu_cores,
        samples=job.inputs.calibration_set / "samples.npy",
        pipeline=job.outputs.device_pipeline,
    )


def sdk_record(compiled: CompiledModel) -> dict[str, Any] | None:
    """What the SDK said while it compiled; None where it took no part."""
    path = compiled.path / RECORD
    if not path.exists():
        return None
    record: dict[str, Any] = json.loads(path.read_text())
    return record


def estimate_student(student: Path, aipu_cores: int) -> EstimateFacts:
    """What the graph promises on a card; never a measurement."""
    estimated = estimate(onnx.load(student), Settings(aipu_cores))
    return msgspec.convert(estimated.facts(), EstimateFacts)
