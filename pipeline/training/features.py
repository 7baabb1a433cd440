"""Feature maps of teacher and student, tapped and adapted to each other."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from pipeline.run.errors import InputError, near_names
from pipeline.training.losses.features import feature_loss

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from pipeline.params.distill import FeatureParams


class FeatureTaps(nn.Module):
    """Compares named layers of the student with tensors of the teachers."""

    def __init__(
        self,
        student: nn.Module,
        wanted: Sequence[FeatureParams],
        names: Sequence[str],
        example: Tensor,
        teacher_features: Sequence[Tensor],
    ) -> None:
        """Hook the layers; a 1x1 adapter goes where widths differ.

        Args:
            student: the network.
            wanted: pairs of student layer and `teacher/tensor`.
            names: of the features that every batch carries.
            example: a batch of student tensors.
            teacher_features: those of some batch, for their widths.

        Raises:
            InputError: a layer or a teacher's tensor is not there, or is no feature map.
        """
        super().__init__()
        self._seen: dict[str, Tensor] = {}
        self._pairs: list[tuple[str, int]] = []
        layers = dict(student.named_modules())
        for pair in wanted:
            _check_name("distill.features.student", pair.student, list(layers))
            _check_name("distill.features.teacher", pair.teacher, list(names))
            layers[pair.student].register_forward_hook(self._keeper(pair.student))
            self._pairs.append((pair.student, list(names).index(pair.teacher)))
        with torch.no_grad():
            student.eval()(example)
        self.adapters = nn.ModuleList(
            _adapter(layer, self._seen[layer], teacher_features[number])
            for layer, number in self._pairs
        )
        self._seen.clear()

    def _keeper(self, layer: str) -> Any:  # noqa: ANN401 - a hook
        def keep(module: nn.Module, inputs: object, output: Tensor) -> None:
            if isinstance(output, torch.Tensor):
                self._seen[layer] = output

        return keep

    def loss(self, teacher_features: Sequence[Tensor]) -> Tensor:
        """Mean over the pairs of their MSE, for the student's last forward pass."""
        losses = [
            feature_loss(adapter(self._seen[layer]), teacher_features[number])
            for adapter, (layer, number) in zip(self.adapters, self._pairs, strict=True)
        ]
        return torch.stack(losses).mean()


def _check_name(key: str, name: str, names: Sequence[str]) -> None:
    if name not in names or not name:
        raise InputError(f"{key}: there is no {name!r}; near are {near_names(name, names)}")


def _adapter(layer: str, student: Tensor, teacher: Tensor) -> nn.Module:
    if student.ndim not in (2, 4) or teacher.ndim not in (2, 4):
        raise InputError(
            f"distill.features: {layer} is {list(student.shape[1:])} and the teacher's tensor "
            f"{list(teacher.shape[1:])}; maps (C, H, W) or vectors (C) can be matched"
        )
    if student.shape[1] == teacher.shape[1]:
        return nn.Identity()
    if student.ndim == 4:
        return nn.Conv2d(student.shape[1], teacher.shape[1], 1, bias=False)
    return nn.Linear(student.shape[1], teacher.shape[1], bias=False)
