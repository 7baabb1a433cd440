"""The work of ingest: one pass over the user's data, for survey, images and teachers together."""

from __future__ import annotations

import json
import shutil
import time
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import msgspec

from pipeline.data.blocks import BLOCK, bands_by_modality
from pipeline.data.checks import (
    band_table,
    check_band_counts,
    check_labels_file,
    check_sizes,
    drop_bad_patches,
    judge_statistics,
    report_leaks,
)
from pipeline.data.encoding import fit_ranges, judge_encoding, make_student_input
from pipeline.data.image_writer import ImageWriter
from pipeline.data.source import copy_bands
from pipeline.data.splits import open_splits
from pipeline.data.survey import rows_elsewhere, survey
from pipeline.facts import IngestFacts, SplitFacts, ViewFacts
from pipeline.run.errors import InputError
from pipeline.tasks.task import DEFAULT_TASK, open_task
from pipeline.teachers.ask import needed_views, teach
from pipeline.teachers.logit_cache import LogitCache, teacher_digest
from pipeline.teachers.open import open_teachers
from pipeline.teachers.soft_targets import LivePatchWriter
from preprocessing.contract import load_contract

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from pipeline.data.blocks import Block
    from pipeline.data.splits import Split
    from pipeline.data.survey import Survey
    from pipeline.params.ingest import IngestParams
    from pipeline.run.stage import Job
    from pipeline.tasks.task import Task
    from pipeline.teachers.teacher import Teacher
    from preprocessing.contract import Channels, Contract
    from preprocessing.student_input import StudentInput


#: Seconds that teachers work at most before data and contract have been judged: who is refused
#: has not waited longer for answers that nobody needs.
PATIENCE_S = 60.0


@dataclass(frozen=True)
class Inputs:
    """What ingest takes in, opened and bound to each other."""

    task: Task
    contract: Contract
    splits: dict[str, Split]
    channels: dict[str, Channels]  # by modality: the bands that somebody sees
    student_channels: Channels
    digests: dict[str, str]  # by split: of what is read from its file
    cache: LogitCache
    threads: str  # how onnxruntime runs the teachers

    @property
    def train_hw(self) -> tuple[int, int]:
        """Size of the student's patches."""
        height, width, _ = self.splits["train"].source.shape(self.student_channels.modality)
        return height, width


def ingest(job: Job, params: IngestParams) -> IngestFacts:
    """Check everything; write images, labels and what the teachers say.

    Raises:
        InputError: data, contract, labels or teachers do not fit each other.
        ContractError: the contract says nothing of a band.
    """
    inputs = _open_inputs(job, params)
    student: StudentInput | None = None
    if params.student.encoding == "contract":
        ends = [inputs.student_channels.scaling.dst_range] * len(params.student.bands)
        student = _make_student_input(params, inputs, ends)
    with ExitStack() as files:
        images = {
            name: files.enter_context(closing(_image_writer(job, inputs, name, student)))
            for name in inputs.splits
        }
        live = _live_writers(job, params, inputs, files)
        asker = Asker(params, inputs)

        def follow(name: str, block: Block) -> None:
            images[name].add(block)
            if name in live:
                live[name].add(block)
            asker.ask(name, block)

        surveys = _survey(job, inputs, follow)
        splits = drop_bad_patches(job, params, inputs.splits, surveys, len(inputs.contract.labels))
        leaks = report_leaks(job, params, surveys)
        statistics = surveys["train"].statistics
        bands = band_table(inputs.channels, statistics)
        judge_statistics(job, params, bands)
        of_student = statistics[inputs.student_channels.modality]
        if student is None:
            ranges = fit_ranges(params.student, inputs.student_channels, of_student)
            student = _make_student_input(params, inputs, ranges)
        quality = judge_encoding(job, student, inputs.student_channels, of_student)
        for name, writer in live.items():
            writer.finish(splits[name])
        ensemble = teach(job, params, inputs.cache, splits, inputs.digests, inputs.threads)
        outside = {name: writer.finish(splits[name], student) for name, writer in images.items()}
    unfit = {"elsewhere": rows_elsewhere(surveys).tolist(), "outside": outside["train"]}
    job.outputs.unfit.write_text(json.dumps(unfit) + "\n")
    split_facts = _describe_splits(inputs, splits, surveys)
    synthetic = sorted({s.source.synthetic for s in splits.values() if s.source.synthetic})
    _write_documents(job, inputs, student, split_facts, synthetic)
    return IngestFacts(
        synthetic=tuple(synthetic),
        splits=split_facts,
        leaks=leaks,
        bands=bands,
        student_input=student,
        encoding=quality,
        teachers=ensemble,
        views=msgspec.convert(params.views, ViewFacts, from_attributes=True),
    )


