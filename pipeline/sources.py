"""The user's data and teachers, as kdpipe.yaml describes them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from msgspec import Meta

from pipeline.stage import path_field, unkeyed_field

#: Zero-based band indices, at least one.
Bands = Annotated[tuple[Annotated[int, Meta(ge=0)], ...], Meta(min_length=1)]

SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class SplitParams:
    """Where one split comes from: a file or folder and rows of it, or a share of train."""

    path: str | None = path_field(None)
    labels: str | None = path_field(None)  # format npy: the file of class indices
    rows: tuple[int, int] | None = None  # [first, one past the last]; null: all
    indices: str | None = path_field(None)  # .npy or text file with the rows to take
    fraction: Annotated[float, Meta(gt=0, lt=1)] | None = None  # of train, stratified and seeded


@dataclass(frozen=True)
class DataParams:
    """The labelled patches."""

    format: Literal["npz", "npy", "so2sat-h5", "image-folder"] = "npz"
    modalities: dict[str, str] | None = None  # name -> key in the file; null: the format's own
    labels: str | None = None  # key of the labels in the file; null: the format's own
    train: SplitParams = field(default_factory=SplitParams)
    val: SplitParams = field(default_factory=lambda: SplitParams(fraction=0.15))
    test: SplitParams = field(default_factory=SplitParams)
    bad_patches: Literal["error", "drop"] = "error"  # patches with NaN or infinity
    on_leak: Literal["warn", "error"] = "warn"  # the same patch in two splits
    cache: bool = unkeyed_field(False)  # keep the bands that are needed, float32, in runs/.cache


@dataclass(frozen=True)
class TeacherParams:
    """One teacher, or several alike when `path` is a pattern."""

    bands: Bands  # that it sees, in channel order
    path: str = path_field()  # or a pattern: teachers/dense_*.onnx; required
    modality: str = "optical"
    weight: Annotated[float, Meta(gt=0)] = 1.0  # in the mean of logits
    resize: Literal["nearest", "bilinear"] = "nearest"  # from patch to input size
