"""Choose calibration samples, quantize the student to int8, and measure what that costs."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, NamedTuple

from msgspec.structs import asdict, replace

from metis.backend import SCHEMES, backend_tools, open_backend, require_backend
from pipeline.facts import CalibrateFacts
from pipeline.params.calibrate import CalibrateParams
from pipeline.run.errors import InputError
from pipeline.run.stage import Gate, Job, Stage

if TYPE_CHECKING:
    from pathlib import Path

    from metis.backend import QuantizedModel
    from pipeline.calibration.recipe import Calibrated, Recipe
    from pipeline.data.dataset import StudentData
    from pipeline.facts import (
        CalibrationSetFacts,
        ComparisonFacts,
        Int8Facts,
        LayerFacts,
        SchemeFacts,
        VariantFacts,
    )


def sources(params: CalibrateParams, root: Path) -> dict[str, Path]:
    """The file of ranges, if one is given."""
    return {"ranges_file": root / params.ranges_file} if params.ranges_file else {}


def run(job: Job, params: CalibrateParams) -> CalibrateFacts:
    """Write calibration set, baked student and int8 model; compare them with the float student."""
    import numpy as np
    import onnx

    from pipeline.calibration.recipe import recipe_of, watched
    from pipeline.calibration.study import suggestions
    from pipeline.data.dataset import StudentData

    data = StudentData(job.inputs)
    described = _write_set(job, params, data)
    samples = job.outputs.calibration_set / "samples.npy"
    recipe = recipe_of(params, job.sources.get("ranges_file"))
    with job.progress("watch activations", len(np.load(samples, mmap_mode="r"))) as bar:
        calibrated = watched(job.inputs.student, samples, recipe, bar.update)
    baked = calibrated.baked(recipe, calibrated.ranges(recipe))
    onnx.save(baked, job.outputs.baked_student)
    quantized = _quantized(job, params, calibrated, recipe, data)
    recipe = recipe.under(quantized.model.scheme)  # of several that were tried
    calibrated.ranges(recipe).save(job.outputs.ranges)
    baked_facts, variants, worst_layers = _examined(job, params, calibrated, recipe, data)
    facts = CalibrateFacts(
        calibration=described,
        backend=quantized.model.backend,
        backend_version=quantized.model.version,
        scheme=quantized.model.scheme,
        schemes=quantized.schemes,
        arithmetic=quantized.arithmetic,
        **asdict(quantized.comparison),
        emulator=quantized.emulator,
        baked=baked_facts,
        host_operators=tuple(calibrated.parts.host_operators),
        variants=variants,
        worst_layers=worst_layers,
        suggestions=(),
    )
    operators = {node.op_type for node in calibrated.parts.core.graph.node}
    advice = suggestions(facts, recipe, operators)
    for words in advice:
        job.warn(words)
    return replace(facts, suggestions=tuple(advice))


def _write_set(job: Job, params: CalibrateParams, data: StudentData) -> CalibrationSetFacts:
    from pipeline.calibration.samples import choose_samples, write_samples

    unfit = json.loads(job.inputs.unfit.read_text())
    choice = choose_samples(data.train, params.samples, data.classes, job.seed, unfit)
    for words in choice.warnings():
        job.warn(words)
    folder = job.outputs.calibration_set
    folder.mkdir()
    described = write_samples(folder / "samples.npy", data, choice)
    document = {
        "split": described.split,
        "samples": described.samples,
        "classes": described.classes,
        "left_out": described.left_out,
        "rows": data.train.rows[choice.indices].tolist(),
        "sha256": described.sha256,
    }
    (folder / "samples.json").write_text(json.dumps(document) + "\n")
    return described


class _Quantized(NamedTuple):
    """The int8 model that was kept, and what was measured of it."""

    model: QuantizedModel
    comparison: ComparisonFacts
    schemes: tuple[SchemeFacts, ...]
    arithmetic: str
    emulator: ComparisonFacts | None


def _quantized(
    job: Job,
    params: CalibrateParams,
    calibrated: Calibrated,
    recipe: Recipe,
    data: StudentData,
) -> _Quantized:
    """The backend's int8 model; with the SDK, the emulator's figures beside the SDK's own."""
    from metis.emulator.kernels import arithmetic
    from pipeline.calibration.recipe import emulated
    from pipeline.calibration.schemes import quantize_best
    from pipeline.parity.logits import compare_int8

    backend = open_backend(str(params.backend), params.sdk)

    def quantize(scheme: str, into: Path) -> QuantizedModel:
        calibrated.ranges(recipe.under(scheme)).save(job.outputs.ranges)
        with job.progress(f"{scheme} with {backend.name}", params.samples) as bar:
            return backend.quantize(
                job.outputs.baked_student,
                job.outputs.calibration_set / "samples.npy",
                into,
                scheme=scheme,
                progress=bar.update,
                ranges=job.outputs.ranges,
            )

    model, figures, tried = quantize_best(
        quantize,
        lambda model: compare_int8(job.inputs.student, model, data, data.val, params.sdk),
        list(SCHEMES) if params.try_schemes else [params.scheme],
        job.outputs.quantized_model,
    )
    beside = None
    if backend.name != "emulator":
        calibrated.ranges(recipe.under(model.scheme)).save(job.outputs.ranges)
        files = job.outputs.baked_student, job.outputs.ranges
        with emulated(*files, model.scheme) as other:
            beside = compare_int8(job.inputs.student, other, data, data.val)
    computed_with = arithmetic(model.scheme)[0] if backend.name == "emulator" else "the SDK's"
    return _Quantized(model, figures, tried, computed_with, beside)


def _examined(
    job: Job,
    params: CalibrateParams,
    calibrated: Calibrated,
    recipe: Recipe,
    data: StudentData,
) -> tuple[Int8Facts, tuple[VariantFacts, ...], tuple[LayerFacts, ...] | None]:
    """The baked student in float, other ways to quantize, and single layers."""
    import numpy as np

    from pipeline.calibration import study
    from pipeline.networks.inference import reference_logits

    val = data.val.spread(study.COMPARED)
    frames, labels = data.tensors(val), val.labels
    exact = reference_logits(job.inputs.student, frames)
    samples = job.outputs.calibration_set / "samples.npy"
    rounded = reference_logits(job.outputs.baked_student, frames)
    # Weights and biases alone, in float: what the vendor's compiler starts from.
    baked = replace(study.figures(exact, rounded, labels), measured_on="host-float")
    variants = study.variants(
        calibrated, recipe, job.inputs.student, samples, (frames, exact, labels)
    )
    worst_layers = None
    few = np.unique(np.linspace(0, len(labels) - 1, params.sensitivity).round().astype(int))
    if len(few):
        with job.progress("layers one by one", calibrated.layers) as bar:
            found = study.sensitivity(
                job.outputs.baked_student,
                calibrated.ranges(recipe),
                recipe.scheme,
                frames[few],
                labels[few],
                bar.update,
            )
        worst_layers = tuple(found[: study.WORST])
    return baked, variants, worst_layers


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
