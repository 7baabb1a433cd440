"""The interface that every maker of Metis models implements, its types and its errors."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Any, Protocol, cast

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    import numpy as np
    from numpy.typing import NDArray

    from preprocessing.int8 import TensorSpec


#: Quantization schemes by the names that the Voyager SDK gives them, and the observer that stands
#: for each where we choose the ranges.
SCHEMES = {
    "per_tensor_histogram": "mse",
    "per_tensor_min_max": "min_max",
    "hybrid_per_tensor_per_channel": "mse",
}

#: Observers: how a range follows from the histogram of a tensor; the function of each.
OBSERVERS = {
    "mse": "metis.quantize.observers:mse",
    "percentile": "metis.quantize.observers:percentile",
    "entropy": "metis.quantize.observers:entropy",
    "min_max": "metis.quantize.observers:min_max",
}


@dataclass(frozen=True)
class BackendEntry:
    """A backend in the table: what is known of it before its module is imported."""

    maker: str  # `module:class`; of a backend with an SDK it is called with `SdkOptions`
    tools: tuple[str, ...]  # distributions whose version can change what it makes
    doctor_section: str  # of `kdpipe doctor`, for what it says of itself
    needs_sdk: bool = False  # it drives an SDK, which may lie in another interpreter than ours


#: Every backend by the name that users give it; a new one is a file and a line here.
BACKENDS = {
    "emulator": BackendEntry("metis.emulator.backend:Emulator", ("onnxruntime",), "emulator"),
    "voyager": BackendEntry("metis.voyager.backend:Voyager", ("axelera-devkit",), "sdk", True),
}


class BackendError(RuntimeError):
    """A backend could not quantize, run or compile a model."""

    status = 1


class BackendMissingError(BackendError):
    """What the backend needs is not installed here, or too old."""

    status = 5


@dataclass(frozen=True)
class SdkOptions:
    """What a user asks of an SDK beyond scheme and cores; the emulator has no use for it."""

    extra: Mapping[str, Any] = field(default_factory=dict)  # more fields of its configuration
    time_limit_s: float = 14_400.0  # for one piece of work; vendors speak of hours for big models
    route: str = "api"  # from a student to device code; one of `metis.voyager.routes.ROUTES`
    python: str = ""  # its interpreter; empty: $KDPIPE_SDK_PYTHON, or the one that we run in


@dataclass(frozen=True)
class Probe:
    """What a backend found on this machine."""

    available: bool
    versions: dict[str, str]  # distribution name -> version
    missing: str  # what is missing and how to get it; empty when available


@dataclass(frozen=True)
class QuantizedModel:
    """An int8 model that the host can run; saved as quantized.json inside its folder."""

    path: Path  # folder
    entry: str  # file in the folder that `Backend.infer` opens
    backend: str
    version: str  # of the tool that quantized
    scheme: str
    inputs: tuple[TensorSpec, ...]  # for one frame
    outputs: tuple[TensorSpec, ...]  # for one frame

    def save(self) -> None:
        """Write quantized.json."""
        _save(self, self.path / "quantized.json")

    @staticmethod
    def load(path: Path) -> QuantizedModel:
        """Read the folder that `save` completed."""
        return QuantizedModel(path=path, **_load(path / "quantized.json"))


@dataclass(frozen=True)
class CompiledModel:
    """What runs on the device; saved as spec.json inside its folder, which the device reads too."""

    path: Path  # folder
    entry: str  # file in the folder that the runtime loads
    backend: str
    version: str  # of the tool that compiled
    runtime: str  # "onnxruntime" (emulation on a host) or "axelera" (a device)
    aipu_cores: int  # also the batch size of one call
    inputs: tuple[TensorSpec, ...]  # for one call
    outputs: tuple[TensorSpec, ...]  # for one call
    preamble: str = ""  # ONNX in the folder: what the host does, in float, before the device input
    postamble: str = ""  # ONNX in the folder: what the host does, in float, after the device output
    session: dict[str, str] = field(default_factory=dict)  # options for onnxruntime, by key

    def save(self) -> None:
        """Write spec.json."""
        _save(self, self.path / "spec.json")

    @staticmethod
    def load(path: Path) -> CompiledModel:
        """Read the folder that `save` completed."""
        return CompiledModel(path=path, **_load(path / "spec.json"))


def _save(model: QuantizedModel | CompiledModel, path: Path) -> None:
    fields = {k: v for k, v in asdict(model).items() if k != "path"}
    path.write_text(json.dumps(fields, indent=1) + "\n")


def _load(path: Path) -> dict[str, Any]:
    from preprocessing.int8 import TensorSpec  # numpy; this file stays light for the commands

    try:
        fields: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise BackendError(f"{path} is not readable: {error}") from error
    for name in ("inputs", "outputs"):
        fields[name] = tuple(TensorSpec.from_json(raw) for raw in fields[name])
    return fields


class Backend(Protocol):
    """Four verbs; everything about an SDK stays behind them."""

    name: str
    emulates: bool  # its int8 arithmetic is the emulator's: the emulator has nothing to add to it

    def probe(self) -> Probe:
        """Say which versions are here, or what is missing and how to get it; never raises."""

    def quantize(
        self,
        student: Path,
        samples: Path,
        destination: Path,
        *,
        scheme: str,
        progress: Callable[[int], object] = ...,
        ranges: Path | None = None,
    ) -> QuantizedModel:
        """Turn a float32 ONNX into int8.

        Args:
            student: ONNX, opset 17, NCHW, batch 1.
            samples: .npy, float32, (N, 1, C, H, W), in the order in which they calibrate.
            destination: folder to write.
            scheme: one of `SCHEMES`.
            progress: called with the number of samples just done.
            ranges: ranges.json of `metis.quantize.ranges`, for a backend that lets us choose them;
                the SDK observes the samples itself and ignores it.

        Raises:
            BackendError: the tool refused; its own words are in the message.
        """

    def infer(self, model: QuantizedModel, inputs: NDArray[np.float32]) -> NDArray[np.float32]:
        """Run the int8 model on the host: (N, C, H, W) in, logits (N, classes) out."""

    def compile(
        self,
        model: QuantizedModel,
        destination: Path,
        *,
        aipu_cores: int,
        samples: Path | None = None,
        pipeline: Path | None = None,
    ) -> CompiledModel:
        """Lower the int8 model to device code, and prove that it loads where it can be run.

        Args:
            model: of `quantize`.
            destination: folder to write.
            aipu_cores: also the batch of one call.
            samples: what calibrated the model, for a route that quantizes again.
            pipeline: folder of the device pipeline, for a route that starts from its YAML.

        Raises:
            BackendError: the tool refused; its own words are in the message.
        """

    def arithmetic(self, scheme: str) -> str:
        """Who computes the int8 arithmetic of a scheme on this host, for the record."""

    def runtime_python(self) -> str:
        """The interpreter on this machine that runs compiled models."""

    def runtime_versions(self) -> dict[str, str | None]:
        """Releases of what runs compiled models here, beyond kdpipe's own packages."""

    def describe(self) -> dict[str, str]:
        """What there is to know of it on this machine, by name, for `kdpipe doctor`."""


