"""What soft losses share: their signature, and logits made ready for them.

Logits are (N, classes), or (N, classes, ...) where every position has a class of its own. They are
computed in float32 or better whatever autocast makes of the network, and no gradient flows into a
teacher.
"""

from __future__ import annotations

from pkgutil import resolve_name
from typing import TYPE_CHECKING, Protocol, cast

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from pipeline.params.losses import SoftLoss


#: Keeps divisions by a spread finite; the value in the code of the logit standardization's authors.
EPSILON = 1e-7


class SoftLossFunction(Protocol):
    """What every soft loss computes; its own weights come as further keywords."""

    def __call__(
        self,
        student: Tensor,
        teacher: Tensor,
        labels: Tensor,
        *,
        temperature: float,
        standardize: bool = False,
        **weights: float,
    ) -> Tensor:
        """A scalar that is 0 where student and teacher agree.

        Args:
            student: logits, (N, classes).
            teacher: logits, (N, classes).
            labels: class indices, (N,); UNLABELED where nobody said.
            temperature: divides both logits; above 0.
            standardize: see `standardize_logits`.
            weights: those of `SoftLoss.weights`.
        """


def loss_function(loss: SoftLoss) -> SoftLossFunction:
    """The function that computes a loss of the table; its file is imported now, not before."""
    return cast("SoftLossFunction", resolve_name(loss.function))


def soften(
    student: Tensor, teacher: Tensor, temperature: float, standardize: bool
) -> tuple[Tensor, Tensor]:
    """Logits of student and teacher, divided by the temperature; no gradient for the teacher."""
    student, teacher = at_least_float32(student), at_least_float32(teacher.detach())
    if standardize:
        student, teacher = standardize_logits(student), standardize_logits(teacher)
    return student / temperature, teacher / temperature


def standardize_logits(logits: Tensor) -> Tensor:
    """Every row of logits with mean 0 and standard deviation 1 over the classes.

    Then teacher and student need not have logits of the same size, only of the same shape. The
    temperature divides the result, and T^2 stays a factor of the loss.

    Source:
        Sun, Ren, Li, Wang, Cao 2024, Logit Standardization in Knowledge Distillation, algorithms 1
        and 2: the variance divides by the number of classes, as there. The authors' code divides by
        one less, which softens like a temperature sqrt(classes / (classes - 1)) times higher.
    """
    centered = logits - logits.mean(dim=1, keepdim=True)
    return centered / (logits.std(dim=1, correction=0, keepdim=True) + EPSILON)


def at_least_float32(logits: Tensor) -> Tensor:
    """Half-precision logits as float32; float32 and float64 as they are."""
    return logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits
