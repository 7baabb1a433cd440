"""The part of ingest that asks the teachers, doubts their answers, and keeps them for distill."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import numpy as np
from msgspec.structs import replace

from pipeline.facts import EnsembleFacts, TeacherFacts
from pipeline.params.ingest import OTHER_PATCHES
from pipeline.run.errors import InputError
from pipeline.tasks.task import open_task
from pipeline.teachers.conventions import (
    TeacherFigures,
    check_records,
    describe_ensemble,
    describe_member,
    try_conventions,
)
from pipeline.teachers.ensemble import (
    Ensemble,
    Member,
    fit_temperature,
    gives_probabilities,
    to_logits,
)
from pipeline.teachers.soft_targets import (
    SoftTargetWriter,
    write_ensemble,
    write_live_teachers,
    write_val_members,
)
from preprocessing.scores import mean_and_std

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from pipeline.data.splits import Split
    from pipeline.params.ingest import IngestParams
    from pipeline.run.stage import Job
    from pipeline.tasks.task import Task
    from pipeline.teachers.logit_cache import LogitCache
    from pipeline.teachers.teacher import Teacher


#: Labeled patches on which the range of the input is read and conventions are compared.
SAMPLE = 256

#: Another convention must beat the contract's by this share of patches before it is pointed out.
_CLEARLY_BETTER = 0.05


def needed_views(params: IngestParams, splits: Mapping[str, Split]) -> dict[str, int]:
    """Of which splits the teachers' answers are kept, and of how many views."""
    taught = [name for name in ("train", "unlabeled") if name in splits]
    cached = taught if params.teacher_mode == "cached" else []
    return {"val": 1, **dict.fromkeys(cached, params.views.count)}


def teach(
    job: Job,
    params: IngestParams,
    cache: LogitCache,
    splits: Mapping[str, Split],
    digests: Mapping[str, str],
    threads: str,
) -> EnsembleFacts:
    """Ask the teachers whatever is not known yet, and write the artifact `teaching`.

    Args:
        job: of ingest.
        params: the section `ingest`.
        cache: the teachers and what they said so far.
        splits: without bad patches.
        digests: by split, of what is read from its file.
        threads: how onnxruntime runs the teachers, in words.

    Raises:
        InputError: a teacher is not the one that was recorded.
    """
    val = splits["val"]
    _fill(job, cache, val, digests["val"], 1)
    folder = job.outputs.teaching
    outputs = partial(_val_outputs, cache, val, digests["val"])
    probabilities = _judge_probabilities(outputs())
    logits = list(write_val_members(folder, len(val), _val_logits(outputs(), probabilities)))
    task, labels = open_task(params.task), val.labels
    members = _describe(job, params, task, cache.teachers, val, logits, probabilities)
    temperatures = [1.0] * len(logits)
    if params.calibrate_temperatures:
        temperatures = [fit_temperature(member, labels) for member in logits]
    ensemble = _make_ensemble(job, params, cache.teachers, val, probabilities, temperatures)
    write_ensemble(folder, params.teacher_mode, ensemble)
    if params.teacher_mode == "live":
        write_live_teachers(folder, cache.teachers)
    for name, views in needed_views(params, splits).items():
        if name != "val":
            _fill(job, cache, splits[name], digests[name], views)
            _write_logits(cache, ensemble, splits[name], digests[name], views, folder)
    weights = [member.params.weight for member in ensemble.members]
    mean, std = mean_and_std(lambda: (ensemble.logits(block) for _, block in outputs()))
    rules, agreement = describe_ensemble(logits, weights, temperatures, labels, task)
    return EnsembleFacts(
        members=tuple(
            replace(m, temperature=t) for m, t in zip(members, temperatures, strict=True)
        ),
        rule=params.combine,
        mode=params.teacher_mode,
        score=rules[params.combine].score,
        ece_val=rules[params.combine].ece_val,
        rules=rules,
        agreement=agreement,
        measured_on="host-float",
        n_val=len(labels),
        logit_mean=mean,
        logit_std=std,
        threads=threads,
    )


def _make_ensemble(
    job: Job,
    params: IngestParams,
    teachers: Sequence[Teacher],
    val: Split,
    probabilities: Sequence[bool],
    temperatures: Sequence[float],
) -> Ensemble:
    members = tuple(
        Member(
            name=teacher.name,
            params=replace(teacher.params, path=teacher.files[0].name if teacher.files else None),
            probabilities=as_probabilities,
            temperature=temperature,
            bands_in_data=val.source.shape(teacher.modality)[2],
        )
        for teacher, as_probabilities, temperature in zip(
            teachers, probabilities, temperatures, strict=True
        )
    )
    return Ensemble(members, params.combine, params.views, job.seed)


def _fill(job: Job, cache: LogitCache, split: Split, digest: str, views: int) -> None:
    with job.progress(f"teachers, {split.name}", len(split)) as bar:
        cache.fill(split, digest, views, progress=bar.update)


