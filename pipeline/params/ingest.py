"""The section `ingest` of kdpipe.yaml."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta

from pipeline.params.sources import Bands, DataParams, Rule, TeacherParams, ViewParams
from pipeline.run.parameters import ADDED, PATH, Params, one_of
from pipeline.tasks.task import DEFAULT_TASK, TASKS

#: Where val is a fraction of train, the recorded figures may be of another fraction.
OTHER_PATCHES = (
    "The seed draws val: if they were recorded on other patches, widen ingest.max_top1_difference. "
)


class StudentParams(Params, frozen=True):
    """What the student sees, and how the device delivers it."""

    bands: Bands  # that it sees, in channel order
    modality: str = "optical"
    size: Annotated[int, Meta(ge=1)] = 32  # height and width of the network's input
    interpolation: Literal["nearest", "bilinear"] = "nearest"
    half_pixel_centers: bool | None = None  # null: true for bilinear, false for nearest
    device_resize: Literal["auto", "none", "device"] = "auto"  # none: images have the size already
    encoding: Literal["contract", "percentile"] = (
        "contract"  # which values grey 0 and 255 stand for
    )
    percentiles: tuple[
        Annotated[float, Meta(ge=0, lt=50)], Annotated[float, Meta(gt=50, le=100)]
    ] = (0.1, 99.9)  # of each band, for encoding percentile


class IngestParams(Params, frozen=True):
    """What to take in."""

    data: DataParams
    teachers: Annotated[tuple[TeacherParams, ...], Meta(min_length=1)]
    student: StudentParams
    task: Annotated[str, one_of(TASKS), ADDED] = DEFAULT_TASK  # what a label is and what a score is
    contract: Annotated[str, PATH] = "preprocessing.json"
    labels: Annotated[str | None, PATH] = (
        None  # text, one class per line; must equal the contract's
    )
    combine: Rule = "mean_logits"
    calibrate_temperatures: bool = False  # divide each teacher's logits by its own, fitted on val
    views: ViewParams = ViewParams()
    teacher_mode: Literal["cached", "live"] = "cached"  # live: distill asks them for every batch
    max_top1_difference: Annotated[float, Meta(gt=0)] = 0.005  # from a teacher's recorded_top1
    max_logit_difference: Annotated[float, Meta(gt=0)] = 0.1  # from recorded mean and std, in stds
    doubtful_top1: Annotated[float, Meta(ge=0, le=1)] = 0.5  # below it, other conventions are tried
    max_mean_shift: Annotated[float, Meta(gt=0)] = 0.5  # of mu from the data's, in data sigmas
    max_sigma_ratio: Annotated[float, Meta(gt=1)] = 1.5  # of sigma to the data's, either way

    @property
    def max_score_difference(self) -> float:
        """From a teacher's recorded score."""
        return self.max_top1_difference

    @property
    def doubtful_score(self) -> float:
        """Below it, other conventions are tried."""
        return self.doubtful_top1

    @property
    def viewers(self) -> tuple[TeacherParams | StudentParams, ...]:
        """Everybody who sees bands of the data."""
        return (*self.teachers, self.student)
