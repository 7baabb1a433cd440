"""The int8 student lowered for the device, and what the cost model says of it."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import msgspec
import onnx

from metis.backend import CompiledModel, QuantizedModel, open_backend
from metis.estimate.cost_model import Settings
from metis.estimate.estimator import estimate
from metis.voyager.backend import RECORD
from metis.voyager.routes import compile_with_axcompile, compile_with_deploy
from pipeline.facts import EstimateFacts

if TYPE_CHECKING:
    from pathlib import Path

    from pipeline.params.compile import CompileParams
    from pipeline.run.stage import Job


def lower_model(job: Job, params: CompileParams, model: QuantizedModel) -> CompiledModel:
    """Compile through the backend, or by one of the SDK's other ways.

    Raises:
        BackendError: the backend, or a tool of the SDK, refuses the model.
    """
    options = params.sdk
    target, cores = job.outputs.compiled_model, params.aipu_cores
    if params.backend == "emulator" or params.route == "api":
        return open_backend(params.backend, options).compile(model, target, aipu_cores=cores)
    if params.route == "axcompile":
        samples = job.inputs.calibration_set / "samples.npy"
        return compile_with_axcompile(options, model, samples, target, aipu_cores=cores)
    pipeline = job.outputs.device_pipeline
    return compile_with_deploy(options, model, pipeline, target, aipu_cores=cores)


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
