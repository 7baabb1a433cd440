"""Compile the int8 student, and write what a Voyager user needs to run it."""

from __future__ import annotations

from metis.backend import QuantizedModel, backend_tools, require_backend
from pipeline.facts import CompileFacts
from pipeline.params.compile import CompileParams
from pipeline.run.stage import Gate, Job, Stage


def run(job: Job, params: CompileParams) -> CompileFacts:
    """Write the device pipeline; lower the quantized model with the chosen backend."""
    from pipeline.delivery.compilation import estimate_student, lower_model, sdk_record
    from pipeline.delivery.device_pipeline import make_device_pipeline

    model = QuantizedModel.load(job.inputs.quantized_model)
    obstacle, constants = make_device_pipeline(job, params, model.scheme)
    compiled = lower_model(job, params, model)
    return CompileFacts(
        backend=compiled.backend,
        backend_version=compiled.version,
        runtime=compiled.runtime,
        aipu_cores=compiled.aipu_cores,
        sdk=sdk_record(compiled),
        pipeline_yaml=None if obstacle else f"{job.run}.yaml",
        pipeline_yaml_obstacle=obstacle,
        device_constants=constants,
        estimate=estimate_student(job.inputs.student, params.aipu_cores),
    )


def gates(params: CompileParams, facts: CompileFacts) -> list[Gate]:
    """The device pipe's three decimals leave the student's tensor as it is, nearly."""
    if facts.device_constants is None:
        return []
    limit = params.max_constant_error
    channels = facts.device_constants.channels
    vanished = [c for c in channels if c.worst is None]
    exceeding = [c for c in channels if c.worst is not None and c.worst > limit]
    findings = [f"the std of band {c.band} vanishes" for c in vanished]
    for channel in exceeding or ([] if vanished else [max(channels, key=lambda c: c.worst or 0.0)]):
        findings.append(f"band {channel.band} is off by up to {channel.worst:.3g} sigma there")
    return [
        Gate(
            "device_constants",
            not vanished and not exceeding,
            "the device pipe keeps three decimals of mean / 255 and std / 255: "
            f"{', '.join(findings)} (limit {limit:g}); ingest.student.encoding: percentile makes "
            "them exact",
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
    ready=lambda params: require_backend(params.backend, params.sdk),
    tools=lambda params: backend_tools(params.backend, params.sdk),
)
