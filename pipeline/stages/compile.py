"""Compile the int8 student, and write what a Voyager user needs to run it."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

from msgspec import Meta

from metis.backend import QuantizedModel, backend_tools, open_backend, require_backend
from metis.pipeline_yaml import DevicePipeline, render_yaml, yaml_obstacle
from pipeline.stage import Facts, Job, Stage

if TYPE_CHECKING:
    from pathlib import Path

    from preprocessing.contract import Contract, StudentInput


@dataclass(frozen=True)
class CompileParams:
    """How to compile."""

    backend: Literal["emulator", "voyager"] = "emulator"
    aipu_cores: Annotated[int, Meta(ge=1, le=4)] = 1  # also the batch of one call


def run(job: Job, params: CompileParams) -> Facts:
    """Lower the quantized model with the chosen backend; write the device pipeline beside it."""
    from preprocessing.contract import StudentInput, load_contract

    model = QuantizedModel.load(job.inputs["quantized_model"])
    compiled = open_backend(params.backend).compile(
        model, job.outputs["compiled_model"], aipu_cores=params.aipu_cores
    )
    given = StudentInput.load(job.inputs["student_input"])
    obstacle = yaml_obstacle(given)
    folder = job.outputs["device_pipeline"]
    folder.mkdir()
    if obstacle:
        job.warn(f"no Voyager pipeline YAML: {obstacle}")
    else:
        contract = load_contract(job.inputs["contract"])
        pipeline = DevicePipeline(
            name=job.run,
            labels=len(contract.labels),
            weight_path="student.onnx",
            dataset=f"{job.run}-images",
            scheme=model.scheme,
            aipu_cores=params.aipu_cores,
        )
        (folder / f"{job.run}.yaml").write_text(render_yaml(given, pipeline))
        shutil.copyfile(job.inputs["student"], folder / pipeline.weight_path)
        _write_images(job, contract, given, folder / pipeline.dataset)
    return {
        "backend": compiled.backend,
        "backend_version": compiled.version,
        "runtime": compiled.runtime,
        "aipu_cores": compiled.aipu_cores,
        "pipeline_yaml": None if obstacle else f"{job.run}.yaml",
        "pipeline_yaml_obstacle": obstacle,
    }


def _write_images(job: Job, contract: Contract, given: StudentInput, folder: Path) -> None:
    """Calibration images in calibration order, validation images in class folders, labels."""
    import json

    import numpy as np

    from pipeline.datasets import DatasetSplit
    from preprocessing.apply import device_image
    from preprocessing.images import class_folders, write_in_order, write_png

    def exported(
        images: np.ndarray[tuple[int, ...], np.dtype[np.uint8]],
    ) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
        # Where the device resizes, images keep their size; else they get the network's here.
        return images if given.device_resize else device_image(images, given)

    samples = json.loads((job.inputs["calibration_set"] / "samples.json").read_text())
    train = DatasetSplit.load(job.inputs["dataset"], "train")
    chosen = np.searchsorted(train.rows, samples["rows"])
    write_in_order(
        (exported(train.images[i : i + 1])[0] for i in chosen), folder / "calibration", len(chosen)
    )
    val = DatasetSplit.load(job.inputs["dataset"], "val")
    names = class_folders(contract.labels)
    for name in names:  # also for a class without a patch: the reader counts folders
        (folder / "val" / name).mkdir(parents=True)
    with job.progress("images val", len(val.labels)) as bar:
        for i, (label, row) in enumerate(zip(val.labels, val.rows, strict=True)):
            image = exported(val.images[i : i + 1])[0]
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
        "calibration_set",
        "quantized_model",
    ),
    outputs={"compiled_model": "compiled_model", "device_pipeline": "device_pipeline"},
    params=CompileParams,
    run=run,
    ready=lambda params: require_backend(params.backend),
    tools=lambda params: backend_tools(params.backend),
)