def backend_tools(
    name: str, options: SdkOptions | None = None
) -> tuple[str, ...] | dict[str, str | None]:
    """The distributions whose version can change what this backend makes.

    For a backend with an SDK also their versions in the SDK's interpreter, null where it has none.
    """
    entry = BACKENDS[name]
    if not entry.needs_sdk:
        return entry.tools
    versions = open_backend(name, options).probe().versions
    return {tool: versions.get(tool) for tool in entry.tools}


def runtime_versions(name: str, options: SdkOptions | None = None) -> dict[str, str | None]:
    """See `Backend.runtime_versions`; a backend without an SDK is not imported for it."""
    return open_backend(name, options).runtime_versions() if BACKENDS[name].needs_sdk else {}


def require_backend(name: str, options: SdkOptions | None = None) -> None:
    """Refuse a backend that can't work on this machine.

    Raises:
        BackendMissingError: says what is missing and how to get it.
    """
    probe = open_backend(name, options).probe()
    if not probe.available:
        raise BackendMissingError(probe.missing)


def open_backend(name: str, options: SdkOptions | None = None) -> Backend:
    """The backend of this name; its module is imported now, not before.

    Args:
        name: one of `BACKENDS`.
        options: for the SDK, where the backend has one.

    Raises:
        ValueError: no such backend; the message lists those there are.
    """
    if name not in BACKENDS:
        raise ValueError(f"unknown backend {name!r}; there are {', '.join(BACKENDS)}")
    entry = BACKENDS[name]
    maker = resolve_name(entry.maker)
    return cast("Backend", maker(options) if entry.needs_sdk else maker())
