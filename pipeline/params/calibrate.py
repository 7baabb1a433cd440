"""The section `calibrate` of kdpipe.yaml."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from msgspec import Meta

from pipeline.run.stage import path_field, same_as_field, unkeyed_field

Observer = Literal["mse", "percentile", "entropy", "min_max"]


@dataclass(frozen=True)
class CalibrateParams:
    """How to quantize."""

    samples: Annotated[int, Meta(ge=2, le=2000)] = 200  # the range that the SDK accepts
    scheme: Literal[
        "per_tensor_histogram", "per_tensor_min_max", "hybrid_per_tensor_per_channel"
    ] = "per_tensor_histogram"
    observer: Observer | None = None  # of the emulator; null: mse, or min_max with that scheme
    ranges: dict[str, Observer | tuple[float, float]] = field(default_factory=dict)  # by tensor
    ranges_file: str | None = path_field(None)  # a ranges.json to use instead of observing
    bias_correction: bool = True  # biases make up for the rounding of weights
    equalization: bool = False  # move scale between layers first
    weight_clipping: bool = False  # cut weights where that rounds better
    sensitivity: Annotated[int, Meta(ge=0)] = 64  # validation patches for it; 0: leave it out
    backend: Literal["emulator", "voyager"] | None = same_as_field("compile.backend")
    try_schemes: Literal["all"] | None = same_as_field("compile.try_schemes")
    extra: dict[str, Any] | None = same_as_field("compile.extra")  # noqa: RUF009 - a field
    time_limit: float | None = same_as_field("compile.time_limit", unkeyed=True)
    max_int8_loss: Annotated[float, Meta(gt=0)] = unkeyed_field(1.0)  # points of top-1
