"""One training, described so that another process can take part in it, and what came of it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from msgspec import Struct
from safetensors.torch import load_file

from pipeline.artifacts import Artifacts
from pipeline.data.dataset import StudentData
from pipeline.networks.build import build_student
from pipeline.params.distill import DistillParams
from pipeline.training.folded_network import folded_network

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class TrainingJob:
    """One training, described so that another process can take part in it."""

    params: DistillParams
    dataset: str  # folders and files
    teaching: str
    contract: str
    student_input: str
    init: str | None  # file of weights to start from
    classes: int
    seed: int
    with_teacher: bool  # False: the same student, steps and labelled data, without teacher
    folder: str  # for checkpoints and results; what is there is gone on with
    logs: str  # for TensorBoard
    folded: str | None = None  # ONNX of a folded student to go on with, in place of a network
    ranges: str | None = None  # of its activations: train it on their int8 grid
    first_epoch: int = 0  # how many epochs of the order of samples lie behind it

    @property
    def soft(self) -> bool:
        """Whether anything but labels teaches; only then patches without labels are of use."""
        return self.with_teacher and bool(self.params.soft_weight or self.params.feature_weight)

    @cached_property
    def data(self) -> StudentData:
        """What it trains on."""
        names = ("contract", "student_input", "dataset")
        paths = {name: Path(getattr(self, name)) for name in names}
        return StudentData(Artifacts(paths, "files of a training"))

    def network(self) -> nn.Module:
        """The student as training finds it."""
        if self.folded is not None:
            return folded_network(Path(self.folded), Path(self.ranges) if self.ranges else None)
        return build_student(
            self.params.student,
            self.data.student_input,
            self.classes,
            seed=self.seed,
            stem_stride=self.params.stem_stride,
            init=Path(self.init) if self.init else None,
        )

    def load_trained(self) -> nn.Module:
        """The float student with the weights of its best epoch, in evaluation mode."""
        network = replace(self, ranges=None).network()
        network.load_state_dict(load_file(Path(self.folder) / "student.safetensors"))
        return network.eval()


class TrainingOutcome(Struct, frozen=True):
    """What came of a training, besides files."""

    epochs: int
    steps: int  # of the optimizer
    best_epoch: int  # from 1
    losses: dict[str, float]  # of the last epoch, by name
    threads: int  # of torch on the CPU
    resumed_after_epoch: int | None  # None: it was not interrupted


def load_trained_student(params: DistillParams, weights: Path, data: StudentData) -> nn.Module:
    """The torch network that distill left; needs the extra `train`.

    Args:
        params: the section `distill`, which names the network.
        weights: student.safetensors; of a folded student, with folded.onnx beside it.
        data: of the run.
    """
    network: nn.Module
    if params.quantization_aware.share:
        network = folded_network(weights.with_name("folded.onnx"))
    else:
        network = build_student(
            params.student,
            data.student_input,
            data.classes,
            seed=0,
            stem_stride=params.stem_stride,
        )
    network.load_state_dict(load_file(weights))
    return network
