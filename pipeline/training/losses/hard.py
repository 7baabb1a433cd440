"""Cross-entropy with the labels."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.nn import functional as F  # noqa: N812 - the name everybody knows it by

from pipeline.params.sources import UNLABELED
from pipeline.training.losses.softening import at_least_float32

if TYPE_CHECKING:
    from torch import Tensor


def hard_loss(
    logits: Tensor,
    labels: Tensor,
    *,
    label_smoothing: float = 0.0,
    class_weights: Tensor | None = None,
) -> Tensor:
    """Cross-entropy in nats, the mean over everything that has a label.

    Args:
        logits: (N, classes, ...).
        labels: class indices, int64, (N, ...); what is UNLABELED contributes nothing.
        label_smoothing: share of the target that is spread over all classes.
        class_weights: float32, (classes,); the mean is weighted by them.

    Returns:
        A scalar; 0, with gradients of 0, where nothing has a label.
    """
    labeled = labels != UNLABELED
    total = F.cross_entropy(
        at_least_float32(logits),
        labels,
        weight=class_weights,
        ignore_index=UNLABELED,
        reduction="sum",
        label_smoothing=label_smoothing,
    )
    if class_weights is None:
        weight = labeled.sum()
    else:
        weight = class_weights[labels.clamp(min=0)].where(labeled, 0.0).sum()
    # torch's own mean over nothing is not a number.
    return total / weight.where(weight > 0, 1)


def label_log_probabilities(logits: Tensor, labels: Tensor) -> Tensor:
    """Logarithm of what the labels get: logits (N, classes, ...), labels (N, ...), to (N, ...)."""
    return F.log_softmax(logits, dim=1).gather(1, labels.unsqueeze(1)).squeeze(1)


def mean_loss(log_probabilities: Tensor) -> Tensor:
    """`hard_loss` without options, of a split whose blocks gave `label_log_probabilities`."""
    first = torch.zeros(log_probabilities.shape, dtype=torch.int64)
    total = F.nll_loss(log_probabilities.unsqueeze(1), first, reduction="sum")
    return total / log_probabilities.numel()
