"""Quantize with several schemes and keep the one that loses least."""

from __future__ import annotations

import logging
import math
import shutil
from typing import TYPE_CHECKING, Any

from metis.backend import BackendError, BackendMissingError, QuantizedModel

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path


#: What the table of schemes says of each.
COLUMNS = ("top1_val_int8", "int8_loss_points", "top1_agreement", "logits_sqnr_db")

log = logging.getLogger("kdpipe")


def quantize_best(
    quantize: Callable[[str, Path], QuantizedModel],
    measure: Callable[[QuantizedModel], dict[str, Any]],
    schemes: Sequence[str],
    into: Path,
) -> tuple[QuantizedModel, dict[str, Any], list[dict[str, Any]]]:
    """The model of the scheme with the best top-1; of equal ones, that with the best SQNR.

    Args:
        quantize: (scheme, folder to make) -> model.
        measure: figures of a model, `COLUMNS` among them.
        schemes: to try, in this order.
        into: folder that gets the best model.

    Returns:
        The model, its figures, and a row per scheme: figures, or why it was refused.

    Raises:
        BackendError: every scheme was refused; the words are of the first.
    """
    rows: list[dict[str, Any]] = []
    made: dict[str, dict[str, Any]] = {}
    refused: list[BackendError] = []
    for scheme in schemes:
        folder = into.with_name(f"{into.name}.{scheme}")
        try:
            figures = measure(quantize(scheme, folder))
        except BackendMissingError:
            raise
        except BackendError as error:
            log.warning("scheme %s: %s", scheme, error)
            refused.append(error)
            rows.append({"scheme": scheme, "refused": str(error)})
            continue
        made[scheme] = figures
        rows.append({"scheme": scheme, **{name: figures[name] for name in COLUMNS}})
    if not made:
        raise refused[0]
    best = max(made, key=lambda scheme: _quality(made[scheme]))
    into.with_name(f"{into.name}.{best}").rename(into)
    for scheme in schemes:
        shutil.rmtree(into.with_name(f"{into.name}.{scheme}"), ignore_errors=True)
    for row in rows:
        row["chosen"] = row["scheme"] == best
    return QuantizedModel.load(into), made[best], rows


def _quality(figures: dict[str, Any]) -> tuple[float, float]:
    noise: float | None = figures["logits_sqnr_db"]
    return figures["top1_val_int8"], math.inf if noise is None else noise  # None: no noise at all
