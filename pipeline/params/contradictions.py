"""What does not go together in the section `distill`, beyond what its types say."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from pipeline.params.distill import DistillParams, float_phase

if TYPE_CHECKING:
    from collections.abc import Iterator


def contradictions(params: DistillParams) -> Iterator[str]:
    """Say what is wrong with parameters that do not go together, worst first."""
    for check in (
        _learning,
        _soft_loss,
        _labels,
        _processes,
        _without_effect,
        _quantization_aware,
        _warmup,
    ):
        yield from check(params)


def _learning(params: DistillParams) -> Iterator[str]:
    soft, features = params.soft_weight > 0, params.feature_weight > 0
    if not (params.hard_weight or soft or features):
        yield "hard_weight, soft_weight and feature_weight are all 0; nothing is left to learn"
    if params.teacher != "ensemble" and not soft:
        yield f"teacher is {params.teacher}, but soft_weight is 0: nobody would teach"
    if params.teacher == "ema" and params.ema_decay is None:
        yield "teacher is ema, but ema_decay is null: there is no average to learn from"
    if params.teacher != "mutual" and params.peer is not None:
        yield "peer is for teacher: mutual only"
    if params.teacher != "ensemble" and features:
        yield f"feature_weight needs the ensemble's tensors; teacher is {params.teacher}"
    if features != bool(params.features):
        yield "feature_weight and features go together; one of them is missing"


def _soft_loss(params: DistillParams) -> Iterator[str]:
    loss = params.loss
    if params.soft_weight == 0:
        if params.standardize_logits:
            yield "standardize_logits changes the soft loss, whose soft_weight is 0"
        if loss != DistillParams().loss:
            yield f"loss {loss.name} is a soft loss, whose soft_weight is 0"
    elif loss.weights and not any(loss.weights.values()):
        yield f"nothing is left of loss {loss.name}: {' and '.join(loss.weights)} are 0"


def _labels(params: DistillParams) -> Iterator[str]:
    if params.label_smoothing and not params.hard_weight:
        yield "label_smoothing changes the cross-entropy, whose hard_weight is 0"
    if params.class_weights != "none" and params.sampling != "uniform":
        yield "class_weights and sampling both balance the classes; keep one"
    if params.baselines and not (params.soft_weight or params.feature_weight):
        yield (
            "baselines compares with a student without teacher, and this one has none: soft_weight "
            "and feature_weight are 0"
        )


def _processes(params: DistillParams) -> Iterator[str]:
    if params.num_nodes > 1 and not {"WORLD_SIZE", "SLURM_NTASKS"} & os.environ.keys():
        yield (
            "num_nodes is for torchrun or SLURM, started on every machine; nothing of theirs is in "
            "the environment"
        )
    processes = params.devices * params.num_nodes
    if int(os.environ.get("WORLD_SIZE", processes)) != processes:
        yield (
            f"torchrun started {os.environ.get('WORLD_SIZE')} processes, but devices times "
            f"num_nodes is {processes}"
        )


def _without_effect(params: DistillParams) -> Iterator[str]:
    """Keys that were given a value of their own although nobody looks at them."""
    schedule = params.schedule
    #: By key, whether somebody looks at it, and what for.
    used = {
        "temperature_end": (params.soft_weight > 0, "the soft loss, whose soft_weight is 0"),
        "lr_gamma": (schedule in ("step", "plateau"), "schedule step or plateau"),
        "lr_step_epochs": (schedule == "step", "schedule step"),
        "lr_patience": (schedule == "plateau", "schedule plateau"),
        "class_weights": (params.hard_weight > 0, "the cross-entropy, whose hard_weight is 0"),
    }
    defaults = DistillParams()
    for key, (looked_at, purpose) in used.items():
        if not looked_at and getattr(params, key) != getattr(defaults, key):
            yield f"{key} is for {purpose} only"


def _quantization_aware(params: DistillParams) -> Iterator[str]:
    if not params.quantization_aware.share:
        if params.quantization_aware.control:
            yield "quantization_aware.control is one of nothing: quantization_aware.share is 0"
        return
    if float_phase(params).epochs < 1:
        yield "quantization_aware.share leaves no epoch to train in float first"
    partners = {
        "teacher: mutual": (
            params.teacher == "mutual",
            "the second student would have to be folded too",
        ),
        "gradient_checkpointing": (
            params.gradient_checkpointing,
            "a folded student has no blocks to compute again",
        ),
        "feature_weight": (
            params.feature_weight > 0,
            "a folded student has no layers by name",
        ),
    }
    for partner, (asked_for, reason) in partners.items():
        if asked_for:
            yield f"quantization_aware.share and {partner} don't go together: {reason}"


def _warmup(params: DistillParams) -> Iterator[str]:
    epochs = float_phase(params).epochs
    if params.warmup_epochs >= epochs and epochs > 1:
        yield "warmup_epochs leaves no epoch to train at the full learning rate"
