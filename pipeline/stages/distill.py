"""Train a student from the ensemble's answers and the labels, and export it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from msgspec import Meta

from pipeline.config import nearest
from pipeline.stage import (
    Facts,
    Gate,
    InputError,
    Job,
    Stage,
    path_field,
    require_extra,
    unkeyed_field,
)

if TYPE_CHECKING:
    from pipeline.training import Task

#: Names that users have for networks of timm, and the input size they mean by them.
ALIASES = {
    "mobilenetv4m": ("mobilenetv4_conv_medium", 224),
    "mobilenetv3s": ("mobilenetv3_small_100", 32),
}

Weight = Annotated[float, Meta(ge=0)]
Positive = Annotated[float, Meta(gt=0)]


@dataclass(frozen=True)
class FeatureParams:
    """A layer of the student that shall be like a tensor of a teacher."""

    student: str  # name of a module
    teacher: str  # name of the teacher / name of its tensor, one of ingest.teachers.features


@dataclass(frozen=True)
class DistillParams:
    """How to train."""

    student: str = "resnet18"  # any network of timm, or mobilenetv4m, mobilenetv3s
    init: str | None = path_field(None)  # file of weights to start from
    stem_stride: Annotated[int, Meta(ge=1, le=4)] | None = None  # of the first convolution
    teacher: Literal["ensemble", "ema", "mutual"] = "ensemble"  # who gives the soft targets
    peer: str | None = None  # second student of teacher: mutual; null: the same network
    epochs: Annotated[int, Meta(ge=1)] = 30
    batch_size: Annotated[int, Meta(ge=2)] = 128  # of one process
    optimizer: Literal["adamw", "sgd"] = "adamw"
    learning_rate: Positive = 1e-3
    weight_decay: Weight = 0.05
    schedule: Literal["cosine", "step", "plateau", "constant"] = "cosine"
    warmup_epochs: Weight = 1.0
    lr_gamma: Annotated[float, Meta(gt=0, le=1)] = 0.1  # factor of step and plateau
    lr_step_epochs: Annotated[int, Meta(ge=1)] = 10  # of schedule step
    lr_patience: Annotated[int, Meta(ge=0)] = 3  # epochs, of schedule plateau
    gradient_clip: Positive | None = 1.0  # norm
    accumulate_batches: Annotated[int, Meta(ge=1)] = 1
    precision: Literal["32", "bf16-mixed", "16-mixed"] = "32"
    early_stop_patience: Annotated[int, Meta(ge=1)] | None = None  # epochs without a better val
    keep_checkpoints: Annotated[int, Meta(ge=1)] = 3  # weights of so many best epochs
    ema_decay: Annotated[float, Meta(gt=0, lt=1)] | None = None  # average of weights
    hard_weight: Weight = 0.7  # of the cross-entropy with the labels
    soft_weight: Weight = 0.3  # of the soft loss
    feature_weight: Weight = 0.0  # of the mean squared error of features
    loss: Literal["kl", "dkd", "dist"] = "kl"  # the soft loss
    standardize_logits: bool = False  # each row of logits to mean 0 and deviation 1 first
    temperature: Positive = 2.0
    temperature_end: Positive | None = None  # reached linearly in the last epoch; null: constant
    target_weight: Weight = 1.0  # of DKD's target part (the paper's alpha)
    nontarget_weight: Weight = 8.0  # of DKD's other part (the paper's beta)
    inter_weight: Weight = 1.0  # of DIST's rows (the paper's beta)
    intra_weight: Weight = 1.0  # of DIST's columns (the paper's gamma)
    features: tuple[FeatureParams, ...] = ()
    label_smoothing: Annotated[float, Meta(ge=0, lt=1)] = 0.0
    class_weights: Literal["none", "balanced"] = "none"  # of the cross-entropy
    sampling: Literal["uniform", "balanced"] = "uniform"  # balanced: every class equally often
    baselines: tuple[Literal["no_teacher"], ...] = ()  # trained too, for comparison
    accelerator: Literal["auto", "cpu", "gpu"] = "auto"
    devices: Annotated[int, Meta(ge=1)] = 1
    num_nodes: Annotated[int, Meta(ge=1)] = 1
    strategy: str = "auto"  # of Lightning
    workers: Annotated[int, Meta(ge=0)] = unkeyed_field(0)  # processes that make batches
    loggers: tuple[Literal["tensorboard", "wandb"], ...] = unkeyed_field(("tensorboard",))
    check_operators: bool = unkeyed_field(True)  # refuse a network that Metis can't run
    max_export_difference: Annotated[float, Meta(gt=0)] = unkeyed_field(1e-3)  # of logits


def sources(params: DistillParams, root: Path) -> dict[str, Path]:
    """The weights to start from, if any."""
    return {"init": root / params.init} if params.init else {}


def run(job: Job, params: DistillParams) -> Facts:
    """Check the network, train it, export it, and prove the export equal to what was trained."""
    from pipeline.training import train_all
    from preprocessing.contract import load_contract

    classes = len(load_contract(job.inputs["contract"]).labels)
    tasks = {name: _task(job, params, classes, name) for name in ("student", *params.baselines)}
    operators = _check_operators(job, params, tasks["student"])
    found = train_all(list(tasks.values()), job.scratch.parents[1], job.progress)
    training = job.outputs["training"]
    training.mkdir()
    facts: dict[str, Facts] = {}
    for (name, task), trained in zip(tasks.items(), found, strict=True):
        onnx = job.outputs["student"] if name == "student" else training / f"{name}.onnx"
        facts[name] = {**trained, **_exported(job, task, training, onnx, name)}
    return {
        **facts.pop("student"),
        "student": params.student,
        "macs": operators["macs"],
        "operators": operators,
        "loss": loss_in_words(params),
        "baselines": facts,
    }


def _task(job: Job, params: DistillParams, classes: int, name: str) -> Task:
    from pipeline.training import Task

    return Task(
        params=params,
        dataset=str(job.inputs["dataset"]),
        teaching=str(job.inputs["teaching"]),
        contract=str(job.inputs["contract"]),
        student_input=str(job.inputs["student_input"]),
        init=str(job.sources["init"]) if params.init else None,
        classes=classes,
        seed=job.seed,
        taught=name != "no_teacher",
        folder=str(job.scratch / name),
        logs=str(job.logs / name),
    )


def _check_operators(job: Job, params: DistillParams, task: Task) -> dict[str, Any]:
    """Export the untrained student and see whether the chip can run it."""
    import onnx
    from metis.operators import check_model

    from pipeline.students import export_student

    path = job.scratch / "untrained.onnx"
    path.parent.mkdir(parents=True, exist_ok=True)
    export_student(task.network(), task.given, path)
    report = check_model(onnx.load(path))
    if report.fatal and params.check_operators:
        first = report.fatal[0]
        raise InputError(
            f"distill.student: Metis can't run {params.student}: {len(report.fatal)} nodes are "
            f"refused, the first is {first.op_type} {first.name}: {first.reason}"
            + (f" ({first.cure})" if first.cure else "")
            + "; choose another network, or set distill.check_operators: false"
        )
    return {
        "macs": report.macs,
        "share_on_chip": report.share_on_chip,
        "refused": [f"{node.op_type} {node.name}: {node.reason}" for node in report.fatal],
    }


def _exported(job: Job, task: Task, training: Path, onnx: Path, name: str) -> Facts:
    """Copy what training left, export, and compare the export with torch."""
    import shutil

    from pipeline.metrics import top1
    from pipeline.parity import compare_export
    from pipeline.reference import reference_logits
    from pipeline.splits import DatasetSplit
    from pipeline.students import export_student, parameter_count, torch_logits
    from pipeline.training import trained
    from preprocessing.apply import student_tensor

    prefix = "" if name == "student" else f"{name}-"
    for file in sorted(Path(task.folder).iterdir()):
        if file.is_file():
            shutil.copyfile(file, training / f"{prefix}{file.name}")
    student = trained(task)
    export_student(student, task.given, onnx)
    val = DatasetSplit.load(job.inputs["dataset"] / "val")
    tensors = student_tensor(val.images, task.given)
    by_torch, by_onnx = torch_logits(student, tensors), reference_logits(onnx, tensors)
    return {
        "parameters": parameter_count(student),
        "size_bytes": onnx.stat().st_size,
        "top1_val": top1(by_onnx, val.labels),
        "measured_on": "host-float",
        "n_val": len(val.labels),
        "export": compare_export(by_torch, by_onnx),
    }


def loss_in_words(params: DistillParams) -> str:
    """The loss as it is added up, such as 0.7 * CE + 0.3 * T^2 * KL, T = 2."""
    hard = "CE" if not params.label_smoothing else f"CE(smoothing {params.label_smoothing:g})"
    words = [f"{params.hard_weight:g} * {hard}"]
    temperature = f"{params.temperature:g}"
    if params.temperature_end is not None:
        temperature += f" to {params.temperature_end:g}"
    if params.soft_weight:
        soft = {"kl": "T^2 * KL", "dkd": "DKD", "dist": "DIST"}[params.loss]
        who = {"ensemble": "", "ema": " (own average)", "mutual": " (peer)"}[params.teacher]
        words.append(f"{params.soft_weight:g} * {soft}{who}")
    if params.feature_weight:
        words.append(f"{params.feature_weight:g} * MSE of features")
    return " + ".join(words) + (f", T = {temperature}" if params.soft_weight else "")


def ready(params: DistillParams) -> None:
    """The extra is installed, the network exists, and the parts of the loss fit together."""
    require_extra("train", "torch", "timm", "lightning", "onnxsim")
    if "wandb" in params.loggers:
        require_extra("wandb", "wandb")
    networks = timm_networks()
    for key, name in (("student", params.student), ("peer", params.peer)):
        if name is not None and name not in networks:
            raise InputError(
                f"distill.{key}: timm has no network {name!r}{nearest(name, networks)}"
            )
    for contradiction, words in _contradictions(params):
        if contradiction:
            raise InputError(f"distill: {words}")


def _contradictions(params: DistillParams) -> list[tuple[bool, str]]:
    soft = params.soft_weight > 0
    return [
        (
            not (params.hard_weight or params.soft_weight or params.feature_weight),
            "hard_weight, soft_weight and feature_weight are all 0; nothing is left to learn",
        ),
        (
            params.teacher != "ensemble" and not soft,
            f"teacher is {params.teacher}, but soft_weight is 0: nobody would teach",
        ),
        (
            params.teacher == "ema" and params.ema_decay is None,
            "teacher is ema, but ema_decay is null: there is no average to learn from",
        ),
        (
            params.teacher != "mutual" and params.peer is not None,
            "peer is for teacher: mutual only",
        ),
        (
            params.teacher != "ensemble" and params.feature_weight > 0,
            f"feature_weight needs the ensemble's tensors; teacher is {params.teacher}",
        ),
        (
            (params.feature_weight > 0) != bool(params.features),
            "feature_weight and features go together; one of them is missing",
        ),
        (
            params.standardize_logits and not soft,
            "standardize_logits changes the soft loss, whose soft_weight is 0",
        ),
        (
            params.loss != "kl" and not soft,
            f"loss {params.loss} is a soft loss, whose soft_weight is 0",
        ),
        (
            bool(params.label_smoothing) and not params.hard_weight,
            "label_smoothing changes the cross-entropy, whose hard_weight is 0",
        ),
        (
            params.class_weights != "none" and params.sampling != "uniform",
            "class_weights and sampling both balance the classes; keep one",
        ),
        (
            params.warmup_epochs >= params.epochs and params.epochs > 1,
            "warmup_epochs leaves no epoch to train at the full learning rate",
        ),
    ]


def timm_networks() -> set[str]:
    """Names of timm's networks, read from its source: importing it would take seconds."""
    spec = find_spec("timm")
    if spec is None or spec.origin is None:
        return set()
    pattern = re.compile(r"^@register_model\s*\ndef (\w+)\(", re.MULTILINE)
    modules = (Path(spec.origin).parent / "models").glob("*.py")
    found = {name for module in modules for name in pattern.findall(module.read_text())}
    return found | set(ALIASES)


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
    inputs=("contract", "student_input", "dataset", "teaching"),
    outputs={"student": "student.onnx", "training": "training"},
    params=DistillParams,
    run=run,
    sources=sources,
    gates=gates,
    ready=ready,
    tools=lambda params: ("torch", "timm", "onnxsim"),
    code_version=2,
)
