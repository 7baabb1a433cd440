"""Compile the int8 student, and write what a Voyager user needs to run it."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import msgspec

from metis.backend import (
    CompiledModel,
    QuantizedModel,
    SdkOptions,
    backend_tools,
    open_backend,
    require_backend,
)
from pipeline.facts import CompileFacts, EstimateFacts
from pipeline.params.compile import CompileParams
from pipeline.run.stage import Gate, Job, Stage

if TYPE_CHECKING:
    from pathlib import Path


def run(job: Job, params: CompileParams) -> CompileFacts:
    """Write the device pipeline; lower the quantized model with the chosen backend."""
    from pipeline.data.dataset import StudentData
    from pipeline.delivery.device_pipeline import measure_device_constants, write_device_pipeline

    model = QuantizedModel.load(job.inputs.quantized_model)
    data = StudentData(job.inputs)
    obstacle = write_device_pipeline(job, params, data, model.scheme)
    compiled = _compile(job, params, model)
    record = compiled.path / "sdk.json"
    return CompileFacts(
        backend=compiled.backend,
        backend_version=compiled.version,
        runtime=compiled.runtime,
        aipu_cores=compiled.aipu_cores,
        sdk=json.loads(record.read_text()) if record.exists() else None,
        pipeline_yaml=None if obstacle else f"{job.run}.yaml",
        pipeline_yaml_obstacle=obstacle,
        device_constants=None if obstacle else measure_device_constants(job, data),
        estimate=_estimate(job.inputs.student, params.aipu_cores),
    )


def _estimate(student: Path, aipu_cores: int) -> EstimateFacts:
    """What the graph promises on a card; never a measurement."""
    import onnx

    from metis.estimate.cost_model import Settings
    from metis.estimate.estimator import estimate

    found = estimate(onnx.load(student), Settings(aipu_cores))
    return msgspec.convert(found.facts(), EstimateFacts)


def _compile(job: Job, params: CompileParams, model: QuantizedModel) -> CompiledModel:
    """Through the backend, or by one of the SDK's other ways."""
    options = SdkOptions(extra=params.extra, time_limit_s=params.time_limit)
    into, cores = job.outputs.compiled_model, params.aipu_cores
    if params.backend == "emulator" or params.route == "api":
        return open_backend(params.backend, options).compile(model, into, aipu_cores=cores)
    from metis.voyager.routes import compile_with_axcompile, compile_with_deploy

    if params.route == "axcompile":
        samples = job.inputs.calibration_set / "samples.npy"
        return compile_with_axcompile(options, model, samples, into, aipu_cores=cores)
    pipeline = job.outputs.device_pipeline
    return compile_with_deploy(options, model, pipeline, into, aipu_cores=cores)


def gates(params: CompileParams, facts: CompileFacts) -> list[Gate]:
    """The device pipe's three decimals leave the student's tensor as it is, nearly."""
    if facts.device_constants is None:
        return []
    limit = params.max_constant_error
    channels = facts.device_constants.channels
    vanished = [c for c in channels if c.worst is None]
    off = [c for c in channels if c.worst is not None and c.worst > limit]
    what = [f"the std of band {c.band} vanishes" for c in vanished]
    for channel in off or ([] if vanished else [max(channels, key=lambda c: c.worst or 0.0)]):
        what.append(f"band {channel.band} is off by up to {channel.worst:.3g} sigma there")
    return [
        Gate(
            "device_constants",
            not vanished and not off,
            f"the device pipe keeps three decimals of mean / 255 and std / 255: {', '.join(what)} "
            f"(limit {limit:g}); ingest.student.encoding: percentile makes them exact",
        )
    ]


STAGE = Stage(
    inputs=(
        "contract",
        "labels",
        "student_input",
        "dataset",
        "student",
        "baked_student",
        "calibration_set",
        "quantized_model",
    ),
    outputs={"compiled_model": "compiled_model", "device_pipeline": "device_pipeline"},
    params=CompileParams,
    facts=CompileFacts,
    run=run,
    gates=gates,
    gate_names=("device_constants",),
    ready=lambda params: require_backend(params.backend),
    tools=lambda params: backend_tools(params.backend),
)
