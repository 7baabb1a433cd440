"""The user's data and teachers, as kdpipe.yaml describes them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from msgspec import Meta

from pipeline.stage import path_field

#: Zero-based band indices, at least one.
Bands = Annotated[tuple[Annotated[int, Meta(ge=0)], ...], Meta(min_length=1)]


@dataclass(frozen=True)
class SplitParams:
    """Where one split comes from: a file and rows of it, or a share of the training split."""

    path: str | None = path_field(None)
    rows: tuple[int, int] | None = None  # [first, one past the last]; null: all
    fraction: Annotated[float, Meta(gt=0, lt=1)] | None = None  # of train, stratified and seeded


@dataclass(frozen=True)
class DataParams:
    """The labelled patches."""

    format: Literal["npz"] = "npz"
    modalities: dict[str, str] = field(default_factory=lambda: {"optical": "images"})
    labels: str = "labels"  # key of the class indices
    train: SplitParams = field(default_factory=SplitParams)
    val: SplitParams = field(default_factory=lambda: SplitParams(fraction=0.15))
    test: SplitParams = field(default_factory=SplitParams)


@dataclass(frozen=True)
class TeacherParams:
    """One teacher, or several alike when `path` is a pattern."""

    bands: Bands  # that it sees, in channel order
    path: str = path_field()  # or a pattern: teachers/dense_*.onnx; required
    modality: str = "optical"
    weight: Annotated[float, Meta(gt=0)] = 1.0  # in the mean of logits
    resize: Literal["nearest", "bilinear"] = "nearest"  # from patch to input size