def label_shard(
    job: Job, params: IngestParams, shard: tuple[int, int] | None
) -> list[tuple[str, int, int]]:
    """Ask the teachers about a part of the blocks, and keep their outputs for `ingest`.

    Args:
        job: outside a run.
        params: the section `ingest`.
        shard: (i, n): every n-th block, from the i-th on; None: only look.

    Returns:
        Per split: its name, how many blocks are still missing, of how many.
    """
    inputs = _open_inputs(job, params)
    surveys = _survey(job, inputs, lambda name, block: None)
    splits = drop_bad_patches(job, params, inputs.splits, surveys, len(inputs.contract.labels))
    missing = []
    for name, views in needed_views(params, splits).items():
        split, digest = splits[name], inputs.digests[name]
        if shard is not None:
            with job.progress(f"teachers, {name}", len(split) // shard[1]) as bar:
                inputs.cache.fill(split, digest, views, shard=shard, progress=bar.update)
        missing.append((name, *inputs.cache.count_missing(split, digest, views)))
    return missing


class Asker:
    """Asks the teachers about blocks while they are in memory, for as long as that is cheap.

    Before every patch was seen the data may yet be refused, so teachers that take long are asked
    afterwards, by `LogitCache.fill`, which reads what is missing once more.
    """

    def __init__(self, params: IngestParams, inputs: Inputs) -> None:
        self._inputs = inputs
        self._views = needed_views(params, inputs.splits)
        self._seconds_left = PATIENCE_S

    def ask(self, split: str, block: Block) -> None:
        """Ask about a block of a split, unless nobody needs that or the time is up."""
        if split not in self._views or self._seconds_left <= 0:
            return
        begin = time.monotonic()
        self._inputs.cache.ask(block, self._inputs.digests[split], self._views[split])
        self._seconds_left -= time.monotonic() - begin


def _open_inputs(job: Job, params: IngestParams) -> Inputs:
    contract, task = load_contract(job.sources["contract"]), open_task(params.task)
    check_labels_file(job, contract)
    splits = open_splits(params.data, job.sources, contract.labels, job.seed, task)
    train = splits["train"].source
    check_sizes(params, splits["train"])
    check_band_counts(params, splits)

    def bind(modality: str, bands: tuple[int, ...]) -> Channels:
        return contract.bind(modality, bands, train.shape(modality)[2])

    teachers, threads = _open_teachers(job, params, contract, task, bind)
    bands = bands_by_modality(params.viewers)
    channels = {modality: bind(modality, numbers) for modality, numbers in bands.items()}
    digests = {n: params.data.reading(job.digest(s.source.path)) for n, s in splits.items()}
    if params.data.cache:
        splits = _copy_sources(job, splits, bands, digests)
    return Inputs(
        task=task,
        contract=contract,
        splits=splits,
        channels=channels,
        student_channels=bind(params.student.modality, params.student.bands),
        digests=digests,
        cache=_open_cache(job, params, contract, teachers),
        threads=threads,
    )


def _open_teachers(
    job: Job,
    params: IngestParams,
    contract: Contract,
    task: Task,
    bind: Callable[[str, tuple[int, ...]], Channels],
) -> tuple[list[Teacher], str]:
    """The teachers, and in words how onnxruntime shares the processor among its threads."""
    sources, entries = [], []
    for i, teacher_params in enumerate(params.teachers):
        key = f"teachers[{i}]"
        files: dict[str, Path | None] = {
            n: p for n, p in job.sources.items() if n == key or n.startswith(f"{key}.")
        }
        if teacher_params.path is None:
            files = {key: None}
        if not files:
            raise InputError(f"ingest.{key}.path: no file matches {teacher_params.path!r}")
        sources += list(files)
        channels = bind(teacher_params.modality, teacher_params.bands)
        entries += [(path, teacher_params, channels) for path in files.values()]
    teachers, threads = open_teachers(entries, contract, task)
    for source, teacher in zip(sources, teachers, strict=True):
        for file in teacher.files[1:]:
            job.also_read(source, file)
    names = [teacher.name for teacher in teachers]
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"two teachers are called {name}; rename one file")
    return teachers, str(threads or "torch's own threads")


