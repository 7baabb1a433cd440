"""Check teachers, contract and data against each other; store what the later stages need."""

from __future__ import annotations

import glob
import json
import shutil
from dataclasses import replace
from typing import TYPE_CHECKING

import msgspec

from pipeline.facts import IngestFacts, SplitFacts, ViewFacts
from pipeline.params.formats import FORMATS
from pipeline.params.ingest import IngestParams
from pipeline.run.errors import InputError, require_extra
from pipeline.run.stage import Job, Stage
from preprocessing.contract import load_contract

if TYPE_CHECKING:
    from pathlib import Path

    from pipeline.data.splits import Split
    from pipeline.data.survey import Survey
    from pipeline.params.sources import SplitParams
    from pipeline.teachers.teacher import Teacher
    from preprocessing.contract import Contract


#: Endings of files that hold weights and no graph.
WEIGHTS = (".pt", ".pth", ".ckpt", ".safetensors")


def sources(params: IngestParams, root: Path) -> dict[str, Path]:
    """The contract, the labels, every data file or folder, every teacher that a pattern matches."""
    found = {"contract": root / params.contract}
    if params.labels is not None:
        found["labels"] = root / params.labels
    for name, split in params.data.splits.items():
        for key in ("path", "labels", "indices"):
            value = getattr(split, key)
            if value is not None:
                found[f"data.{name}" if key == "path" else f"data.{name}.{key}"] = root / value
    for i, teacher in enumerate(params.teachers):
        if teacher.path is None:
            continue
        if not glob.has_magic(teacher.path):
            found[f"teachers[{i}]"] = root / teacher.path
            continue
        folder, _, pattern = teacher.path.rpartition("/")
        for j, match in enumerate(sorted((root / folder).glob(pattern))):
            found[f"teachers[{i}].{j}"] = match
    return found


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
    where = f"ingest.data.{name}"
    if split.fraction is not None and (split.path or split.rows or split.indices):
        raise InputError(f"{where}: fraction takes from train; it goes without path and rows")
    if split.fraction is not None and name == "train":
        raise InputError(f"{where}: give the training split a path; others may be fractions")
    if split.fraction is None and split.path is None:
        raise InputError(f"{where}.path is missing: name the file of the {name} split")
    if split.rows and split.indices:
        raise InputError(f"{where}: rows and indices both say which rows; keep one")
    needs_labels = format == "npy" and name != "unlabeled"
    if needs_labels and split.path and split.labels is None:
        raise InputError(f"{where}.labels: format npy keeps labels in a file of their own; name it")
    if not needs_labels and split.labels is not None:
        why = "nobody looks at them" if name == "unlabeled" else f"format {format} has them inside"
        raise InputError(f"{where}.labels: {why}; leave this out")


def run(job: Job, params: IngestParams) -> IngestFacts:
    """Check everything, then write images, labels and the ensemble's answers."""
    from pipeline.data.checks import (
        band_table,
        check_labels_file,
        drop_bad_patches,
        judge_statistics,
        report_leaks,
    )
    from pipeline.data.dataset import class_histogram
    from pipeline.data.encoding import choose_student_input, write_split  # numpy, h5py
    from pipeline.data.survey import rows_elsewhere  # numpy
    from pipeline.teachers.ask import teach  # onnxruntime

    contract = load_contract(job.sources["contract"])
    check_labels_file(job, contract)
    splits, teachers, threads = _opened(job, params, contract)
    surveys = _survey(job, params, contract, splits)
    splits = drop_bad_patches(job, params, contract, splits, surveys)
    leaks = report_leaks(job, params, surveys)
    statistics = surveys["train"].statistics
    judge_statistics(job, params, contract, statistics, splits["train"])

    student, quality = choose_student_input(
        job, params.student, contract, statistics, splits["train"]
    )
    ensemble = teach(job, params, contract, teachers, threads, splits)
    unfit = {"elsewhere": rows_elsewhere(surveys).tolist()}
    for name, split in splits.items():
        folder = job.outputs.test_set if name == "test" else job.outputs.dataset / name
        outside = write_split(job, contract, student, split, folder)
        if name == "train":
            unfit["outside"] = outside
    job.outputs.unfit.write_text(json.dumps(unfit) + "\n")
    shutil.copyfile(job.sources["contract"], job.outputs.contract)
    job.outputs.labels.write_text("".join(f"{label}\n" for label in contract.labels))
    job.outputs.student_input.write_text(student.to_json())
    synthetic = sorted({s.source.synthetic for s in splits.values() if s.source.synthetic})
    described = {
        name: SplitFacts(
            patches=len(split),
            classes=tuple(class_histogram(split.labels, len(contract.labels))),
            bad_patches_dropped=len(surveys[name].bad),
        )
        for name, split in splits.items()
    }
    # Without a word of the test split: nothing that is made may depend on it.
    known = {n: msgspec.to_builtins(split) for n, split in described.items() if n != "test"}
    summary = {"contract": contract.sha256, "synthetic": synthetic, "splits": known}
    (job.outputs.dataset / "dataset.json").write_text(json.dumps(summary, indent=1) + "\n")
    return IngestFacts(
        synthetic=tuple(synthetic),
        splits=described,
        leaks=leaks,
        bands=band_table(contract, statistics, splits["train"]),
        student_input=student,
        encoding=quality,
        teachers=ensemble,
        views=msgspec.convert(params.views, ViewFacts, from_attributes=True),
    )


