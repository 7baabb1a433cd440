"""Distillation losses as plain functions.

Logits are (N, classes), or (N, classes, ...) where every position has a class of its own. They are
computed in float32 or better whatever autocast makes of the network, and no gradient flows into a
teacher.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.nn import functional as F  # noqa: N812 - the name everybody knows it by

from pipeline.params.sources import UNLABELED

if TYPE_CHECKING:
    from torch import Tensor


#: Keeps divisions by a spread finite; the value in the code of the logit standardisation's authors.
_EPSILON = 1e-7


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
    known = labels != UNLABELED
    total = F.cross_entropy(
        _exact(logits),
        labels,
        weight=class_weights,
        ignore_index=UNLABELED,
        reduction="sum",
        label_smoothing=label_smoothing,
    )
    if class_weights is None:
        weight = known.sum()
    else:
        weight = class_weights[labels.clamp(min=0)].where(known, 0.0).sum()
    # torch's own mean over nothing is not a number.
    return total / weight.where(weight > 0, 1)


def soft_loss(
    student: Tensor, teacher: Tensor, *, temperature: float, standardize: bool = False
) -> Tensor:
    """T^2 * KL(teacher || student) of the softened distributions, the mean over all rows in nats.

    Deep mutual learning is this loss both ways: whoever comes second teaches.

    Args:
        student: logits, (N, classes, ...).
        teacher: logits, same shape.
        temperature: divides both logits; above 0.
        standardize: see `standardized`.

    Source:
        Hinton, Vinyals, Dean 2015, section 2. Gradients of the soft targets shrink with 1/T^2; the
        factor keeps the weights of the two losses comparable at any T.
    """
    own, other = _softened(student, teacher, temperature, standardize)
    divergence = F.kl_div(
        F.log_softmax(own, dim=1), F.log_softmax(other, dim=1), reduction="none", log_target=True
    )
    return temperature**2 * divergence.sum(dim=1).mean()


def decoupled_loss(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor,
    *,
    temperature: float,
    target_weight: float = 1.0,
    nontarget_weight: float = 8.0,
    standardize: bool = False,
) -> Tensor:
    """Decoupled distillation (DKD): how sure of the target, and how the rest is divided.

    T^2 * (target_weight * KL of (target, all others) + nontarget_weight * KL among the others).

    Args:
        student: logits, (N, classes).
        teacher: logits, (N, classes).
        labels: class indices, (N,); where UNLABELED, the teacher's first choice is the target.
        temperature: divides both logits; above 0.
        target_weight: the paper's alpha.
        nontarget_weight: the paper's beta.
        standardize: see `standardized`.

    Source:
        Zhao, Cui, Song, Qiu, Liang 2022, Decoupled Knowledge Distillation, equation 7.
    """
    own, other = _softened(student, teacher, temperature, standardize)
    target = torch.where(labels == UNLABELED, other.argmax(dim=1), labels).unsqueeze(1)
    is_target = torch.zeros_like(own, dtype=torch.bool).scatter_(1, target, value=True)
    parts = []
    for logits in (own, other):
        whole = logits.logsumexp(dim=1, keepdim=True)
        rest = logits.masked_fill(is_target, -torch.inf).logsumexp(dim=1, keepdim=True)
        binary = torch.cat([logits.gather(1, target) - whole, rest - whole], dim=1)
        # Equal in both, the target's own column adds nothing to the divergence of the rest.
        parts.append((binary, (logits - rest).masked_fill(is_target, 0.0)))
    (own_binary, own_rest), (other_binary, other_rest) = parts
    target_part = F.kl_div(own_binary, other_binary, reduction="none", log_target=True).sum(dim=1)
    nontarget_part = F.kl_div(own_rest, other_rest, reduction="none", log_target=True).sum(dim=1)
    both = target_weight * target_part + nontarget_weight * nontarget_part
    return temperature**2 * both.mean()


def relational_loss(
    student: Tensor,
    teacher: Tensor,
    *,
    temperature: float,
    inter_weight: float = 1.0,
    intra_weight: float = 1.0,
    standardize: bool = False,
) -> Tensor:
    """DIST: 1 - Pearson correlation of predictions, over the classes and over the batch.

    T^2 * (inter_weight * (1 - correlation of rows) + intra_weight * (1 - correlation of columns)).

    Args:
        student: logits, (N, classes).
        teacher: logits, (N, classes).
        temperature: divides both logits; above 0.
        inter_weight: the paper's beta: rows, the relation among the classes of a patch.
        intra_weight: the paper's gamma: columns, the relation among the patches of a class; a batch
            of one has none.
        standardize: see `standardized`.

    Source:
        Huang, You, Wang, Qian, Xu 2022, Knowledge Distillation from A Stronger Teacher,
        section 3. T^2 comes from the authors' code. A correlation does not shrink with
        1/T, so unlike those of `soft_loss` its gradients grow with T^2.
    """
    own, other = _softened(student, teacher, temperature, standardize)
    p, q = own.softmax(dim=1), other.softmax(dim=1)
    loss = inter_weight * (1 - _correlation(p, q)).mean()
    if len(p) > 1:
        loss = loss + intra_weight * (1 - _correlation(p.t(), q.t())).mean()
    return temperature**2 * loss


def feature_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared error of two feature maps (N, C, H, W) or vectors (N, C).

    Maps of different sizes are averaged to the smaller one; a map beside a vector to one value per
    channel.

    Raises:
        ValueError: the numbers of channels differ.
    """
    own, other = _exact(student), _exact(teacher.detach())
    if own.shape[1] != other.shape[1]:
        raise ValueError(
            f"the student's feature has {own.shape[1]} channels, the teacher's {other.shape[1]}; "
            "an adapter must come first"
        )
    if own.ndim == other.ndim == 4:
        smaller = (min(own.shape[2], other.shape[2]), min(own.shape[3], other.shape[3]))
        own, other = (F.adaptive_avg_pool2d(x, smaller) for x in (own, other))
    else:
        own, other = (x.flatten(2).mean(dim=2) if x.ndim == 4 else x for x in (own, other))
    return F.mse_loss(own, other)


