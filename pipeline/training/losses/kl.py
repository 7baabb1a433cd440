"""Distillation as it was first described: the divergence of softened distributions."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch.nn import functional as F  # noqa: N812 - the name everybody knows it by

from pipeline.training.losses.softening import soften

if TYPE_CHECKING:
    from torch import Tensor


def kl_loss(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor,
    *,
    temperature: float,
    standardize: bool = False,
) -> Tensor:
    """T^2 * KL(teacher || student) of the softened distributions, the mean over all rows in nats.

    Deep mutual learning is this loss both ways: whoever comes second teaches. See
    `SoftLossFunction`; labels don't count, and logits may be (N, classes, ...).

    Source:
        Hinton, Vinyals, Dean 2015, section 2. Gradients of the soft targets shrink with 1/T^2; the
        factor keeps the weights of the two losses comparable at any T.
    """
    student, teacher = soften(student, teacher, temperature, standardize)
    divergence = F.kl_div(
        F.log_softmax(student, dim=1),
        F.log_softmax(teacher, dim=1),
        reduction="none",
        log_target=True,
    )
    return temperature**2 * divergence.sum(dim=1).mean()
