"""Quantize with several schemes and keep the one that loses least."""

from __future__ import annotations

import logging
import math
import shutil
from typing import TYPE_CHECKING

from metis.backend import BackendError, BackendMissingError, QuantizedModel
from pipeline.facts import ComparisonFacts, SchemeFacts

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path


log = logging.getLogger("kdpipe")


def quantize_best(
    quantize: Callable[[str, Path], QuantizedModel],
    measure: Callable[[QuantizedModel], ComparisonFacts],
    schemes: Sequence[str],
    target: Path,
) -> tuple[QuantizedModel, ComparisonFacts, tuple[SchemeFacts, ...]]:
    """The model of the scheme with the best score; of equal ones, that with the best SQNR.

    Args:
        quantize: (scheme, folder to make) -> model.
        measure: figures of a model.
        schemes: to try, in this order.
        target: folder that gets the best model.

    Returns:
        The model, its figures, and a row per scheme: figures, or why it was refused.

    Raises:
        BackendError: every scheme was refused; the words are of the first.
    """
    figures: dict[str, ComparisonFacts] = {}
    refused: dict[str, BackendError] = {}
    for scheme in schemes:
        folder = target.with_name(f"{target.name}.{scheme}")
        try:
            figures[scheme] = measure(quantize(scheme, folder))
        except BackendMissingError:
            raise
        except BackendError as error:
            log.warning("scheme %s: %s", scheme, error)
            refused[scheme] = error
    if not figures:
        raise next(iter(refused.values()))
    best = max(figures, key=lambda scheme: _quality(figures[scheme]))
    target.with_name(f"{target.name}.{best}").rename(target)
    for scheme in schemes:
        shutil.rmtree(target.with_name(f"{target.name}.{scheme}"), ignore_errors=True)
    rows = (
        _row(scheme, figures[scheme], is_best=scheme == best)
        if scheme in figures
        else SchemeFacts(scheme=scheme, refused=str(refused[scheme]), chosen=False)
        for scheme in schemes
    )
    return QuantizedModel.load(target), figures[best], tuple(rows)


def _row(scheme: str, figures: ComparisonFacts, *, is_best: bool) -> SchemeFacts:
    return SchemeFacts(
        scheme=scheme,
        score=figures.score_int8,
        int8_loss_points=figures.int8_loss_points,
        agreement=figures.agreement,
        logits_sqnr_db=figures.logits_sqnr_db,
        chosen=is_best,
    )


def _quality(figures: ComparisonFacts) -> tuple[float, float]:
    sqnr = figures.logits_sqnr_db
    return figures.score_int8, math.inf if sqnr is None else sqnr  # None: no noise at all
