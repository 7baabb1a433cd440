"""From the float student to its int8 model, with everything that is measured on the way."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

import onnx
from msgspec.structs import asdict, replace

from metis.backend import SCHEMES, open_backend
from pipeline.calibration.int8_loss import compare_int8
from pipeline.calibration.recipe import ObservedStudent, QuantizationRecipe, emulate_int8
from pipeline.calibration.samples import choose_samples, write_samples
from pipeline.calibration.schemes import quantize_best
from pipeline.calibration.study import (
    COMPARED,
    WORST,
    compare_variants,
    rank_layers,
    suggest_changes,
)
from pipeline.data.dataset import StudentData
from pipeline.facts import CalibrateFacts

if TYPE_CHECKING:
    from pathlib import Path

    from metis.backend import QuantizedModel
    from pipeline.facts import CalibrationSetFacts, ComparisonFacts, LayerFacts, SchemeFacts
    from pipeline.params.calibrate import CalibrateParams
    from pipeline.run.stage import Job


def quantize_student(job: Job, params: CalibrateParams) -> CalibrateFacts:
    """Write calibration set, baked student and int8 model; compare them with the float student.

    Raises:
        InputError: too few patches to calibrate, or ranges that do not fit the student.
        BackendError: the backend refuses the student.
    """
    data = StudentData(job.inputs)
    calibration = _write_calibration_set(job, params, data)
    samples = job.outputs.calibration_set / "samples.npy"
    recipe = QuantizationRecipe.of(params, job.sources.get("ranges_file"))
    with job.progress("watch activations", calibration.samples) as bar:
        observed = ObservedStudent.observe(job.inputs.student, samples, recipe, bar.update)
    onnx.save(observed.bake_weights(recipe, observed.ranges(recipe)), job.outputs.baked_student)
    int8 = _quantize(job, params, observed, recipe, data)
    recipe = recipe.under(int8.model.scheme)  # of several that were tried
    observed.ranges(recipe).save(job.outputs.ranges)
    baked, variants = compare_variants(data, observed, recipe, job.inputs.student, job.outputs)
    facts = CalibrateFacts(
        calibration=calibration,
        backend=int8.model.backend,
        backend_version=int8.model.version,
        scheme=int8.model.scheme,
        schemes=int8.schemes,
        arithmetic=int8.arithmetic,
        **asdict(int8.comparison),
        emulator=int8.emulator,
        baked=baked,
        host_operators=tuple(observed.parts.host_operators),
        variants=variants,
        worst_layers=_worst_layers(job, params, observed, recipe, data),
        suggestions=(),
    )
    operators = {node.op_type for node in observed.parts.core.graph.node}
    advice = suggest_changes(facts, recipe, operators)
    for line in advice:
        job.warn(line)
    return replace(facts, suggestions=tuple(advice))


def _write_calibration_set(
    job: Job, params: CalibrateParams, data: StudentData
) -> CalibrationSetFacts:
    unfit = json.loads(job.inputs.unfit.read_text())
    choice = choose_samples(data.train, params.samples, data.classes, job.seed, unfit)
    for line in choice.warnings():
        job.warn(line)
    folder = job.outputs.calibration_set
    folder.mkdir()
    facts = write_samples(folder / "samples.npy", data, choice)
    document = {
        "split": facts.split,
        "samples": facts.samples,
        "classes": facts.classes,
        "left_out": facts.left_out,
        "rows": data.train.rows[choice.indices].tolist(),
        "sha256": facts.sha256,
    }
    (folder / "samples.json").write_text(json.dumps(document) + "\n")
    return facts


@dataclass(frozen=True)
class _Int8:
    """The int8 model that was kept, and what was measured of it."""

    model: QuantizedModel
    comparison: ComparisonFacts
    schemes: tuple[SchemeFacts, ...]
    arithmetic: str
    emulator: ComparisonFacts | None  # beside the SDK's own


def _quantize(
    job: Job,
    params: CalibrateParams,
    observed: ObservedStudent,
    recipe: QuantizationRecipe,
    data: StudentData,
) -> _Int8:
    """The backend's int8 model; with the SDK, the emulator's figures beside the SDK's own."""
    backend = open_backend(str(params.backend), params.sdk)
    student = job.inputs.student

    def write_model(scheme: str, folder: Path) -> QuantizedModel:
        observed.ranges(recipe.under(scheme)).save(job.outputs.ranges)
        with job.progress(f"{scheme} with {backend.name}", params.samples) as bar:
            return backend.quantize(
                job.outputs.baked_student,
                job.outputs.calibration_set / "samples.npy",
                folder,
                scheme=scheme,
                progress=bar.update,
                ranges=job.outputs.ranges,
            )

    model, comparison, schemes = quantize_best(
        write_model,
        lambda model: compare_int8(student, model, data, data.val, params.sdk),
        list(SCHEMES) if params.try_schemes else [params.scheme],
        job.outputs.quantized_model,
    )
    if backend.emulates:
        return _Int8(model, comparison, schemes, backend.arithmetic(model.scheme), None)
    observed.ranges(recipe.under(model.scheme)).save(job.outputs.ranges)
    with emulate_int8(job.outputs.baked_student, job.outputs.ranges, model.scheme) as emulation:
        emulator = compare_int8(student, emulation, data, data.val)
    return _Int8(model, comparison, schemes, backend.arithmetic(model.scheme), emulator)


def _worst_layers(
    job: Job,
    params: CalibrateParams,
    observed: ObservedStudent,
    recipe: QuantizationRecipe,
    data: StudentData,
) -> tuple[LayerFacts, ...] | None:
    """Layers that alone lose most, on `sensitivity` patches; None where nobody asks."""
    if not params.sensitivity:
        return None
    split = data.val.spread(COMPARED).spread(params.sensitivity)
    ranges = observed.ranges(recipe)
    with job.progress("layers one by one", observed.layers) as bar:
        layers = rank_layers(
            data, split, job.outputs.baked_student, ranges, recipe.scheme, bar.update
        )
    return tuple(layers[:WORST])
