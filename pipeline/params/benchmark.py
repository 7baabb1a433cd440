"""The section `benchmark` of kdpipe.yaml."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from msgspec import Meta

from metis.backend import SdkOptions
from pipeline.params.compile import BackendName
from pipeline.run.parameters import PROGRAM, UNKEYED, Params, same_as

#: Artifacts that a bundle is made of.
BUNDLED = (
    "contract",
    "labels",
    "student_input",
    "dataset",
    "test_set",
    "student",
    "quantized_model",
    "compiled_model",
    "device_pipeline",
)


@dataclass(frozen=True)
class BundleLimits:
    """What kdbench accepts where the bundle runs."""

    logit_steps: float  # int8 steps between its logits and the host's int8 logits
    accuracy_loss_points: float  # points of top-1 below the float student on the test split


@dataclass(frozen=True)
class Limits:
    """What each leg may be off by."""

    max_png_levels: float  # grey levels, where the device resizes bilinear; else exact
    max_yaml_difference: float  # of the tensor, in standard deviations
    max_export_difference: float  # of logits
    max_int8_loss: float  # points of top-1


class BenchmarkParams(Params, frozen=True):
    """Where and how long to measure."""

    min_seconds: Annotated[float, Meta(gt=0)] = 60.0  # per scenario; a shorter run is a SMOKE run
    min_queries: Annotated[int, Meta(ge=1)] = 1024  # of SingleStream; fewer is a SMOKE run
    min_samples: Annotated[int, Meta(ge=1)] = 24_576  # of Offline; fewer is a SMOKE run
    repeats: Annotated[int, Meta(ge=1)] = 1  # 3 or more give a spread
    max_logit_steps: Annotated[float, Meta(gt=0)] = 1.0  # int8 steps to the host's int8 logits
    max_device_loss: Annotated[float, Meta(gt=0)] = 1.0  # points of top-1 below the float student
    device: str = ""  # its name, as axdevice shows it; empty: the first one
    host: str = ""  # user@box that ssh reaches without a password; empty: this machine
    ssh_options: Annotated[tuple[str, ...], UNKEYED] = ()  # words for ssh before the host
    remote_python: Annotated[str, UNKEYED] = "python3"  # with numpy and the runtime, on that host
    time_limit: Annotated[float, Meta(gt=0), UNKEYED] = 14_400.0  # seconds, in all
    backend: Annotated[BackendName | None, same_as("compile.backend"), UNKEYED] = None
    sdk_python: Annotated[str | None, same_as("compile.sdk_python"), PROGRAM] = None
    golden_samples: Annotated[int, Meta(ge=1)] = 32  # validation patches that prove the bundle
    max_png_levels: Annotated[float, Meta(ge=0), UNKEYED] = 1.0  # grey levels, when bilinear
    max_yaml_difference: Annotated[float, Meta(ge=0), UNKEYED] = 1e-5  # standard deviations
    max_export_difference: Annotated[
        float | None, same_as("distill.max_export_difference"), UNKEYED
    ] = None
    max_int8_loss: Annotated[float | None, same_as("calibrate.max_int8_loss"), UNKEYED] = None

    @property
    def sdk(self) -> SdkOptions:
        """What is asked of the SDK."""
        return SdkOptions(python=self.sdk_python or "")

    @property
    def limits(self) -> Limits:
        """Of the legs of parity."""
        return Limits(
            max_png_levels=self.max_png_levels,
            max_yaml_difference=self.max_yaml_difference,
            max_export_difference=self.max_export_difference or 0.0,
            max_int8_loss=self.max_int8_loss or 0.0,
        )

    @property
    def bundle_limits(self) -> BundleLimits:
        """Of what kdbench accepts."""
        return BundleLimits(self.max_logit_steps, self.max_device_loss)

    @property
    def kdbench_arguments(self) -> list[str]:
        """For kdbench's command line."""
        return [
            f"--min-seconds={self.min_seconds}",
            f"--min-queries={self.min_queries}",
            f"--min-samples={self.min_samples}",
            f"--repeats={self.repeats}",
            *([f"--device={self.device}"] if self.device else []),
        ]
