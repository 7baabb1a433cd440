"""The last part of a training on the int8 grid: from the float student on, folded, same teacher.

The student is folded as the chip's quantizer folds it, the ranges of its activations are chosen as
calibration chooses them, and training goes on with everything rounded to that grid. What comes out
is a float student again: the same graph with other weights.

The ranges stay as they were chosen: calibration chooses them anew for the trained weights, by the
same rule, so ranges that were learned here would be lost, and with them what they gained.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import numpy as np
import onnx
from msgspec.structs import asdict

from metis.emulator.execute import int8_logits
from metis.quantize.folding import prepare
from metis.quantize.placement import watch
from metis.quantize.qdq import quantized_graph
from metis.quantize.ranges import choose
from pipeline.calibration.recipe import Recipe, watched
from pipeline.calibration.study import figures
from pipeline.facts import Int8LossFacts
from pipeline.networks.inference import reference_logits
from pipeline.params.distill import float_phase
from pipeline.tasks.metrics import paired_difference

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from pipeline.params.distill import DistillParams
    from pipeline.training.job import TrainingJob


#: Training patches that the ranges are chosen on.
SAMPLES = 256

_SCHEME = "per_tensor_histogram"


def grid_phase(params: DistillParams) -> DistillParams:
    """The training on the grid: same losses, Adam and a cosine from its own learning rate to 0."""
    end = params.temperature if params.temperature_end is None else params.temperature_end
    return msgspec.structs.replace(
        params,
        epochs=params.epochs - float_phase(params).epochs,
        optimizer="adamw",
        learning_rate=params.quantization_aware.learning_rate,
        # Folded weights have no BatchNorm behind them that would undo what decay takes away.
        weight_decay=0.0,
        schedule="cosine",
        warmup_epochs=0.0,
        temperature=end,
        temperature_end=None,
        early_stop_patience=None,
        precision="32",  # bfloat16 has no more digits than the grid has
    )


@dataclass(frozen=True)
class QatStart:
    """Where the last part begins, as files, so that other processes find it."""

    folded: Path  # the float student, folded: ONNX, batch 1
    samples: Path  # .npy, float32, (N, 1, C, H, W)
    ranges: Path  # of its activations
    count: int  # of the samples

    @staticmethod
    def write(job: TrainingJob, student: Path, scratch: Path) -> QatStart:
        """Fold an exported student and choose the ranges of its activations.

        Args:
            job: the float part.
            student: ONNX; is replaced by the folded graph.
            scratch: an existing folder for the rest.

        Raises:
            BackendError: the chip can't run the student.
        """
        parts = prepare(onnx.load(student))
        onnx.save(parts.student, student)
        train = job.data.train
        random = np.random.default_rng(job.seed)
        chosen = random.permutation(len(train))[:SAMPLES]
        samples = job.data.tensors(train, np.sort(chosen))
        start = QatStart(student, scratch / "samples.npy", scratch / "ranges.json", len(samples))
        np.save(start.samples, samples[:, None])
        seen = watch(parts)
        seen.add(samples, lambda count: None)
        choose(seen, "mse").save(start.ranges)
        return start

    def job(
        self, float_job: TrainingJob, params: DistillParams, name: str, *, on_grid: bool
    ) -> TrainingJob:
        """The training that goes on from here; without the grid it is the control.

        Args:
            float_job: the float part.
            params: of the whole training.
            name: of its folders, beside those of the float part.
            on_grid: whether to round to int8.
        """
        return replace(
            float_job,
            params=grid_phase(params),
            init=None,
            folded=str(self.folded),
            ranges=str(self.ranges) if on_grid else None,
            first_epoch=float_job.params.epochs,
            folder=str(Path(float_job.folder).with_name(name)),
            logs=str(Path(float_job.logs).with_name(name)),
        )

    def int8_facts(self, job: TrainingJob, student: Path) -> Int8LossFacts:
        """What int8 costs a student on the validation split, in the emulator.

        Args:
            job: any of its trainings.
            student: ONNX.
        """
        val = job.data.val
        frames = job.data.tensors(val)
        exact = reference_logits(student, frames)
        int8 = emulated_logits(student, self.samples, frames)
        loss, interval = paired_difference(
            exact.argmax(axis=1) == val.labels, int8.argmax(axis=1) == val.labels
        )
        return Int8LossFacts(
            **asdict(figures(exact, int8, val.labels)),
            loss_points=100 * loss,
            loss_interval95_points=(100 * interval[0], 100 * interval[1]),
        )


def emulated_logits(
    student: Path, samples: Path, frames: NDArray[np.float32]
) -> NDArray[np.float32]:
    """What a float student says in int8, calibrated as `kdpipe calibrate` does it by default.

    Args:
        student: ONNX.
        samples: .npy, float32, (N, 1, C, H, W).
        frames: float32, (N, C, H, W).
    """
    recipe = Recipe(_SCHEME)
    calibrated = watched(student, samples, recipe, lambda count: None)
    ranges = calibrated.ranges(recipe)
    parts = prepare(calibrated.baked(recipe, ranges))
    graph = quantized_graph(parts.core, ranges, scheme=_SCHEME)
    return int8_logits(parts, graph, _SCHEME, frames)