def _open_cache(
    job: Job, params: IngestParams, contract: Contract, teachers: list[Teacher]
) -> LogitCache:
    """What the teachers said in earlier runs; the runs of a project share it."""
    digests = [
        teacher_digest(t, contract.sha256, [job.digest(f) for f in t.files]) for t in teachers
    ]
    return LogitCache(teachers, digests, params.views, job.seed, job.cache / "labels")


def _copy_sources(
    job: Job,
    splits: dict[str, Split],
    bands: Mapping[str, tuple[int, ...]],
    digests: Mapping[str, str],
) -> dict[str, Split]:
    """The same splits over memory-mapped copies of the bands that are needed."""
    copies = {
        split.source.path: copy_bands(split.source, bands, digests[name], job.cache, BLOCK)
        for name, split in splits.items()
    }
    return {
        name: replace(split, source=copies[split.source.path]) for name, split in splits.items()
    }


def _survey(job: Job, inputs: Inputs, follow: Callable[[str, Block], None]) -> dict[str, Survey]:
    """Read every split once; `follow` is called with the name of the split and each block."""
    surveys = {}
    for name, split in inputs.splits.items():
        with job.progress(f"survey {name}", len(split)) as bar:
            surveys[name] = survey(split, inputs.channels, partial(follow, name), bar.update)
    return surveys


def _make_student_input(
    params: IngestParams, inputs: Inputs, ranges: list[tuple[float, float]]
) -> StudentInput:
    return make_student_input(
        params.student, inputs.student_channels, inputs.train_hw, ranges, inputs.contract.sha256
    )


def _image_writer(job: Job, inputs: Inputs, name: str, student: StudentInput | None) -> ImageWriter:
    folder = job.outputs.test_set if name == "test" else job.outputs.dataset / name
    return ImageWriter(folder, inputs.splits[name], inputs.student_channels, student)


def _live_writers(
    job: Job, params: IngestParams, inputs: Inputs, files: ExitStack
) -> dict[str, LivePatchWriter]:
    """By split that trains, what copies the teachers' bands for live teachers."""
    if params.teacher_mode != "live":
        return {}
    writers = {
        name: LivePatchWriter(job.outputs.teaching, inputs.splits[name], inputs.cache.teachers)
        for name in ("train", "unlabeled")
        if name in inputs.splits
    }
    return {name: files.enter_context(closing(writer)) for name, writer in writers.items()}


def _describe_splits(
    inputs: Inputs, splits: Mapping[str, Split], surveys: Mapping[str, Survey]
) -> dict[str, SplitFacts]:
    return {
        name: SplitFacts(
            patches=len(split),
            classes=tuple(inputs.task.class_counts(split.labels, len(inputs.contract.labels))),
            bad_patches_dropped=len(surveys[name].bad),
        )
        for name, split in splits.items()
    }


def _write_documents(
    job: Job,
    inputs: Inputs,
    student: StudentInput,
    splits: Mapping[str, SplitFacts],
    synthetic: list[str],
) -> None:
    contract = inputs.contract
    shutil.copyfile(job.sources["contract"], job.outputs.contract)
    job.outputs.labels.write_text("".join(f"{label}\n" for label in contract.labels))
    job.outputs.student_input.write_text(student.to_json())
    # Without a word of the test split: nothing that is made may depend on it.
    without_test = {n: msgspec.to_builtins(split) for n, split in splits.items() if n != "test"}
    summary = {"contract": contract.sha256, "synthetic": synthetic, "splits": without_test}
    if inputs.task.name != DEFAULT_TASK:  # artifacts of earlier releases name none
        summary["task"] = inputs.task.name
    (job.outputs.dataset / "dataset.json").write_text(json.dumps(summary, indent=1) + "\n")
