"""The parity of a run: as its stages measured it, or computed anew from its artifacts."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING

from metis.backend import QuantizedModel
from pipeline.calibration.int8_loss import compare_int8
from pipeline.data.dataset import StudentData
from pipeline.parity.images import SAMPLES, image_legs
from pipeline.parity.legs import export_leg, int8_leg, judge
from pipeline.run.errors import InputError

if TYPE_CHECKING:
    from pipeline.facts import Leg
    from pipeline.parity.legs import JudgedLeg
    from pipeline.run.stage import Job
    from pipeline.run.state import RunState


def prove_parity(job: Job) -> list[Leg]:
    """The legs from training tensor to int8; the last two as their own stages recorded them."""
    with job.progress("parity", SAMPLES) as bar:
        legs = image_legs(StudentData(job.inputs), job.inputs.device_pipeline, job.run, bar.update)
    return [*legs, export_leg(job.facts.distill), int8_leg(job.facts.calibrate)]


def verify_parity(state: RunState) -> list[JudgedLeg]:
    """Compute every leg of parity anew from the run's artifacts.

    Raises:
        InputError: a stage that makes what is compared did not run yet.
    """
    needed = {"distill": "student", "calibrate": "quantized_model", "compile": "device_pipeline"}
    for stage, artifact in needed.items():
        if state.artifact(artifact) is None:
            raise InputError(
                f"parity needs {artifact!r}, which run {state.config.run} does not have.\n"
                f"  {stage} makes it:  kdpipe run --to {stage}"
            )
    paths = state.paths
    data = StudentData(paths)
    facts = state.facts
    export = None
    if find_spec("torch") and find_spec("timm"):
        from pipeline.parity.export import measure_export  # torch, which a box with a card lacks

        weights = paths.training / "student.safetensors"
        params = state.config.params["distill"]
        export = measure_export(params, weights, data, paths.student)
    model = QuantizedModel.load(paths.quantized_model)
    comparison = compare_int8(
        paths.student, model, data, data.val, state.config.params["calibrate"].sdk
    )
    legs = [
        *image_legs(data, paths.device_pipeline, state.config.run),
        export_leg(facts.distill, export),
        int8_leg(facts.calibrate, comparison),
    ]
    limits = state.config.params["benchmark"].limits
    return [judge(leg, limits) for leg in legs]
