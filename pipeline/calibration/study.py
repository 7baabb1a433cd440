"""What else could be done to an int8 student: other recipes, single layers, advice."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnx
from msgspec import structs

from metis.backend import SCHEMES
from metis.emulator.execute import run_graphs
from metis.emulator.kernels import arithmetic
from metis.quantize.folding import SplitGraph, prepare
from metis.quantize.placement import compute_nodes, place
from metis.quantize.qdq import quantize_graph
from pipeline.calibration.int8_loss import int8_facts
from pipeline.calibration.recipe import ObservedStudent, QuantizationRecipe
from pipeline.facts import CalibrateFacts, Int8Facts, LayerFacts, VariantFacts
from pipeline.networks.inference import reference_network

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from metis.quantize.ranges import Ranges
    from pipeline.artifacts import Artifacts
    from pipeline.data.dataset import DatasetSplit, StudentData
    from pipeline.networks.inference import Network


#: Validation patches, evenly spaced, on which ways to quantize are compared.
COMPARED = 1000

#: Layers that the report names.
WORST = 10

#: Below this many samples the observed extremes are a matter of luck.
_FEW_SAMPLES = 100

#: Channel ranges of depthwise inputs need more varied samples than tensor ranges do.
_HYBRID_SAMPLES = 300

#: Points of the score from which a loss, or a gain, is worth a word.
_WORTH = 0.5

#: A layer that alone keeps less than this, in dB, is worth a word.
_LOUD_DB = 25.0


def compare_variants(
    data: StudentData,
    observed: ObservedStudent,
    recipe: QuantizationRecipe,
    student: Path,
    outputs: Artifacts,
) -> tuple[Int8Facts, tuple[VariantFacts, ...]]:
    """The recipe, the same under the other schemes, and the same without each of its options.

    Args:
        data: of the run.
        observed: with the recipe.
        recipe: as it is used.
        student: the float student.
        outputs: by this stage so far: the calibration set, and the baked student.

    Returns:
        The baked student in float (weights and biases alone, what the vendor's compiler starts
        from); and the variants, the recipe itself first. What an option gains is the first row less
        its row.
    """
    variants = _variants(recipe)
    networks: dict[str, Network] = {}
    for name, variant in variants.items():
        source = observed
        if recipe.equalization and not variant.equalization:
            samples = outputs.calibration_set / "samples.npy"
            source = ObservedStudent.observe(student, samples, variant)
        networks[name] = source.int8_network(variant)
    networks[""] = reference_network(outputs.baked_student)
    val, reference = data.val.spread(COMPARED), reference_network(student)
    facts = {
        name: int8_facts(comparison)
        for name, comparison in data.compare_all(val, reference, networks).items()
    }
    baked = structs.replace(facts.pop(""), measured_on="host-float")
    return baked, tuple(
        VariantFacts(name, variants[name].scheme, *structs.astuple(row))
        for name, row in facts.items()
    )


def _variants(recipe: QuantizationRecipe) -> dict[str, QuantizationRecipe]:
    variants = {"as configured": recipe}
    for scheme in SCHEMES:
        if scheme != recipe.scheme:
            variants[f"scheme {scheme}"] = recipe.under(scheme)
    if recipe.bias_correction:
        variants["without bias correction"] = replace(recipe, bias_correction=False)
    if recipe.weight_clipping:
        variants["without weight clipping"] = replace(recipe, weight_clipping=False)
    if recipe.equalization:
        variants["without equalization"] = replace(recipe, equalization=False, ranges=None)
    return variants


def rank_layers(
    data: StudentData,
    split: DatasetSplit,
    student: Path,
    ranges: Ranges,
    scheme: str,
    progress: Callable[[int], object] = lambda n: None,
) -> list[LayerFacts]:
    """Every layer with weights, when it alone is int8, the one that loses most first.

    Args:
        data: of the run.
        split: a few patches, whose tensors and logits fit in memory.
        student: the float student.
        ranges: of its tensors.
        scheme: as in `quantize_graph`.
        progress: called with 1 per layer.
    """
    parts = prepare(onnx.load(student))
    options = arithmetic(scheme)[1]
    depthwise = place(parts.core).depthwise
    frames = data.tensors(split)
    run = partial(_run, parts, frames)
    reference = run(parts.core, {})
    rows = []
    for node in compute_nodes(parts.core):
        graph = quantize_graph(parts.core, ranges, scheme=scheme, int8_nodes={node.output[0]})
        comparison = data.task.comparison(len(split))
        comparison.add(reference, run(graph, options), split.labels)
        rows.append(
            LayerFacts(
                layer=node.output[0],
                operator=node.op_type,
                **structs.asdict(int8_facts(comparison)),
                depthwise=node.input[0] in depthwise,
            )
        )
        progress(1)
    return sorted(rows, key=lambda row: np.inf if row.sqnr_db is None else row.sqnr_db)


def _run(
    parts: SplitGraph,
    frames: NDArray[np.float32],
    core: onnx.ModelProto,
    options: Mapping[str, str],
) -> NDArray[np.float32]:
    return run_graphs([(parts.preamble, {}), (core, options), (parts.postamble, {})], frames)


def suggest_changes(
    facts: CalibrateFacts, recipe: QuantizationRecipe, operators: Collection[str]
) -> list[str]:
    """What a user could try, in words; empty where nothing speaks for a change.

    Args:
        facts: of calibrate; its own suggestions do not count.
        recipe: as it is used.
        operators: kinds of the nodes of the student.
    """
    advice = []
    used, *variants = facts.variants
    samples = facts.calibration.samples
    best = max(variants, key=lambda row: row.score)
    gain = 100 * (best.score - used.score)
    if gain > _WORTH and best.name.startswith("scheme"):
        advice.append(f"calibrate.scheme: {best.scheme} keeps {gain:.2f} points more on validation")
    if samples < _FEW_SAMPLES:
        advice.append(f"calibrate.samples: {samples} are few; 100 to 400 are usual")
    if recipe.scheme.startswith("hybrid") and samples < _HYBRID_SAMPLES:
        advice.append(
            f"hybrid with {samples} samples: channels that never fire in calibration clip later; "
            f"use {_HYBRID_SAMPLES} varied patches or a per_tensor scheme"
        )
    loss = facts.int8_loss_points
    if loss > _WORTH:
        if "HardSwish" in operators:
            advice.append("HardSwish is hard on int8: a student with ReLU6 (or ReLU) loses less")
        depthwise = [row for row in facts.worst_layers or () if row.depthwise]
        loud = [r for r in depthwise if r.sqnr_db is not None and r.sqnr_db < _LOUD_DB]
        if loud and not recipe.scheme.startswith("hybrid"):
            advice.append(
                f"{len(loud)} of the worst layers are depthwise ({loud[0].layer}): try "
                "calibrate.scheme: hybrid_per_tensor_per_channel"
            )
        advice.append("distill.quantization_aware trains the student on the int8 grid")
    return advice
