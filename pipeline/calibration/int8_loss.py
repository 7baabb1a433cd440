"""The float student against its int8 model: what int8 costs."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from metis.backend import QuantizedModel, SdkOptions, open_backend
from pipeline.facts import ComparisonFacts, Int8Facts, Int8LossFacts
from pipeline.networks.inference import reference_network

if TYPE_CHECKING:
    from pathlib import Path

    from pipeline.data.dataset import DatasetSplit, StudentData
    from preprocessing.scores import Comparison


def compare_int8(
    student: Path,
    model: QuantizedModel,
    data: StudentData,
    split: DatasetSplit,
    sdk: SdkOptions | None = None,
) -> ComparisonFacts:
    """The float student (ONNX) beside its int8 model on the host, on a split."""
    infer = partial(open_backend(model.backend, sdk).infer, model)
    comparison = data.compare(split, reference_network(student), infer)
    loss, cosines = comparison.loss(), comparison.cosines()
    return ComparisonFacts(
        n_val=comparison.n,
        score_float=comparison.reference.score().value,
        score_int8=comparison.network.score().value,
        measured_on="host-emulation",
        agreement=comparison.agreement(),
        logits_cosine_mean=float(cosines.mean()),
        logits_cosine_min=float(cosines.min()),
        logits_sqnr_db=comparison.sqnr_db(),
        int8_loss_points=100 * loss.value,
        int8_loss_interval95_points=(100 * loss.low, 100 * loss.high),
    )


def int8_facts(comparison: Comparison) -> Int8Facts:
    """What a row of a table says of emulated int8 logits beside the float ones."""
    return Int8Facts(
        score=comparison.network.score().value,
        agreement=comparison.agreement(),
        sqnr_db=comparison.sqnr_db(),
        n=comparison.n,
        measured_on="host-emulation",
    )


def int8_loss_facts(comparison: Comparison) -> Int8LossFacts:
    """The same, with the loss and its interval."""
    loss = comparison.loss()
    return Int8LossFacts(
        score=comparison.network.score().value,
        agreement=comparison.agreement(),
        sqnr_db=comparison.sqnr_db(),
        n=comparison.n,
        measured_on="host-emulation",
        loss_points=100 * loss.value,
        loss_interval95_points=(100 * loss.low, 100 * loss.high),
    )
