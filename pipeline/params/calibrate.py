"""The section `calibrate` of kdpipe.yaml."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from msgspec import Meta, field

from metis.backend import OBSERVERS, SCHEMES, SdkOptions
from pipeline.params.compile import BackendName
from pipeline.run.parameters import PATH, PROGRAM, UNKEYED, Params, one_of, same_as

Observer = Annotated[str, one_of(OBSERVERS)]


class CalibrateParams(Params, frozen=True):
    """How to quantize."""

    samples: Annotated[int, Meta(ge=2, le=2000)] = 200  # the range that the SDK accepts
    scheme: Annotated[str, one_of(SCHEMES)] = "per_tensor_histogram"
    observer: Observer | None = None  # of the emulator; null: mse, or min_max with that scheme
    ranges: dict[str, Observer | tuple[float, float]] = field(default_factory=dict)  # by tensor
    ranges_file: Annotated[str | None, PATH] = None  # a ranges.json to use instead of observing
    bias_correction: bool = True  # biases make up for the rounding of weights
    equalization: bool = False  # move scale between layers first
    weight_clipping: bool = False  # cut weights where that rounds better
    sensitivity: Annotated[int, Meta(ge=0)] = 64  # validation patches for it; 0: leave it out
    backend: Annotated[BackendName | None, same_as("compile.backend")] = None
    try_schemes: Annotated[Literal["all"] | None, same_as("compile.try_schemes")] = None
    extra: Annotated[dict[str, Any] | None, same_as("compile.extra")] = None
    time_limit: Annotated[float | None, same_as("compile.time_limit"), UNKEYED] = None
    sdk_python: Annotated[str | None, same_as("compile.sdk_python"), PROGRAM] = None
    max_int8_loss: Annotated[float, Meta(gt=0), UNKEYED] = 1.0  # points of top-1

    @property
    def sdk(self) -> SdkOptions:
        """What is asked of the SDK."""
        limit = self.time_limit or SdkOptions.time_limit_s
        return SdkOptions(self.extra or {}, limit, python=self.sdk_python or "")
