"""The work of the stage distill: check the student, train it, export it, prove the export."""

from __future__ import annotations

import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
from msgspec import structs

from pipeline.data.dataset import StudentData
from pipeline.facts import (
    DistillFacts,
    OperatorFacts,
    QuantizationAwareFacts,
    RewriteFacts,
    StudentFacts,
)
from pipeline.networks.build import parameter_count
from pipeline.networks.export import export_facts, export_student, torch_logits
from pipeline.networks.inference import reference_network
from pipeline.params.distill import DistillParams, describe_loss, float_phase
from pipeline.run.errors import InputError
from pipeline.training.folded_network import check_trainable, export_folded
from pipeline.training.job import TrainingJob, TrainingOutcome
from pipeline.training.loop import train_all
from pipeline.training.quantization_aware import QatStart

if TYPE_CHECKING:
    from pipeline.run.stage import Job


#: Validation samples on which the rewrites of the exported graph are proven, besides random inputs.
PROOF_SAMPLES = 16


def distill(stage: Job, params: DistillParams) -> DistillFacts:
    """Train the student and its baselines, and export them.

    Args:
        stage: the stage's files.
        params: the section `distill`.

    Raises:
        InputError: the chip can't run the student, or the training does not fit the data.
        StageError: the loss is no longer finite.
    """
    classes = StudentData(stage.inputs).classes
    jobs = {name: _job(stage, params, classes, name) for name in ("student", *params.baselines)}
    if params.quantization_aware.share:
        jobs["student"] = replace(jobs["student"], params=float_phase(params))
    operators = _check_operators(stage, params, jobs["student"])
    outcomes = train_all(list(jobs.values()), stage.folder, stage.progress)
    folder = stage.outputs.training
    folder.mkdir()
    quantization_aware = None
    facts: dict[str, StudentFacts] = {}
    for (name, job), outcome in zip(jobs.items(), outcomes, strict=True):
        if name == "student" and params.quantization_aware.share:
            facts[name], quantization_aware = _train_on_grid(stage, params, job, outcome)
            continue
        onnx = stage.outputs.student if name == "student" else folder / f"{name}.onnx"
        facts[name] = _export(stage, job, outcome, onnx, name)
    student = facts.pop("student")
    return DistillFacts(
        **structs.asdict(structs.replace(student, rewrites=None)),
        quantization_aware=quantization_aware,
        student=params.student,
        macs=operators.macs,
        operators=structs.replace(operators, rewrites=student.rewrites),
        loss=describe_loss(params),
        baselines=facts,
    )


def _job(stage: Job, params: DistillParams, classes: int, name: str) -> TrainingJob:
    return TrainingJob(
        params=params,
        dataset=str(stage.inputs.dataset),
        teaching=str(stage.inputs.teaching),
        contract=str(stage.inputs.contract),
        student_input=str(stage.inputs.student_input),
        init=str(stage.sources["init"]) if params.init else None,
        classes=classes,
        seed=stage.seed,
        with_teacher=name != "no_teacher",
        folder=str(stage.scratch / name),
        logs=str(stage.logs / name),
    )


def _train_on_grid(
    stage: Job, params: DistillParams, float_job: TrainingJob, outcome: TrainingOutcome
) -> tuple[StudentFacts, QuantizationAwareFacts]:
    """Go on with the folded student on the int8 grid; measure what that changed."""
    folder = stage.outputs.training
    folded = folder / "folded.onnx"
    float_facts = _export(stage, float_job, outcome, folded, "float")
    start = QatStart.write(float_job, folded, stage.scratch)
    jobs = {"after": start.job(float_job, params, "quantization_aware", on_grid=True)}
    if params.quantization_aware.control:
        jobs["control"] = start.job(float_job, params, "control", on_grid=False)
    outcomes = train_all(list(jobs.values()), stage.folder, stage.progress)
    int8 = start.int8_facts(float_job, folded)
    facts = {"before": structs.replace(float_facts, rewrites=None, int8=int8)}
    for (name, job), grid_outcome in zip(jobs.items(), outcomes, strict=True):
        onnx = stage.outputs.student if name == "after" else folder / f"{name}.onnx"
        exported = _export(stage, job, grid_outcome, onnx, "student" if name == "after" else name)
        facts[name] = structs.replace(exported, int8=start.int8_facts(job, onnx))
    grid_facts = facts["after"]
    student = structs.replace(
        grid_facts,
        epochs=float_facts.epochs + grid_facts.epochs,
        steps=float_facts.steps + grid_facts.steps,
        best_epoch=float_facts.epochs + grid_facts.best_epoch,
        rewrites=float_facts.rewrites,
        int8=None,
    )
    return student, QuantizationAwareFacts(start.count, **facts)


def _check_operators(stage: Job, params: DistillParams, job: TrainingJob) -> OperatorFacts:
    """Export the untrained student and see whether the chip can run it."""
    path = stage.scratch / "untrained.onnx"
    path.parent.mkdir(parents=True, exist_ok=True)
    legalized = export_student(job.network(), job.data.student_input, path)
    report, refusal = legalized.report, legalized.refusal(params.student)
    if refusal and params.check_operators:
        raise InputError(
            f"distill.student: {refusal}"
            "; choose another network, or set distill.check_operators: false"
        )
    if params.quantization_aware.share:
        check_trainable(path)
    return OperatorFacts(
        macs=report.macs,
        share_on_chip=report.share_on_chip,
        refused=tuple(f"{node.op_type} {node.name}: {node.reason}" for node in report.refusals),
        rewrites=(),
    )


def _export(
    stage: Job, job: TrainingJob, outcome: TrainingOutcome, onnx: Path, name: str
) -> StudentFacts:
    """Copy what training left, export the student to `onnx`, and compare that with torch."""
    prefix = "" if name == "student" else f"{name}-"
    for file in sorted(Path(job.folder).iterdir()):
        if file.is_file():
            shutil.copyfile(file, stage.outputs.training / f"{prefix}{file.name}")
    student = job.load_trained()
    data, val = job.data, job.data.val
    rewrites: tuple[RewriteFacts, ...] = ()
    if job.folded is None:
        proof = data.tensors(val, slice(PROOF_SAMPLES))
        legalized = export_student(student, data.student_input, onnx, proof)
        rewrites = msgspec.convert(legalized.facts(), tuple[RewriteFacts, ...])
    else:
        export_folded(student, onnx)
    comparison = data.compare(val, partial(torch_logits, student), reference_network(onnx))
    score = comparison.network.score()
    return StudentFacts(
        **structs.asdict(outcome),
        parameters=parameter_count(student),
        size_bytes=onnx.stat().st_size,
        score=score.value,
        measured_on="host-float",
        n_val=score.n,
        export=export_facts(comparison),
        rewrites=rewrites,
    )
