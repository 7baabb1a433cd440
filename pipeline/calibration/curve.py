"""What int8 keeps of a run's student, by number of calibration samples: `kdpipe curve`."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from pipeline.calibration.int8_loss import int8_facts
from pipeline.calibration.recipe import ObservedStudent, QuantizationRecipe
from pipeline.calibration.samples import choose_samples
from pipeline.calibration.study import COMPARED
from pipeline.data.dataset import StudentData
from pipeline.networks.inference import reference_network
from pipeline.run.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator

    from pipeline.facts import Int8Facts
    from pipeline.run.state import RunState


#: Tensors made at a time.
_BLOCK = 64


def int8_curve(state: RunState, sizes: Collection[int]) -> Iterator[tuple[int, Int8Facts]]:
    """What int8 keeps with the first 16, 64, 256 ... samples, in one pass over the largest number.

    Args:
        state: of the run; its section `calibrate` says how to quantize.
        sizes: numbers of samples.

    Yields:
        Per size, ascending: itself, and the figures.

    Raises:
        InputError: there is no student that is up to date, the training split has fewer different
            patches than the largest size, or a file gives the ranges.
        ManifestError: an artifact was changed.
    """
    params = state.config.params["calibrate"]
    if params.ranges_file:
        raise InputError(
            "calibrate.ranges_file has the range of every tensor, whatever the number of samples; "
            "for the curve leave it out: --set calibrate.ranges_file=null"
        )
    state.require_inputs("calibrate")
    paths = state.paths
    data = StudentData(paths)
    unfit = json.loads(paths.unfit.read_text())
    rows = choose_samples(
        data.train, max(sizes), data.classes, state.config.seed, unfit, "--sizes"
    ).indices
    val, reference = data.val.spread(COMPARED), reference_network(paths.student)
    recipe = QuantizationRecipe.of(params)
    observed, done = ObservedStudent.fold(paths.student, recipe), 0
    for size in sorted(set(sizes)):
        for start in range(done, size, _BLOCK):
            block = rows[start : min(start + _BLOCK, size)]
            observed.observations.add(data.tensors(data.train, block), lambda n: None)
        done = size
        comparison = data.compare(val, reference, observed.int8_network(recipe))
        yield size, int8_facts(comparison)