def label_shard(
    job: Job, params: IngestParams, shard: tuple[int, int] | None
) -> list[tuple[str, int, int]]:
    """Ask the teachers about a part of the blocks, and keep their answers for `run`.

    Args:
        job: outside a run.
        params: the section `ingest`.
        shard: (i, n): every n-th block, from the i-th on; None: only look.

    Returns:
        Per split: its name, how many blocks are still missing, of how many.
    """
    from pipeline.data.checks import drop_bad_patches
    from pipeline.teachers.ask import labelling, needed_views

    contract = load_contract(job.sources["contract"])
    splits, teachers, _ = _opened(job, params, contract)
    splits = drop_bad_patches(job, params, contract, splits, _survey(job, params, contract, splits))
    asked = labelling(job, params, contract, teachers)
    found = []
    for name, views in needed_views(params, splits).items():
        digest = params.data.reading(job.digest(splits[name].source.path))
        if shard is not None:
            with job.progress(f"teachers, {name}", len(splits[name]) // shard[1]) as bar:
                asked.label(splits[name], digest, views, shard=shard, done=bar.update)
        found.append((name, *asked.missing(splits[name], digest, views)))
    return found


def _opened(
    job: Job, params: IngestParams, contract: Contract
) -> tuple[dict[str, Split], list[Teacher], str]:
    """Splits, teachers, and in words how onnxruntime runs them."""
    from pipeline.data.checks import check_band_counts, check_sizes
    from pipeline.data.splits import open_splits  # numpy, h5py

    splits = open_splits(params.data, job.sources, contract.labels, job.seed)
    check_sizes(params, splits["train"])
    check_band_counts(params, splits)
    teachers, threads = _open_teachers(job, params, contract, splits["train"])
    return _cached(job, params, splits), teachers, threads


def _open_teachers(
    job: Job, params: IngestParams, contract: Contract, train: Split
) -> tuple[list[Teacher], str]:
    """The teachers, and in words how onnxruntime shares the processor among its threads."""
    from pipeline.teachers.open import open_teachers  # onnxruntime

    names, wanted = [], []
    for i, given in enumerate(params.teachers):
        key = f"teachers[{i}]"
        files: dict[str, Path | None] = {
            n: p for n, p in job.sources.items() if n == key or n.startswith(f"{key}.")
        }
        if given.path is None:
            files = {key: None}
        if not files:
            raise InputError(f"ingest.{key}.path: no file matches {given.path!r}")
        names += list(files)
        bands_in_data = train.source.shape(given.modality)[2]
        channels = contract.bind(given.modality, given.bands, bands_in_data)
        wanted += [(path, given, channels) for path in files.values()]
    teachers, threads = open_teachers(wanted, contract)
    for name, teacher in zip(names, teachers, strict=True):
        for file in teacher.files[1:]:
            job.also_read(name, file)
    called = [teacher.name for teacher in teachers]
    for name in called:
        if called.count(name) > 1:
            raise InputError(f"two teachers are called {name}; rename one file")
    return teachers, str(threads or "torch's own threads")


def _cached(job: Job, params: IngestParams, splits: dict[str, Split]) -> dict[str, Split]:
    """With `data.cache`, the same splits over memory-mapped copies of the bands that are needed."""
    if not params.data.cache:
        return splits
    from pipeline.data.checks import seen_bands
    from pipeline.data.source import cached
    from pipeline.data.survey import BLOCK

    copies = {}
    for split in splits.values():
        path = split.source.path
        if path not in copies:
            bands = seen_bands(params)
            digest = params.data.reading(job.digest(path))
            copies[path] = cached(split.source, bands, digest, job.cache, BLOCK)
    return {
        name: replace(split, source=copies[split.source.path]) for name, split in splits.items()
    }


def _survey(
    job: Job, params: IngestParams, contract: Contract, splits: dict[str, Split]
) -> dict[str, Survey]:
    from pipeline.data.checks import seen_bands
    from pipeline.data.survey import survey

    bands = seen_bands(params)
    for modality, some in bands.items():
        for split in splits.values():
            contract.bind(modality, some, split.source.shape(modality)[2])
    surveys = {}
    for name, split in splits.items():
        with job.progress(f"survey {name}", len(split)) as bar:
            surveys[name] = survey(split, bands, contract, bar.update)
    return surveys


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
