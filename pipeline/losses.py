"""Distillation losses as plain functions."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch.nn import functional as F  # noqa: N812 - the name everybody knows it by

if TYPE_CHECKING:
    from torch import Tensor


def soft_loss(student: Tensor, teacher: Tensor, *, temperature: float) -> Tensor:
    """T^2 * KL(teacher || student) of the softened distributions.

    Args:
        student: logits, float32, (N, classes).
        teacher: logits, float32, (N, classes); no gradient flows into them.
        temperature: divides both logits; above 0.

    Returns:
        Mean over N in nats, a scalar.

    Source:
        Hinton, Vinyals, Dean 2015, section 2. Gradients of the soft targets shrink with 1/T^2; the
        factor keeps the weights of the two losses comparable at any T.
    """
    divergence = F.kl_div(
        F.log_softmax(student / temperature, dim=1),
        F.log_softmax(teacher.detach() / temperature, dim=1),
        reduction="batchmean",
        log_target=True,
    )
    return temperature**2 * divergence


def hard_loss(student: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of logits (N, classes) and class indices int64 (N,); mean over N in nats."""
    return F.cross_entropy(student, labels)