def standardized(logits: Tensor) -> Tensor:
    """Every row of logits with mean 0 and standard deviation 1 over the classes.

    Then teacher and student need not have logits of the same size, only of the same shape. The
    temperature divides the result, and T^2 stays a factor of the loss.

    Source:
        Sun, Ren, Li, Wang, Cao 2024, Logit Standardization in Knowledge Distillation, algorithms 1
        and 2: the variance divides by the number of classes, as there. The authors' code divides by
        one less, which softens like a temperature sqrt(classes / (classes - 1)) times higher.
    """
    centered = logits - logits.mean(dim=1, keepdim=True)
    return centered / (logits.std(dim=1, correction=0, keepdim=True) + _EPSILON)


def decayed(start: float, end: float, epoch: int, epochs: int) -> float:
    """A value that goes linearly from `start` in epoch 0 to `end` in the last one."""
    return start + (end - start) * min(1.0, epoch / max(1, epochs - 1))


def _exact(logits: Tensor) -> Tensor:
    """At least float32."""
    return logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits


def _softened(
    student: Tensor, teacher: Tensor, temperature: float, standardize: bool
) -> tuple[Tensor, Tensor]:
    own, other = _exact(student), _exact(teacher.detach())
    if standardize:
        own, other = standardized(own), standardized(other)
    return own / temperature, other / temperature


def _correlation(one: Tensor, other: Tensor) -> Tensor:
    """Pearson correlation of the rows of two matrices; 0 where one is constant to within 1e-7."""
    one, other = (x - x.mean(dim=1, keepdim=True) for x in (one, other))
    return F.cosine_similarity(one, other, dim=1, eps=_EPSILON)
