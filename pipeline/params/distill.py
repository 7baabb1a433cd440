"""How a student is trained, as the section `distill` of kdpipe.yaml describes it."""

from __future__ import annotations

import os
from typing import Annotated, Literal

from msgspec import Meta
from msgspec.structs import fields, replace

from pipeline.run.parameters import PATH, UNKEYED, Params

Weight = Annotated[float, Meta(ge=0)]

Positive = Annotated[float, Meta(gt=0)]


class FeatureParams(Params, frozen=True):
    """A layer of the student that shall be like a tensor of a teacher."""

    student: str  # name of a module
    teacher: str  # name of the teacher / name of its tensor, one of ingest.teachers.features


class QuantizationAwareParams(Params, frozen=True):
    """The last epochs, trained on the int8 grid of the chip."""

    share: Annotated[float, Meta(ge=0, lt=1)] = 0.0  # of the epochs, at least one; 0: none
    learning_rate: Positive = 2e-4  # at its start; goes to 0
    control: bool = False  # trained too, for comparison: the same epochs in float


class DistillParams(Params, frozen=True):
    """How to train."""

    student: str = "resnet18"  # any network of timm, or mobilenetv4m, mobilenetv3s
    init: Annotated[str | None, PATH] = None  # file of weights to start from
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
    gradient_checkpointing: bool = False  # less memory, more time: activations are computed twice
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
    quantization_aware: QuantizationAwareParams = QuantizationAwareParams()
    label_smoothing: Annotated[float, Meta(ge=0, lt=1)] = 0.0
    class_weights: Literal["none", "balanced"] = "none"  # of the cross-entropy
    sampling: Literal["uniform", "balanced"] = "uniform"  # balanced: every class equally often
    baselines: tuple[Literal["no_teacher"], ...] = ()  # trained too, for comparison
    accelerator: Literal["auto", "cpu", "gpu"] = "auto"
    threads: Annotated[int, Meta(ge=1)] | None = 1  # of torch on the CPU; null: torch's choice
    devices: Annotated[int, Meta(ge=1)] = 1
    num_nodes: Annotated[int, Meta(ge=1)] = 1
    strategy: str = "auto"  # of Lightning
    workers: Annotated[int, Meta(ge=0), UNKEYED] = 0  # processes that make batches
    loggers: Annotated[tuple[Literal["tensorboard", "wandb"], ...], UNKEYED] = ("tensorboard",)
    check_operators: Annotated[bool, UNKEYED] = True  # refuse a network that Metis can't run
    max_export_difference: Annotated[float, Meta(gt=0), UNKEYED] = 1e-3  # of logits


def float_part(params: DistillParams) -> DistillParams:
    """The training without its last part on the int8 grid; its schedule ends with it."""
    share = params.quantization_aware.share
    last = max(1, round(share * params.epochs)) if share else 0
    return replace(params, epochs=params.epochs - last)


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


def contradictions(params: DistillParams) -> list[tuple[bool, str]]:
    """Things that do not go together: whether they are asked for, and what is wrong with them."""
    soft = params.soft_weight > 0
    processes = params.devices * params.num_nodes
    epochs = float_part(params).epochs
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
            params.loss == "dkd" and soft and not (params.target_weight or params.nontarget_weight),
            "target_weight and nontarget_weight are both 0; nothing is left of loss dkd",
        ),
        (
            params.loss == "dist" and soft and not (params.inter_weight or params.intra_weight),
            "inter_weight and intra_weight are both 0; nothing is left of loss dist",
        ),
        (
            bool(params.baselines) and not (soft or params.feature_weight),
            "baselines compares with a student without teacher, and this one has none: soft_weight "
            "and feature_weight are 0",
        ),
        (
            params.num_nodes > 1 and not {"WORLD_SIZE", "SLURM_NTASKS"} & os.environ.keys(),
            "num_nodes is for torchrun or SLURM, started on every machine; nothing of theirs is in "
            "the environment",
        ),
        (
            int(os.environ.get("WORLD_SIZE", processes)) != processes,
            f"torchrun started {os.environ.get('WORLD_SIZE')} processes, but devices times "
            f"num_nodes is {processes}",
        ),
        *_without_effect(params),
        *_quantization_aware_contradictions(params),
        (
            params.warmup_epochs >= epochs and epochs > 1,
            "warmup_epochs leaves no epoch to train at the full learning rate",
        ),
    ]


def _without_effect(params: DistillParams) -> list[tuple[bool, str]]:
    """Keys that were given a value of their own although nobody looks at them."""
    soft, schedule = params.soft_weight > 0, params.schedule
    dkd, dist = soft and params.loss == "dkd", soft and params.loss == "dist"
    looked_at = {
        "temperature_end": (soft, "the soft loss, whose soft_weight is 0"),
        "target_weight": (dkd, "loss dkd"),
        "nontarget_weight": (dkd, "loss dkd"),
        "inter_weight": (dist, "loss dist"),
        "intra_weight": (dist, "loss dist"),
        "lr_gamma": (schedule in ("step", "plateau"), "schedule step or plateau"),
        "lr_step_epochs": (schedule == "step", "schedule step"),
        "lr_patience": (schedule == "plateau", "schedule plateau"),
        "class_weights": (params.hard_weight > 0, "the cross-entropy, whose hard_weight is 0"),
    }
    return [
        (not used and getattr(params, f.name) != f.default, f"{f.name} is for {what} only")
        for f in fields(params)
        for used, what in [looked_at.get(f.name, (True, ""))]
    ]


def _quantization_aware_contradictions(params: DistillParams) -> list[tuple[bool, str]]:
    wanted = params.quantization_aware.share > 0
    return [
        (
            params.quantization_aware.control and not wanted,
            "quantization_aware.control is a control of nothing: quantization_aware.share is 0",
        ),
        (
            wanted and float_part(params).epochs < 1,
            "quantization_aware.share leaves no epoch to train in float first",
        ),
        (
            wanted and params.teacher == "mutual",
            "quantization_aware.share and teacher: mutual don't go together: the second student "
            "would have to be folded too",
        ),
        (
            wanted and params.gradient_checkpointing,
            "quantization_aware.share and gradient_checkpointing don't go together: a folded "
            "student has no blocks to compute again",
        ),
        (
            wanted and params.feature_weight > 0,
            "quantization_aware.share and feature_weight don't go together: a folded student has "
            "no layers by name",
        ),
    ]
