"""The leg of parity from float to int8, on logits."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from metis.backend import QuantizedModel, SdkOptions, open_backend
from pipeline.data.dataset import DatasetSplit, StudentData
from pipeline.facts import ComparisonFacts
from pipeline.networks.inference import answers, reference_network
from pipeline.tasks.metrics import (
    agreement,
    cosines,
    paired_difference,
    sqnr_db,
    top1,
)

if TYPE_CHECKING:
    from pathlib import Path


def compare_int8(
    onnx: Path,
    model: QuantizedModel,
    data: StudentData,
    split: DatasetSplit,
    sdk: SdkOptions | None = None,
) -> ComparisonFacts:
    """The float student against its int8 model on the host, on some patches."""
    infer = partial(open_backend(model.backend, sdk).infer, model)
    exact, int8 = answers(split.images, data.student_input, reference_network(onnx), infer)
    loss, interval = paired_difference(
        exact.argmax(axis=1) == split.labels, int8.argmax(axis=1) == split.labels
    )
    angles = cosines(exact, int8)
    low, high = interval
    return ComparisonFacts(
        n_val=len(split.labels),
        top1_val_float=top1(exact, split.labels),
        top1_val_int8=top1(int8, split.labels),
        measured_on="host-emulation",
        top1_agreement=agreement(exact, int8),
        logits_cosine_mean=float(angles.mean()),
        logits_cosine_min=float(angles.min()),
        logits_sqnr_db=sqnr_db(exact, int8),
        int8_loss_points=100 * loss,
        int8_loss_interval95_points=(100 * low, 100 * high),
    )
