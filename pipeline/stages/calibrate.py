"""Choose calibration samples, quantize the student to int8, and measure what that costs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from metis.backend import backend_tools, require_backend
from pipeline.facts import CalibrateFacts
from pipeline.params.calibrate import CalibrateParams
from pipeline.run.errors import InputError
from pipeline.run.stage import Gate, Job, Stage

if TYPE_CHECKING:
    from pathlib import Path


def sources(params: CalibrateParams, root: Path) -> dict[str, Path]:
    """The file of ranges, if one is given."""
    return {"ranges_file": root / params.ranges_file} if params.ranges_file else {}


def run(job: Job, params: CalibrateParams) -> CalibrateFacts:
    """Write calibration set, baked student and int8 model; compare them with the float student."""
    from pipeline.calibration.quantize_student import quantize_student

    return quantize_student(job, params)


def gates(params: CalibrateParams, facts: CalibrateFacts) -> list[Gate]:
    """int8 loses no more than allowed, and there are enough samples to say so."""
    loss = facts.int8_loss_points
    low, high = facts.int8_loss_interval95_points
    limit = params.max_int8_loss
    verdict = "passed" if high <= limit else "failed" if low > limit else "undecided"
    advice = {
        "passed": "",
        "failed": "; `kdpipe status --why calibrate` and the report say what to try",
        "undecided": f"; {facts.n_val} validation patches are too few to decide: use more, or "
        "raise calibrate.max_int8_loss",
    }
    return [
        Gate(
            "int8_loss",
            verdict == "passed",
            f"{verdict}: int8 loses {loss:+.2f} points of top-1, 95 % interval {low:+.2f} to "
            f"{high:+.2f}, limit {limit:g}{advice[verdict]}",
        )
    ]


def ready(params: CalibrateParams) -> None:
    """The backend must be here before anything starts, and ranges are said one way."""
    if params.ranges_file and (params.ranges or params.observer):
        raise InputError(
            "calibrate.ranges_file has the range of every tensor, so calibrate.ranges and "
            "calibrate.observer change nothing; edit the file, or leave it out"
        )
    require_backend(str(params.backend), params.sdk)


STAGE = Stage(
    inputs=("contract", "student_input", "dataset", "unfit", "student"),
    outputs={
        "calibration_set": "calibration_set",
        "baked_student": "student_baked.onnx",
        "ranges": "ranges.json",
        "quantized_model": "quantized_model",
    },
    params=CalibrateParams,
    facts=CalibrateFacts,
    run=run,
    sources=sources,
    gates=gates,
    gate_names=("int8_loss",),
    ready=ready,
    tools=lambda params: backend_tools(str(params.backend), params.sdk),
    code_version=2,
)
