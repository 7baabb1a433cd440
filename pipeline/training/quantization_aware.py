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

from metis.quantize.folding import prepare
from metis.quantize.placement import open_observations
from metis.quantize.ranges import choose
from pipeline.calibration.int8_loss import int8_loss_facts
from pipeline.calibration.recipe import ObservedStudent, QuantizationRecipe
from pipeline.facts import Int8LossFacts
from pipeline.networks.inference import reference_network
from pipeline.params.distill import float_phase

if TYPE_CHECKING:
    from pipeline.networks.inference import Network
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
        rows = random.permutation(len(train))[:SAMPLES]
        samples = job.data.tensors(train, np.sort(rows))
        start = QatStart(student, scratch / "samples.npy", scratch / "ranges.json", len(samples))
        np.save(start.samples, samples[:, None])
        observer = open_observations(parts)
        observer.add(samples, lambda count: None)
        choose(observer, "mse").save(start.ranges)
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
        data, int8 = job.data, default_int8_network(student, self.samples)
        return int8_loss_facts(data.compare(data.val, reference_network(student), int8))


def default_int8_network(student: Path, samples: Path) -> Network:
    """A float student in int8, calibrated as `kdpipe run --stage calibrate` does it by default.

    Args:
        student: ONNX.
        samples: .npy, float32, (N, 1, C, H, W).
    """
    recipe = QuantizationRecipe(_SCHEME)
    return ObservedStudent.observe(student, samples, recipe).int8_network(recipe)
