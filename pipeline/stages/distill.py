"""Train a student from the ensemble's answers and the labels, and export it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipeline.facts import DistillFacts
from pipeline.params.contradictions import contradictions
from pipeline.params.distill import DistillParams
from pipeline.run.errors import InputError, nearest, require_extra
from pipeline.run.stage import Gate, Job, Stage

if TYPE_CHECKING:
    from pathlib import Path


def sources(params: DistillParams, root: Path) -> dict[str, Path]:
    """The weights to start from, if any."""
    return {"init": root / params.init} if params.init else {}


def run(job: Job, params: DistillParams) -> DistillFacts:
    """Check the network, train it, export it, and prove the export equal to what was trained."""
    from pipeline.training.distill import distill

    return distill(job, params)


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
    difference, agreed = facts.export.max_abs_logit_difference, facts.export.agreement
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
