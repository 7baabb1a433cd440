"""Check teachers, contract and data against each other; store what the later stages need."""

from __future__ import annotations

import glob
from typing import TYPE_CHECKING

from pipeline.facts import IngestFacts
from pipeline.params.formats import FORMATS
from pipeline.params.ingest import IngestParams
from pipeline.run.errors import InputError, require_extra
from pipeline.run.stage import Job, Stage

if TYPE_CHECKING:
    from pathlib import Path

    from pipeline.params.sources import SplitParams


#: Endings of files that hold weights and no graph.
WEIGHTS = (".pt", ".pth", ".ckpt", ".safetensors")


def sources(params: IngestParams, root: Path) -> dict[str, Path]:
    """The contract, the labels, every data file or folder, every teacher that a pattern matches."""
    paths = {"contract": root / params.contract}
    if params.labels is not None:
        paths["labels"] = root / params.labels
    for name, split in params.data.splits.items():
        for key in ("path", "labels", "indices"):
            value = getattr(split, key)
            if value is not None:
                paths[f"data.{name}" if key == "path" else f"data.{name}.{key}"] = root / value
    for i, teacher in enumerate(params.teachers):
        if teacher.path is None:
            continue
        if not glob.has_magic(teacher.path):
            paths[f"teachers[{i}]"] = root / teacher.path
            continue
        folder, _, pattern = teacher.path.rpartition("/")
        for j, match in enumerate(sorted((root / folder).glob(pattern))):
            paths[f"teachers[{i}].{j}"] = match
    return paths


def ready(params: IngestParams) -> None:
    """Each split is described one way, each teacher has its weights, their readers are here."""
    require_extra("data", *FORMATS[params.data.format].packages)
    for name, split in params.data.splits.items():
        _ready_split(params.data.format, name, split)
    for i, teacher in enumerate(params.teachers):
        if teacher.path is None and teacher.timm is None:
            raise InputError(f"ingest.teachers[{i}].path is missing: name the teacher's ONNX file")
        if teacher.timm is not None:
            require_extra("train", "torch", "timm")
        elif teacher.path and teacher.path.endswith(WEIGHTS):
            raise InputError(
                f"ingest.teachers[{i}]: {teacher.path} holds weights without their network; name "
                "it with timm: NAME, or export the teacher to ONNX"
            )
    student = params.student
    if student.device_resize == "device" and student.interpolation == "nearest":
        raise InputError(
            "ingest.student: the device resizes bilinear whatever its pipeline says; with nearest "
            "use device_resize none (images are exported at the network's size)"
        )


def _ready_split(format: str, name: str, split: SplitParams) -> None:
    key = f"ingest.data.{name}"
    if split.fraction is not None and (split.path or split.rows or split.indices):
        raise InputError(f"{key}: fraction takes from train; it goes without path and rows")
    if split.fraction is not None and name == "train":
        raise InputError(f"{key}: give the training split a path; others may be fractions")
    if split.fraction is None and split.path is None:
        raise InputError(f"{key}.path is missing: name the file of the {name} split")
    if split.rows and split.indices:
        raise InputError(f"{key}: rows and indices both say which rows; keep one")
    needs_labels = FORMATS[format].labels_apart and name != "unlabeled"
    if needs_labels and split.path and split.labels is None:
        raise InputError(
            f"{key}.labels: format {format} keeps labels in a file of their own; name it"
        )
    if not needs_labels and split.labels is not None:
        reason = (
            "nobody looks at them" if name == "unlabeled" else f"format {format} has them inside"
        )
        raise InputError(f"{key}.labels: {reason}; leave this out")


def run(job: Job, params: IngestParams) -> IngestFacts:
    """Check everything, then write images, labels and the teachers' logits."""
    from pipeline.teachers.ingest import ingest  # numpy, h5py, onnxruntime

    return ingest(job, params)


STAGE = Stage(
    inputs=(),
    outputs={
        "contract": "preprocessing.json",
        "labels": "labels.txt",
        "student_input": "student_input.json",
        "dataset": "dataset",
        "test_set": "test_set",
        "teaching": "teaching",
        "unfit": "unfit_for_calibration.json",
    },
    params=IngestParams,
    facts=IngestFacts,
    run=run,
    sources=sources,
    ready=ready,
    tools=lambda params: ("onnxruntime",),
    code_version=3,
)
