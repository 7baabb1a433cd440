"""Train a student from the ensemble's logits and the labels, and export it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Literal

from msgspec import Meta

from pipeline.config import nearest
from pipeline.stage import Facts, Gate, InputError, Job, Stage, require_extra, unkeyed_field


@dataclass(frozen=True)
class DistillParams:
    """How to train."""

    student: str = "resnet18"  # any network of timm
    epochs: Annotated[int, Meta(ge=1)] = 30
    batch_size: Annotated[int, Meta(ge=2)] = 128
    learning_rate: Annotated[float, Meta(gt=0)] = 1e-3
    weight_decay: Annotated[float, Meta(ge=0)] = 0.05
    warmup_epochs: Annotated[float, Meta(ge=0)] = 1.0
    gradient_clip: Annotated[float, Meta(gt=0)] | None = 1.0  # norm
    hard_weight: Annotated[float, Meta(ge=0)] = 0.7  # of the cross-entropy with the labels
    soft_weight: Annotated[float, Meta(ge=0)] = 0.3  # of T^2 * KL(teacher || student)
    temperature: Annotated[float, Meta(gt=0)] = 2.0
    accelerator: Literal["auto", "cpu", "gpu"] = "auto"
    max_export_difference: Annotated[float, Meta(gt=0)] = unkeyed_field(1e-3)  # of logits


def run(job: Job, params: DistillParams) -> Facts:
    """Train, export, and prove the export equal to what was trained."""
    import numpy as np

    from pipeline.metrics import top1
    from pipeline.parity import compare_export
    from pipeline.reference import reference_logits
    from pipeline.splits import DatasetSplit
    from pipeline.students import build_student, export_student, parameter_count, torch_logits
    from pipeline.training import train
    from preprocessing.apply import student_tensor
    from preprocessing.contract import StudentInput, load_contract

    given = StudentInput.load(job.inputs["student_input"])
    classes = len(load_contract(job.inputs["contract"]).labels)
    splits = {n: DatasetSplit.load(job.inputs["dataset"] / n) for n in ("train", "val")}
    student = build_student(params.student, given, classes, seed=job.seed)
    scratch = job.outputs["training"]
    scratch.mkdir()
    facts = train(
        student,
        params,
        given,
        splits,
        np.load(job.inputs["teacher_logits"], mmap_mode="r"),
        seed=job.seed,
        folder=scratch,
        progress=job.progress,
    )
    path = job.outputs["student"]
    export_student(student, given, path)

    tensors = student_tensor(splits["val"].images, given)
    trained, exported = torch_logits(student, tensors), reference_logits(path, tensors)
    labels = splits["val"].labels
    return {
        **facts,
        "student": params.student,
        "parameters": parameter_count(student),
        "size_bytes": path.stat().st_size,
        "loss": f"{params.hard_weight:g} * CE + {params.soft_weight:g} * T^2 * KL, "
        f"T = {params.temperature:g}",
        "top1_val": top1(exported, labels),
        "measured_on": "host-float",
        "n_val": len(labels),
        "export": compare_export(trained, exported),
    }


def ready(params: DistillParams) -> None:
    """The extra is installed, the network exists, and something is left to learn."""
    require_extra("train", "torch", "timm", "lightning", "onnxsim")
    networks = timm_networks()
    if params.student not in networks:
        raise InputError(
            f"distill.student: timm has no network {params.student!r}"
            f"{nearest(params.student, networks)}"
        )
    if params.hard_weight == 0 and params.soft_weight == 0:
        raise InputError(
            "distill: hard_weight and soft_weight are both 0; nothing is left to learn"
        )


def timm_networks() -> set[str]:
    """Names of timm's networks, read from its source: importing it would take seconds."""
    spec = find_spec("timm")
    if spec is None or spec.origin is None:
        return set()
    pattern = re.compile(r"^@register_model\s*\ndef (\w+)\(", re.MULTILINE)
    modules = (Path(spec.origin).parent / "models").glob("*.py")
    return {name for module in modules for name in pattern.findall(module.read_text())}


def gates(params: DistillParams, facts: Facts) -> list[Gate]:
    """The ONNX student computes what the torch student computed."""
    export = facts["export"]
    difference, agreed = export["max_abs_logit_difference"], export["top1_agreement"]
    return [
        Gate(
            "export",
            difference <= params.max_export_difference and agreed == 1.0,
            f"ONNX and torch logits differ by at most {difference:.2g} "
            f"(limit {params.max_export_difference:g}), top-1 agreement {agreed:.2%} (limit 100 %)",
        )
    ]


STAGE = Stage(
    inputs=("contract", "student_input", "dataset", "teacher_logits"),
    outputs={"student": "student.onnx", "training": "training"},
    params=DistillParams,
    run=run,
    gates=gates,
    ready=ready,
    tools=lambda params: ("torch", "timm", "onnxsim"),
)
