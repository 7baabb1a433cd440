"""What int8 costs: figures, curves, sensitivity, suggestions."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from msgspec.structs import asdict, astuple

from metis.backend import SCHEMES
from metis.emulator.execute import int8_logits, run_graphs
from metis.emulator.kernels import arithmetic
from metis.quantize.folding import SplitGraph, prepare
from metis.quantize.placement import compute_nodes, place, watch
from metis.quantize.qdq import quantized_graph
from metis.quantize.ranges import Ranges
from pipeline.calibration.recipe import Calibrated, Recipe, prepare_student, watched
from pipeline.facts import CalibrateFacts, Int8Facts, LayerFacts, VariantFacts
from pipeline.tasks.metrics import agreement, sqnr_db, top1

if TYPE_CHECKING:
    from numpy.typing import NDArray


#: Validation patches, evenly spaced, on which ways to quantize are compared.
COMPARED = 1000

#: Tensors made at a time.
_BLOCK = 64

#: Layers that the report names.
WORST = 10

#: Below this many samples the observed extremes are a matter of luck.
_FEW_SAMPLES = 100

#: Channel ranges of depthwise inputs need more varied samples than tensor ranges do.
_HYBRID_SAMPLES = 300

#: Points of top-1 from which a loss, or a gain, is worth a word.
_WORTH = 0.5

#: A layer that alone keeps less than this, in dB, is worth a word.
_LOUD_DB = 25.0


def figures(
    exact: NDArray[np.float32], int8: NDArray[np.float32], labels: NDArray[np.int64]
) -> Int8Facts:
    """What a row of a table says about int8 logits beside the float ones."""
    return Int8Facts(
        top1=top1(int8, labels),
        agreement=agreement(exact, int8),
        sqnr_db=sqnr_db(exact, int8),
        n=len(labels),
        measured_on="host-emulation",
    )


def variants(
    calibrated: Calibrated,
    recipe: Recipe,
    student: Path,
    samples: Path,
    validation: tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.int64]],
) -> tuple[VariantFacts, ...]:
    """The recipe, the same under the other schemes, and the same without each of its options.

    Args:
        calibrated: of the recipe.
        recipe: as it is used.
        student: the float student, to watch it once more where the recipe equalizes.
        samples: the calibration set.
        validation: tensors, float32 (N, C, H, W), the float student's logits, and labels.

    Returns:
        Per variant its name and its figures. What an option gains is the first row less its row.
    """
    frames, exact, labels = validation
    tried = {"as configured": recipe}
    for scheme in SCHEMES:
        if scheme != recipe.scheme:
            tried[f"scheme {scheme}"] = recipe.under(scheme)
    if recipe.bias_correction:
        tried["without bias correction"] = replace(recipe, bias_correction=False)
    if recipe.weight_clipping:
        tried["without weight clipping"] = replace(recipe, weight_clipping=False)
    if recipe.equalization:
        tried["without equalization"] = replace(recipe, equalization=False, given=None)
    rows = []
    for name, how in tried.items():
        source = calibrated
        if recipe.equalization and not how.equalization:
            source = watched(student, samples, how, lambda n: None)
        ranges = source.ranges(how)
        parts = prepare(source.baked(how, ranges))
        graph = quantized_graph(parts.core, ranges, scheme=how.scheme)
        int8 = int8_logits(parts, graph, how.scheme, frames)
        rows.append(VariantFacts(name, how.scheme, *astuple(figures(exact, int8, labels))))
    return tuple(rows)


def curve(
    student: Path,
    samples: Callable[[slice], NDArray[np.float32]],
    sizes: Collection[int],
    recipe: Recipe,
    validation: tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.int64]],
    progress: Callable[[int], object] = lambda n: None,
) -> Iterator[dict[str, Any]]:
    """What int8 keeps with the first 16, 64, 256 ... samples, in one pass over the largest number.

    Args:
        student: float ONNX.
        samples: makes some of them, float32 (N, C, H, W), in a random order.
        sizes: numbers of them.
        recipe: as it is used.
        validation: tensors, float32 (N, C, H, W), the float student's logits, and labels.
        progress: called with the number of samples just done.

    Yields:
        Per size, ascending: samples, and the figures.
    """
    frames, exact, labels = validation
    parts, pairs = prepare_student(student, recipe)
    seen, done = watch(parts), 0
    for size in sorted(set(sizes)):
        for start in range(done, size, _BLOCK):
            seen.add(samples(slice(start, min(start + _BLOCK, size))), progress)
        done = size
        calibrated = Calibrated(parts, seen, pairs)
        ranges = calibrated.ranges(recipe)
        made = prepare(calibrated.baked(recipe, ranges))
        graph = quantized_graph(made.core, ranges, scheme=recipe.scheme)
        int8 = int8_logits(made, graph, recipe.scheme, frames)
        yield {"samples": size, **asdict(figures(exact, int8, labels))}


def sensitivity(
    student: Path,
    ranges: Ranges,
    scheme: str,
    frames: NDArray[np.float32],
    labels: NDArray[np.int64],
    progress: Callable[[int], object] = lambda n: None,
) -> list[LayerFacts]:
    """Every layer with weights, when it alone is int8, the one that loses most first.

    Args:
        student: the float student.
        ranges: of its tensors.
        scheme: as in `quantized_graph`.
        frames: float32 (N, C, H, W).
        labels: their classes.
        progress: called with 1 per layer.

    Returns:
        Per layer: name of its tensor, operator, SQNR of the logits in dB, top-1, agreement.
    """
    parts = prepare(onnx.load(student))
    options = arithmetic(scheme)[1]
    exact = _logits(parts, parts.core, {}, frames)
    rows = []
    for node in compute_nodes(parts.core):
        alone = quantized_graph(parts.core, ranges, scheme=scheme, only={node.output[0]})
        found = _logits(parts, alone, options, frames)
        row = LayerFacts(
            layer=node.output[0],
            operator=node.op_type,
            **asdict(figures(exact, found, labels)),
            depthwise=node.input[0] in place(parts.core).depthwise,
        )
        rows.append(row)
        progress(1)
    return sorted(rows, key=lambda row: np.inf if row.sqnr_db is None else row.sqnr_db)


def _logits(
    parts: SplitGraph,
    core: onnx.ModelProto,
    options: Mapping[str, str],
    frames: NDArray[np.float32],
) -> NDArray[np.float32]:
    return run_graphs([(parts.preamble, {}), (core, options), (parts.postamble, {})], frames)


def suggestions(facts: CalibrateFacts, recipe: Recipe, operators: Collection[str]) -> list[str]:
    """What a user could try, in words; empty where nothing speaks for a change.

    Args:
        facts: of calibrate; its own suggestions do not count.
        recipe: as it is used.
        operators: kinds of the nodes of the student.
    """
    words = []
    used, *others = facts.variants
    samples = facts.calibration.samples
    best = max(others, key=lambda row: row.top1)
    gain = 100 * (best.top1 - used.top1)
    if gain > _WORTH and best.name.startswith("scheme"):
        words.append(f"calibrate.scheme: {best.scheme} keeps {gain:.2f} points more on validation")
    if samples < _FEW_SAMPLES:
        words.append(f"calibrate.samples: {samples} are few; 100 to 400 are usual")
    if recipe.scheme.startswith("hybrid") and samples < _HYBRID_SAMPLES:
        words.append(
            f"hybrid with {samples} samples: channels that never fire in calibration clip later; "
            f"use {_HYBRID_SAMPLES} varied patches or a per_tensor scheme"
        )
    loss = facts.int8_loss_points
    if loss > _WORTH:
        if "HardSwish" in operators:
            words.append("HardSwish is hard on int8: a student with ReLU6 (or ReLU) loses less")
        depthwise = [row for row in facts.worst_layers or () if row.depthwise]
        loud = [r for r in depthwise if r.sqnr_db is not None and r.sqnr_db < _LOUD_DB]
        if loud and not recipe.scheme.startswith("hybrid"):
            words.append(
                f"{len(loud)} of the worst layers are depthwise ({loud[0].layer}): try "
                "calibrate.scheme: hybrid_per_tensor_per_channel"
            )
        words.append("distill.quantization_aware trains the student on the int8 grid")
    return words
