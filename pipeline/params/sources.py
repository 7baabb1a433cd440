"""The user's data and teachers, as kdpipe.yaml describes them."""

from __future__ import annotations

import json
from hashlib import sha256
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from pipeline.params.formats import FORMATS
from pipeline.run.errors import InputError
from pipeline.run.parameters import PATH, UNKEYED, Params, one_of

#: Zero-based band indices, at least one.
Bands = Annotated[tuple[Annotated[int, Meta(ge=0)], ...], Meta(min_length=1)]

#: Stands for the class of a patch whose class nobody said.
UNLABELED = -1

#: How the logits of several teachers become one: the weighted mean of them, or the logarithm of the
#: weighted mean of their probabilities.
RULES = ("mean_logits", "mean_probabilities")

Rule = Annotated[str, one_of(RULES)]

SPLITS = ("train", "val", "test", "unlabeled")


class SplitParams(Params, frozen=True):
    """Where one split comes from: a file or folder and rows of it, or a share of train."""

    path: Annotated[str | None, PATH] = None
    labels: Annotated[str | None, PATH] = None  # format npy: the file of class indices
    rows: tuple[int, int] | None = None  # [first, one past the last]; null: all
    indices: Annotated[str | None, PATH] = None  # .npy or text file with the rows to take
    fraction: Annotated[float, Meta(gt=0, lt=1)] | None = None  # of train, stratified and seeded


class DataParams(Params, frozen=True):
    """The patches."""

    format: Annotated[str, one_of(FORMATS)] = "npz"
    modalities: dict[str, str] | None = None  # name -> key in the file; null: the format's own
    labels: str | None = None  # key of the labels in the file; null: the format's own
    train: SplitParams = SplitParams()
    val: SplitParams = SplitParams(fraction=0.15)
    test: SplitParams = SplitParams()
    unlabeled: SplitParams | None = None  # its labels, if any, are never looked at
    bad_patches: Literal["error", "drop"] = "error"  # patches with NaN or infinity
    on_leak: Literal["warn", "error"] = "warn"  # the same patch in two splits
    cache: Annotated[bool, UNKEYED] = (
        False  # keep the bands that are needed, float32, in runs/.cache
    )

    @property
    def splits(self) -> dict[str, SplitParams]:
        """The splits that are asked for, by name."""
        splits = {name: getattr(self, name) for name in SPLITS}
        return {name: split for name, split in splits.items() if split is not None}

    def only_modality(self) -> str:
        """The one name that a format of single images can have.

        Raises:
            InputError: there are more.
        """
        names = list(self.modalities or {"optical": ""})
        if len(names) != 1:
            raise InputError(f"format {self.format} holds one modality; data.modalities names more")
        return names[0]

    def reading(self, digest: str) -> str:
        """The digest of a file as one of what is read from it: the file, and the names in it."""
        identity = [digest, self.format, self.modalities]
        return sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


class ViewParams(Params, frozen=True):
    """Augmentation, the same for teacher and student; view 0 is the patch as it is."""

    count: Annotated[int, Meta(ge=1)] = 1  # views of each patch; 1: no augmentation
    flip: bool = True
    rotate: bool = True  # by quarter turns; by half turns where patches are not square
    shift: Annotated[int, Meta(ge=0)] = 2  # up to so many pixels, either way, on both axes
    zoom: Annotated[float, Meta(ge=0, lt=1)] = 0.1  # 1 +- up to this


class TeacherParams(Params, frozen=True):
    """One teacher, or several alike when `path` is a pattern."""

    bands: Bands  # that it sees, in channel order
    path: Annotated[str | None, PATH] = (
        None  # ONNX file or pattern; with `timm`, the file of weights
    )
    timm: str | None = None  # a torch teacher: name of the network; without path: weights of a hub
    modality: str = "optical"
    weight: Annotated[float, Meta(gt=0)] = 1.0  # in the mean
    resize: Literal["nearest", "bilinear"] = "nearest"  # from patch to input size
    #: Who does the z-score: kdpipe by the contract, the graph itself, or one after the other.
    zscore: Literal["contract", "graph", "both"] = "contract"
    features: tuple[str, ...] = ()  # tensors of the graph (modules of a torch teacher) to match
    recorded_top1: Annotated[float, Meta(gt=0, le=1)] | None = None  # fraction, when it was trained
    recorded_logit_mean: float | None = None
    recorded_logit_std: Annotated[float, Meta(gt=0)] | None = None

    @property
    def recorded_score(self) -> float | None:
        """The task's score when it was trained, a fraction."""
        return self.recorded_top1

    @property
    def inference(self) -> dict[str, Any]:
        """What decides what it says of a patch: neither its file's name nor what was recorded."""
        others = ("path", "weight", "recorded_top1", "recorded_logit_mean", "recorded_logit_std")
        return {k: v for k, v in msgspec.to_builtins(self).items() if k not in others}
