"""What int8 keeps of a run's student, by number of calibration samples: `kdpipe curve`."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from pipeline.calibration import study
from pipeline.calibration.recipe import recipe_of
from pipeline.calibration.samples import choose_samples
from pipeline.data.dataset import StudentData
from pipeline.networks.inference import reference_logits
from pipeline.run.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator

    from pipeline.run.state import RunState


def int8_curve(state: RunState, sizes: Collection[int]) -> Iterator[dict[str, Any]]:
    """The figures of `pipeline.calibration.study.curve`, for the student of a run.

    Args:
        state: of the run; its section `calibrate` says how to quantize.
        sizes: numbers of samples.

    Yields:
        Per size, ascending: samples, top1, agreement, sqnr_db, n, measured_on.

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
    indices = choose_samples(
        data.train, max(sizes), data.classes, state.config.seed, unfit, "--sizes"
    ).indices
    val = data.val.spread(study.COMPARED)
    frames = data.tensors(val)
    exact = reference_logits(paths.student, frames)
    yield from study.curve(
        paths.student,
        lambda part: data.tensors(data.train, indices[part]),
        sizes,
        recipe_of(params),
        (frames, exact, val.labels),
        lambda n: None,
    )
