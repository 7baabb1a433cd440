"""DIST: relations among classes and among patches."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch.nn import functional as F  # noqa: N812 - the name everybody knows it by

from pipeline.training.losses.softening import EPSILON, soften

if TYPE_CHECKING:
    from torch import Tensor


def dist_loss(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor,
    *,
    temperature: float,
    standardize: bool = False,
    inter_weight: float = 1.0,
    intra_weight: float = 1.0,
) -> Tensor:
    """DIST: 1 - Pearson correlation of predictions, over the classes and over the batch.

    T^2 * (inter_weight * (1 - correlation of rows) + intra_weight * (1 - correlation of columns)).
    See `SoftLossFunction`; labels don't count.

    Args:
        student: logits, (N, classes).
        teacher: logits, (N, classes).
        labels: not looked at.
        temperature: divides both logits; above 0.
        standardize: see `standardize_logits`.
        inter_weight: the paper's beta: rows, the relation among the classes of a patch.
        intra_weight: the paper's gamma: columns, the relation among the patches of a class; a batch
            of one has none.

    Source:
        Huang, You, Wang, Qian, Xu 2022, Knowledge Distillation from A Stronger Teacher,
        section 3. T^2 comes from the authors' code. A correlation does not shrink with
        1/T, so unlike those of `kl_loss` its gradients grow with T^2.
    """
    student, teacher = soften(student, teacher, temperature, standardize)
    p, q = student.softmax(dim=1), teacher.softmax(dim=1)
    loss = inter_weight * (1 - _correlation(p, q)).mean()
    if len(p) > 1:
        loss = loss + intra_weight * (1 - _correlation(p.t(), q.t())).mean()
    return temperature**2 * loss


def _correlation(p: Tensor, q: Tensor) -> Tensor:
    """Pearson correlation of the rows of two matrices; 0 where one is constant to within 1e-7."""
    p, q = (x - x.mean(dim=1, keepdim=True) for x in (p, q))
    return F.cosine_similarity(p, q, dim=1, eps=EPSILON)
