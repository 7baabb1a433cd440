"""Train a student from the ensemble's answers and the labels, and export it."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
from msgspec import structs

from pipeline.facts import (
    DistillFacts,
    OperatorFacts,
    QuantizationAwareFacts,
    RewriteFacts,
    StudentFacts,
)
from pipeline.params.contradictions import contradictions
from pipeline.params.distill import DistillParams, float_part, loss_in_words
from pipeline.run.errors import InputError, nearest, require_extra
from pipeline.run.stage import Gate, Job, Stage

if TYPE_CHECKING:
    from pipeline.training.task import Task


#: Validation samples on which the rewrites of the exported graph are proven, besides random inputs.
PROOF_SAMPLES = 16


def sources(params: DistillParams, root: Path) -> dict[str, Path]:
    """The weights to start from, if any."""
    return {"init": root / params.init} if params.init else {}


def run(job: Job, params: DistillParams) -> DistillFacts:
    """Check the network, train it, export it, and prove the export equal to what was trained."""
    from pipeline.data.dataset import StudentData
    from pipeline.training.loop import train_all

    classes = StudentData(job.inputs).classes
    tasks = {name: _task(job, params, classes, name) for name in ("student", *params.baselines)}
    if params.quantization_aware.share:
        tasks["student"] = replace(tasks["student"], params=float_part(params))
    operators = _check_operators(job, params, tasks["student"])
    found = train_all(list(tasks.values()), job.folder, job.progress)
    training = job.outputs.training
    training.mkdir()
    quantization_aware = None
    facts: dict[str, StudentFacts] = {}
    for (name, task), trained in zip(tasks.items(), found, strict=True):
        if name == "student" and params.quantization_aware.share:
            facts[name], quantization_aware = _last_part(job, params, task, trained)
            continue
        onnx = job.outputs.student if name == "student" else training / f"{name}.onnx"
        facts[name] = _exported(job, task, trained, training, onnx, name)
    student = facts.pop("student")
    return DistillFacts(
        **structs.asdict(structs.replace(student, rewrites=None)),
        quantization_aware=quantization_aware,
        student=params.student,
        macs=operators.macs,
        operators=structs.replace(operators, rewrites=student.rewrites),
        loss=loss_in_words(params),
        baselines=facts,
    )


def _task(job: Job, params: DistillParams, classes: int, name: str) -> Task:
    from pipeline.training.task import Task

    return Task(
        params=params,
        dataset=str(job.inputs.dataset),
        teaching=str(job.inputs.teaching),
        contract=str(job.inputs.contract),
        student_input=str(job.inputs.student_input),
        init=str(job.sources["init"]) if params.init else None,
        classes=classes,
        seed=job.seed,
        taught=name != "no_teacher",
        folder=str(job.scratch / name),
        logs=str(job.logs / name),
    )


def _last_part(
    job: Job, params: DistillParams, before: Task, trained: dict[str, Any]
) -> tuple[StudentFacts, QuantizationAwareFacts]:
    """Go on with the folded student on the int8 grid; measure what that changed."""
    from pipeline.training.loop import train_all
    from pipeline.training.quantization_aware import Start

    training = job.outputs.training
    folded = training / "folded.onnx"
    first = _exported(job, before, trained, training, folded, "float")
    start = Start.write(before, folded, job.scratch)
    tasks = {"after": start.task(before, params, "quantization_aware", on_grid=True)}
    if params.quantization_aware.control:
        tasks["control"] = start.task(before, params, "control", on_grid=False)
    found = train_all(list(tasks.values()), job.folder, job.progress)
    int8 = start.int8_facts(before, folded)
    facts = {"before": structs.replace(first, rewrites=None, int8=int8)}
    for (name, task), trained in zip(tasks.items(), found, strict=True):
        onnx = job.outputs.student if name == "after" else training / f"{name}.onnx"
        prefix = "student" if name == "after" else name
        exported = _exported(job, task, trained, training, onnx, prefix)
        facts[name] = structs.replace(exported, int8=start.int8_facts(task, onnx))
    after = facts["after"]
    student = structs.replace(
        after,
        epochs=first.epochs + after.epochs,
        steps=first.steps + after.steps,
        best_epoch=first.epochs + after.best_epoch,
        rewrites=first.rewrites,
        int8=None,
    )
    return student, QuantizationAwareFacts(start.count, **facts)


def _check_operators(job: Job, params: DistillParams, task: Task) -> OperatorFacts:
    """Export the untrained student and see whether the chip can run it."""
    from pipeline.networks.export import export_student

    path = job.scratch / "untrained.onnx"
    path.parent.mkdir(parents=True, exist_ok=True)
    legalized = export_student(task.network(), task.data.student_input, path)
    report, refusal = legalized.report, legalized.refusal(params.student)
    if refusal and params.check_operators:
        raise InputError(
            f"distill.student: {refusal}"
            "; choose another network, or set distill.check_operators: false"
        )
    if params.quantization_aware.share:
        from pipeline.training.folded_network import check_trainable

        check_trainable(path)
    return OperatorFacts(
        macs=report.macs,
        share_on_chip=report.share_on_chip,
        refused=tuple(f"{node.op_type} {node.name}: {node.reason}" for node in report.refused),
        rewrites=(),
    )


def _exported(
    job: Job, task: Task, trained: dict[str, Any], training: Path, onnx: Path, name: str
) -> StudentFacts:
    """Copy what training left, export, and compare the export with torch."""
    import shutil

    from pipeline.networks.build import parameter_count
    from pipeline.networks.export import export_student, torch_logits
    from pipeline.networks.inference import answers, reference_network
    from pipeline.parity.logits import compare_export
    from pipeline.tasks.metrics import top1
    from pipeline.training import task as tasks
    from pipeline.training.folded_network import export_folded

    prefix = "" if name == "student" else f"{name}-"
    for file in sorted(Path(task.folder).iterdir()):
        if file.is_file():
            shutil.copyfile(file, training / f"{prefix}{file.name}")
    student = tasks.trained(task)
    data, val = task.data, task.data.val
    rewrites: tuple[RewriteFacts, ...] = ()
    if task.folded is None:
        proof = data.tensors(val, slice(PROOF_SAMPLES))
        legalized = export_student(student, data.student_input, onnx, proof)
        rewrites = msgspec.convert(legalized.facts(), tuple[RewriteFacts, ...])
    else:
        export_folded(student, onnx)
    by_torch, by_onnx = answers(
        val.images, data.student_input, partial(torch_logits, student), reference_network(onnx)
    )
    return StudentFacts(
        **trained,
        parameters=parameter_count(student),
        size_bytes=onnx.stat().st_size,
        top1_val=top1(by_onnx, val.labels),
        measured_on="host-float",
        n_val=len(val.labels),
        export=compare_export(by_torch, by_onnx),
        rewrites=rewrites,
    )


def ready(params: DistillParams) -> None:
    """The extra is installed, the network exists, and the parts of the loss fit together."""
    from pipeline.networks.names import timm_networks

    require_extra("train", "torch", "timm", "lightning", "onnxsim")
    if "wandb" in params.loggers:
        require_extra("wandb", "wandb")
    networks = timm_networks()
    for key, name in (("student", params.student), ("peer", params.peer)):
        if name is not None and name not in networks:
            raise InputError(
                f"distill.{key}: timm has no network {name!r}{nearest(name, networks)}"
            )
    for contradiction in contradictions(params):
        raise InputError(f"distill: {contradiction}")


def gates(params: DistillParams, facts: DistillFacts) -> list[Gate]:
    """The ONNX student computes what the torch student computed."""
    difference, agreed = facts.export.max_abs_logit_difference, facts.export.top1_agreement
    return [
        Gate(
            "export",
            difference <= params.max_export_difference and agreed == 1.0,
            f"ONNX and torch logits differ by at most {difference:.2g} "
            f"(limit {params.max_export_difference:g}), top-1 agreement {agreed:.2%} (limit 100 %)",
        )
    ]


STAGE = Stage(
    inputs=("contract", "student_input", "dataset", "teaching"),
    outputs={"student": "student.onnx", "training": "training"},
    params=DistillParams,
    facts=DistillFacts,
    run=run,
    sources=sources,
    gates=gates,
    gate_names=("export",),
    ready=ready,
    tools=lambda params: ("torch", "timm", "onnxsim"),
    code_version=4,
)