#: Positions in the validation split, and of each teacher its output or logits, (n, classes, ...).
_ValBlock = tuple[slice, list["NDArray[np.float32]"]]


def _val_outputs(cache: LogitCache, val: Split, digest: str) -> Iterator[_ValBlock]:
    """Each teacher's final output for the patches as they are."""
    for part, outputs in cache.read_blocks(val, digest, 1):
        yield part, [first[0] for first, *_ in outputs]


def _judge_probabilities(outputs: Iterable[_ValBlock]) -> list[bool]:
    """Of each teacher, whether all its outputs are probabilities."""
    blocks = [[gives_probabilities(output) for output in block] for _, block in outputs]
    return [all(verdicts) for verdicts in zip(*blocks, strict=True)]


def _val_logits(outputs: Iterable[_ValBlock], probabilities: Sequence[bool]) -> Iterator[_ValBlock]:
    for part, block in outputs:
        yield part, [to_logits(o, p) for o, p in zip(block, probabilities, strict=True)]


def _write_logits(
    cache: LogitCache, ensemble: Ensemble, split: Split, digest: str, views: int, folder: Path
) -> None:
    writer = SoftTargetWriter(folder, split.name, ensemble, len(split))
    for part, outputs in cache.read_blocks(split, digest, views):
        writer.add(part, outputs)


def _describe(
    job: Job,
    params: IngestParams,
    task: Task,
    teachers: Sequence[Teacher],
    val: Split,
    logits: Sequence[NDArray[np.float32]],
    probabilities: Sequence[bool],
) -> list[TeacherFacts]:
    """Figures of every teacher; the first one that is not what was recorded ends the stage."""
    facts = []
    for teacher, member, as_probabilities in zip(teachers, logits, probabilities, strict=True):
        ending = "probabilities" if as_probabilities else teacher.ending
        figures, conventions = _judge(job, params, task, teacher, val, member, as_probabilities)
        if ending != "logits":
            job.warn(_about_softmax(teacher, ending))
        facts.append(
            TeacherFacts(
                name=teacher.name,
                modality=teacher.modality,
                bands=tuple(teacher.bands),
                weight=teacher.params.weight,
                opset=teacher.opset,
                batch=teacher.batch,
                output=ending,
                score=figures.score,
                ece_val=figures.ece_val,
                logit_mean=figures.logit_mean,
                logit_std=figures.logit_std,
                input_min=figures.input_min,
                input_max=figures.input_max,
                recorded_score=teacher.params.recorded_score,
                conventions=conventions,
                temperature=1.0,
            )
        )
    return facts


def _judge(
    job: Job,
    params: IngestParams,
    task: Task,
    teacher: Teacher,
    val: Split,
    logits: NDArray[np.float32],
    probabilities: bool,
) -> tuple[TeacherFigures, dict[str, float]]:
    """A teacher's figures, and where they are doubtful its score by convention."""
    rows = np.unique(np.linspace(0, len(val) - 1, min(SAMPLE, len(val))).round().astype(int))
    sample = val.source.read(teacher.modality, val.rows[rows], teacher.bands)
    figures = describe_member(teacher, logits, val.labels, sample, task)
    mismatches = check_records(
        teacher,
        figures,
        params.max_score_difference,
        params.max_logit_difference,
        probabilities=probabilities,
    )
    recorded = teacher.params.recorded_score is not None
    if not mismatches and (recorded or figures.score >= params.doubtful_score):
        return figures, {}
    tried = try_conventions(teacher, sample, val.labels[rows])
    _point_out(job, teacher, tried, len(rows))
    if mismatches:
        from_train = params.data.val.fraction is not None
        raise InputError(
            f"{teacher.name} is not the teacher that was recorded: on validation "
            f"{'; '.join(map(str, mismatches))}. {OTHER_PATCHES if from_train else ''}Top-1 on "
            f"{len(rows)} of its patches by convention: {_join(tried)}"
        )
    return figures, tried


def _point_out(job: Job, teacher: Teacher, tried: dict[str, float], n: int) -> None:
    by_contract = tried["the contract"]
    best = max(tried, key=tried.__getitem__)
    message = f"{teacher.name}: top-1 on {n} validation patches by convention: {_join(tried)}"
    if tried[best] > by_contract + _CLEARLY_BETTER:
        message += f"; it looks as if it was exported for: {best}. Nothing was switched"
    job.warn(message)


def _join(tried: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:.3f}" for name, value in tried.items())


def _about_softmax(teacher: Teacher, ending: str) -> str:
    if ending == "softmax cut off":
        return f"{teacher.name} ends in a softmax: the tensor before it is taken as logits"
    message = (
        f"{teacher.name} gives probabilities: their logarithm is taken as logits, which is the "
        "same at every temperature"
    )
    params = teacher.params
    if params.recorded_logit_mean is None and params.recorded_logit_std is None:
        return message
    return f"{message}; the recorded mean and std of logits can't be compared with it"
