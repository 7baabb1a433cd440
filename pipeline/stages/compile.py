"""Compile the int8 student, and write what a Voyager user needs to run it."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Annotated, Any, Literal

from msgspec import Meta

from metis.backend import (
    CompiledModel,
    QuantizedModel,
    SdkOptions,
    backend_tools,
    open_backend,
    require_backend,
)
from metis.device_constants import constant_error
from metis.pipeline_yaml import DevicePipeline, render_yaml, yaml_obstacle
from metis.sdk_child import PYTHON_VARIABLE
from pipeline.stage import Facts, Gate, Job, Stage, environment_field, unkeyed_field

if TYPE_CHECKING:
    from pathlib import Path

    from preprocessing.contract import Contract, StudentInput


@dataclass(frozen=True)
class CompileParams:
    """How to compile."""

    backend: Literal["emulator", "voyager"] = "emulator"
    aipu_cores: Annotated[int, Meta(ge=1, le=4)] = 1  # also the batch of one call
    sdk_python: str | None = environment_field(PYTHON_VARIABLE)  # the SDK's interpreter
    extra: dict[str, Any] = field(default_factory=dict)  # more fields of the SDK's CompilerConfig
    route: Literal["api", "axcompile", "deploy"] = "api"  # of the SDK, from student to artifacts
    try_schemes: Literal["all"] | None = unkeyed_field(None)  # calibrate tries them
    time_limit: Annotated[float, Meta(gt=0)] = unkeyed_field(14_400.0)  # seconds, for each step
    sdk_release: Literal["1.2", "1.3", "1.4", "1.5", "1.6", "1.7", "1.8"] = "1.8"  # for the YAML
    path_prefix: str = ""  # put before file names in the YAML: where the folder will lie
    max_constant_error: Annotated[float, Meta(gt=0)] = unkeyed_field(0.05)  # standard deviations


def run(job: Job, params: CompileParams) -> Facts:
    """Write the device pipeline; lower the quantized model with the chosen backend."""
    from preprocessing.contract import StudentInput

    model = QuantizedModel.load(job.inputs["quantized_model"])
    given = StudentInput.load(job.inputs["student_input"])
    obstacle = _write_pipeline(job, params, given, model.scheme)
    compiled = _compile(job, params, model)
    record = compiled.path / "sdk.json"
    return {
        "backend": compiled.backend,
        "backend_version": compiled.version,
        "runtime": compiled.runtime,
        "aipu_cores": compiled.aipu_cores,
        "sdk": json.loads(record.read_text()) if record.exists() else None,
        "pipeline_yaml": None if obstacle else f"{job.run}.yaml",
        "pipeline_yaml_obstacle": obstacle,
        "device_constants": None if obstacle else _device_constants(job, given),
        "estimate": _estimate(job.inputs["student"], params.aipu_cores),
    }


def _estimate(student: Path, aipu_cores: int) -> dict[str, Any]:
    """What the graph promises on a card; never a measurement."""
    import onnx

    from metis.cost_model import Settings
    from metis.estimator import estimate

    return estimate(onnx.load(student), Settings(aipu_cores)).facts()


def _compile(job: Job, params: CompileParams, model: QuantizedModel) -> CompiledModel:
    """Through the backend, or by one of the SDK's other ways."""
    options = SdkOptions(extra=params.extra, time_limit_s=params.time_limit)
    into, cores = job.outputs["compiled_model"], params.aipu_cores
    if params.backend == "emulator" or params.route == "api":
        return open_backend(params.backend, options).compile(model, into, aipu_cores=cores)
    from metis import sdk_routes

    if params.route == "axcompile":
        samples = job.inputs["calibration_set"] / "samples.npy"
        return sdk_routes.compile_with_axcompile(options, model, samples, into, aipu_cores=cores)
    pipeline = job.outputs["device_pipeline"]
    return sdk_routes.compile_with_deploy(options, model, pipeline, into, aipu_cores=cores)


def _write_pipeline(job: Job, params: CompileParams, given: StudentInput, scheme: str) -> str:
    """YAML, student and images for the SDK's own scripts; or why there are none."""
    from preprocessing.contract import load_contract

    obstacle = yaml_obstacle(given)
    folder = job.outputs["device_pipeline"]
    folder.mkdir()
    if obstacle:
        job.warn(f"no Voyager pipeline YAML: {obstacle}")
        (folder / "no-pipeline-yaml.txt").write_text(f"{obstacle}\n")
        return obstacle
    contract = load_contract(job.inputs["contract"])
    pipeline = DevicePipeline(
        name=job.run,
        labels=len(contract.labels),
        weight_path="student.onnx",
        dataset=f"{job.run}-images",
        scheme=scheme,
        aipu_cores=params.aipu_cores,
        sdk_release=params.sdk_release,
        path_prefix=params.path_prefix,
    )
    (folder / f"{job.run}.yaml").write_text(render_yaml(given, pipeline))
    shutil.copyfile(job.inputs["baked_student"], folder / pipeline.weight_path)
    _write_images(job, contract, given, folder / pipeline.dataset)
    return ""


