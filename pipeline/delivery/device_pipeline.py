"""The device pipeline: the SDK's YAML with the images and constants that belong to it."""

from __future__ import annotations

import json
import shutil
from dataclasses import astuple, replace
from typing import TYPE_CHECKING

import numpy as np

from metis.voyager.device_constants import constant_error
from metis.voyager.pipeline_yaml import DevicePipeline, render_yaml, yaml_obstacle
from pipeline.data.dataset import StudentData
from pipeline.facts import ChannelFacts, ConstantsFacts
from pipeline.networks.inference import reference_network
from preprocessing.apply import exported_images, student_tensor
from preprocessing.images import class_folders, write_in_order, write_png

if TYPE_CHECKING:
    from pathlib import Path

    from pipeline.params.compile import CompileParams
    from pipeline.run.stage import Job


def make_device_pipeline(
    job: Job, params: CompileParams, scheme: str
) -> tuple[str, ConstantsFacts | None]:
    """Write the device pipeline, and measure what its constants do to the student.

    Returns:
        Why there is no YAML, or nothing; the constants where there is one.
    """
    data = StudentData(job.inputs)
    obstacle = write_device_pipeline(job, params, data, scheme)
    return obstacle, None if obstacle else measure_device_constants(job, data)


def write_device_pipeline(job: Job, params: CompileParams, data: StudentData, scheme: str) -> str:
    """YAML, student and images for the SDK's own scripts; or why there are none."""
    obstacle = yaml_obstacle(data.student_input)
    folder = job.outputs.device_pipeline
    folder.mkdir()
    if obstacle:
        job.warn(f"no Voyager pipeline YAML: {obstacle}")
        (folder / "no-pipeline-yaml.txt").write_text(f"{obstacle}\n")
        return obstacle
    pipeline = DevicePipeline(
        name=job.run,
        labels=data.classes,
        weight_path="student.onnx",
        dataset=f"{job.run}-images",
        scheme=scheme,
        aipu_cores=params.aipu_cores,
        sdk_release=params.sdk_release,
        path_prefix=params.path_prefix,
    )
    (folder / f"{job.run}.yaml").write_text(render_yaml(data.student_input, pipeline))
    shutil.copyfile(job.inputs.baked_student, folder / pipeline.weight_path)
    _write_images(job, data, folder / pipeline.dataset)
    return ""


def measure_device_constants(job: Job, data: StudentData) -> ConstantsFacts:
    """What the device pipe's three decimals do to mean and std, and to the score."""
    exact_input = data.student_input
    errors = [constant_error(m, s) for m, s in zip(exact_input.mean, exact_input.std, strict=True)]
    channels = tuple(
        ChannelFacts(band, *astuple(error))
        for band, error in zip(exact_input.bands, errors, strict=True)
    )
    worst = [error.worst for error in errors if error.worst is not None]
    if len(worst) < len(errors):  # a std vanishes: there is nothing to run
        return ConstantsFacts(channels, None)
    val = data.val.spread(2000)
    rounded_input = replace(
        exact_input,
        mean=tuple(e.mean_kept for e in errors),
        std=tuple(e.std_kept for e in errors),
    )
    network = reference_network(job.inputs.student)
    comparison = data.task.comparison(len(val))
    for rows, tensors in data.blocks(val):
        rounded = network(student_tensor(val.images[rows], rounded_input))
        comparison.add(network(tensors), rounded, val.labels[rows])
    return ConstantsFacts(
        channels=channels,
        worst=max(worst),
        score_exact=comparison.reference.score().value,
        score_kept=comparison.network.score().value,
        agreement=comparison.agreement(),
        n_val=comparison.n,
        measured_on="host-float",
    )


def _write_images(job: Job, data: StudentData, folder: Path) -> None:
    """Calibration images in calibration order, validation images in class folders, labels."""
    samples = json.loads((job.inputs.calibration_set / "samples.json").read_text())
    student_input, train, val = data.student_input, data.train, data.val
    indices = np.searchsorted(train.rows, samples["rows"])
    write_in_order(
        (exported_images(train.images[i : i + 1], student_input)[0] for i in indices),
        folder / "calibration",
        len(indices),
    )
    names = class_folders(data.labels)
    for label, name in enumerate(names):  # the SDK's reader takes positions for class indices
        (folder / "val" / name).mkdir(parents=True)
        if not (val.labels == label).any():
            job.warn(
                f"no validation patch of class {data.labels[label]!r}: the SDK's image-folder "
                f"reader may refuse its empty folder {name}"
            )
    with job.progress("images val", len(val.labels)) as bar:
        for i, (label, row) in enumerate(zip(val.labels, val.rows, strict=True)):
            image = exported_images(val.images[i : i + 1], student_input)[0]
            write_png(image, folder / "val" / names[label] / f"row{row}.png")
            bar.update(1)
    shutil.copyfile(job.inputs.labels, folder / "labels.txt")
