"""The section `compile` of kdpipe.yaml."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from msgspec import Meta, field

from metis.backend import BACKENDS, SdkOptions
from metis.voyager.routes import ROUTES
from pipeline.run.parameters import PROGRAM, UNKEYED, Params, one_of

BackendName = Annotated[str, one_of(BACKENDS)]


class CompileParams(Params, frozen=True):
    """How to compile."""

    backend: BackendName = "emulator"
    aipu_cores: Annotated[int, Meta(ge=1, le=4)] = 1  # also the batch of one call
    sdk_python: Annotated[str | None, PROGRAM] = None  # the SDK's interpreter
    extra: dict[str, Any] = field(default_factory=dict)  # more fields of the SDK's CompilerConfig
    route: Annotated[str, one_of(ROUTES)] = "api"  # of the SDK, from student to artifacts
    try_schemes: Annotated[Literal["all"] | None, UNKEYED] = None  # calibrate tries them
    time_limit: Annotated[float, Meta(gt=0), UNKEYED] = 14_400.0  # seconds, for each step
    sdk_release: Literal["1.2", "1.3", "1.4", "1.5", "1.6", "1.7", "1.8"] = "1.8"  # for the YAML
    path_prefix: str = ""  # put before file names in the YAML: where the folder will lie
    max_constant_error: Annotated[float, Meta(gt=0), UNKEYED] = 0.05  # standard deviations

    @property
    def sdk(self) -> SdkOptions:
        """What is asked of the SDK."""
        return SdkOptions(self.extra, self.time_limit, self.route, self.sdk_python or "")
