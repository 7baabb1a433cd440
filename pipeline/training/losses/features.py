"""Feature maps of the student like those of a teacher."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch.nn import functional as F  # noqa: N812 - the name everybody knows it by

from pipeline.training.losses.softening import at_least_float32

if TYPE_CHECKING:
    from torch import Tensor


def feature_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared error of two feature maps (N, C, H, W) or vectors (N, C).

    Maps of different sizes are averaged to the smaller one; a map beside a vector to one value per
    channel.

    Raises:
        ValueError: the numbers of channels differ.
    """
    student, teacher = at_least_float32(student), at_least_float32(teacher.detach())
    if student.shape[1] != teacher.shape[1]:
        raise ValueError(
            f"the student's feature has {student.shape[1]} channels, the teacher's "
            f"{teacher.shape[1]}; an adapter must come first"
        )
    if student.ndim == teacher.ndim == 4:
        height, width = (min(student.shape[i], teacher.shape[i]) for i in (2, 3))
        student = F.adaptive_avg_pool2d(student, (height, width))
        teacher = F.adaptive_avg_pool2d(teacher, (height, width))
    else:
        student, teacher = (
            x.flatten(2).mean(dim=2) if x.ndim == 4 else x for x in (student, teacher)
        )
    return F.mse_loss(student, teacher)