def _device_constants(job: Job, given: StudentInput) -> dict[str, Any]:
    """What the device pipe's three decimals do to mean and std, and to top-1."""
    from pipeline.metrics import agreement, top1
    from pipeline.reference import answers, reference_network
    from pipeline.splits import DatasetSplit

    errors = [constant_error(m, s) for m, s in zip(given.mean, given.std, strict=True)]
    channels = [
        {"band": band, **asdict(error)} for band, error in zip(given.bands, errors, strict=True)
    ]
    worst = [error.worst for error in errors if error.worst is not None]
    if len(worst) < len(errors):  # a std vanishes: there is nothing to run
        return {"channels": channels, "worst": None}
    result: dict[str, Any] = {"channels": channels, "worst": max(worst)}
    val = DatasetSplit.load(job.inputs["dataset"] / "val").spread(2000)
    kept = replace(
        given,
        mean=tuple(e.mean_kept for e in errors),
        std=tuple(e.std_kept for e in errors),
    )
    network = reference_network(job.inputs["student"])
    exact, rounded = (answers(val.images, how, network)[0] for how in (given, kept))
    labels = val.labels
    result["top1_exact"], result["top1_kept"] = top1(exact, labels), top1(rounded, labels)
    result["top1_agreement"] = agreement(exact, rounded)
    result["n_val"], result["measured_on"] = len(labels), "host-float"
    return result


def gates(params: CompileParams, facts: Facts) -> list[Gate]:
    """The device pipe's three decimals leave the student's tensor as it is, nearly."""
    constants = facts["device_constants"]
    if constants is None:
        return []
    limit = params.max_constant_error
    channels = constants["channels"]
    vanished = [c for c in channels if c["worst"] is None]
    off = [c for c in channels if c["worst"] is not None and c["worst"] > limit]
    what = [f"the std of band {c['band']} vanishes" for c in vanished]
    for channel in off or ([] if vanished else [max(channels, key=lambda c: c["worst"])]):
        what.append(f"band {channel['band']} is off by up to {channel['worst']:.3g} sigma there")
    return [
        Gate(
            "device_constants",
            not vanished and not off,
            f"the device pipe keeps three decimals of mean / 255 and std / 255: {', '.join(what)} "
            f"(limit {limit:g}); ingest.student.encoding: percentile makes them exact",
        )
    ]


def _write_images(job: Job, contract: Contract, given: StudentInput, folder: Path) -> None:
    """Calibration images in calibration order, validation images in class folders, labels."""
    import numpy as np

    from pipeline.splits import DatasetSplit
    from preprocessing.apply import exported_images
    from preprocessing.images import class_folders, write_in_order, write_png

    samples = json.loads((job.inputs["calibration_set"] / "samples.json").read_text())
    train = DatasetSplit.load(job.inputs["dataset"] / "train")
    chosen = np.searchsorted(train.rows, samples["rows"])
    write_in_order(
        (exported_images(train.images[i : i + 1], given)[0] for i in chosen),
        folder / "calibration",
        len(chosen),
    )
    val = DatasetSplit.load(job.inputs["dataset"] / "val")
    names = class_folders(contract.labels)
    for label, name in enumerate(names):  # the SDK's reader takes positions for class indices
        (folder / "val" / name).mkdir(parents=True)
        if not (val.labels == label).any():
            job.warn(
                f"no validation patch of class {contract.labels[label]!r}: the SDK's image-folder "
                f"reader may refuse its empty folder {name}"
            )
    with job.progress("images val", len(val.labels)) as bar:
        for i, (label, row) in enumerate(zip(val.labels, val.rows, strict=True)):
            image = exported_images(val.images[i : i + 1], given)[0]
            write_png(image, folder / "val" / names[label] / f"row{row}.png")
            bar.update(1)
    shutil.copyfile(job.inputs["labels"], folder / "labels.txt")


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
    run=run,
    gates=gates,
    gate_names=("device_constants",),
    ready=lambda params: require_backend(params.backend),
    tools=lambda params: backend_tools(params.backend),
)
