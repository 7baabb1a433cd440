"""Decoupled distillation."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.nn import functional as F  # noqa: N812 - the name everybody knows it by

from pipeline.params.sources import UNLABELED
from pipeline.training.losses.softening import soften

if TYPE_CHECKING:
    from torch import Tensor


def dkd_loss(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor,
    *,
    temperature: float,
    standardize: bool = False,
    target_weight: float = 1.0,
    nontarget_weight: float = 8.0,
) -> Tensor:
    """Decoupled distillation (DKD): how sure of the target, and how the rest is divided.

    T^2 * (target_weight * KL of (target, all others) + nontarget_weight * KL among the others).
    See `SoftLossFunction`; where there is no label, the teacher's first choice is the target.

    Args:
        student: logits, (N, classes).
        teacher: logits, (N, classes).
        labels: class indices, (N,).
        temperature: divides both logits; above 0.
        standardize: see `standardize_logits`.
        target_weight: the paper's alpha.
        nontarget_weight: the paper's beta.

    Source:
        Zhao, Cui, Song, Qiu, Liang 2022, Decoupled Knowledge Distillation, equation 7.
    """
    student, teacher = soften(student, teacher, temperature, standardize)
    target = torch.where(labels == UNLABELED, teacher.max(dim=1).indices, labels).unsqueeze(1)
    is_target = torch.zeros_like(student, dtype=torch.bool).scatter_(1, target, value=True)
    student_target, student_rest = _decouple(student, target, is_target)
    teacher_target, teacher_rest = _decouple(teacher, target, is_target)
    target_part = _divergence(student_target, teacher_target)
    nontarget_part = _divergence(student_rest, teacher_rest)
    divergence = target_weight * target_part + nontarget_weight * nontarget_part
    return temperature**2 * divergence.mean()


def _decouple(logits: Tensor, target: Tensor, is_target: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities of (target, all others), (N, 2), and of each among the others."""
    total = logits.logsumexp(dim=1, keepdim=True)
    rest = logits.masked_fill(is_target, -torch.inf).logsumexp(dim=1, keepdim=True)
    binary = torch.cat([logits.gather(1, target) - total, rest - total], dim=1)
    # Equal in both, the target's own column adds nothing to the divergence of the rest.
    return binary, (logits - rest).masked_fill(is_target, 0.0)


def _divergence(student: Tensor, teacher: Tensor) -> Tensor:
    return F.kl_div(student, teacher, reduction="none", log_target=True).sum(dim=1)
