"""The runtimes that run a compiled model: Axelera's on a device, onnxruntime as an emulation.

A runtime is opened once. Each `open_instance` gives a loaded copy of the model, for the thread that
opened it: `run(source, target)` takes and fills int8 arrays, NHWC and padded, and `late` says how
many runs later a result arrives.

Source: Voyager SDK 1.2.5 to 1.8, documentation of axelera.runtime.
"""

from __future__ import annotations

import os
import re
import tempfile
import threading
import zipfile
from importlib import import_module, metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdbench_bundle import CheckError

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy as np
    from numpy.typing import NDArray

    from kdbench_bundle import Bundle

#: Cores of one Metis chip; a model compiled for n of them leaves room for 4 // n instances.
AIPU_CORES = 4

#: With double buffering a result arrives this many runs later (SDK documentation, 1.6).
DOUBLE_BUFFER_DELAY = 2

_ADVICE = {
    "ConnectionError": "is the card there (axdevice), and its driver recent enough?",
    "DeviceInUse": "another process holds its cores; end that, or choose a device with --device",
    "IncompatibleDevice": "the card's firmware or driver does not fit this runtime",
}


def session(model: Path, entries: Mapping[str, str] | None = None) -> Any:  # noqa: ANN401
    """An ONNX graph in onnxruntime, which may be absent, on one thread.

    Args:
        model: the file.
        entries: of the session's configuration; without the right ones, CPUs that lack VNNI
            saturate 16-bit sums and compute other logits.

    Raises:
        CheckError: status 5; onnxruntime is not installed.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise CheckError(
            f"onnxruntime is not installed, and {model.name} needs it:  pip install onnxruntime", 5
        ) from error
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1  # one instance is one core, as on the device
    options.log_severity_level = 3
    for key, value in (entries or {}).items():
        options.add_session_config_entry(key, value)
    return onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])


class OnnxRuntime:
    """Emulation on a host: the model's integer graph in onnxruntime."""

    measured_on = "host-emulation"
    double_buffer = False  # it has none
    options: Mapping[str, int] | None = None

    def __init__(self, bundle: Bundle, device: str | None) -> None:
        if device is not None:
            raise CheckError("--device: this bundle runs on the host, without a device", 2)
        self._model = bundle.model
        self._entries: dict[str, str] = bundle.index["session"]
        session(self._model, self._entries)  # fails now if it fails at all
        self.version = f"onnxruntime {metadata.version('onnxruntime')}"
        self.device: dict[str, Any] | None = None
        # One instance per CPU core, and no more than a chip would hold.
        self.instances = max(1, min(AIPU_CORES // bundle.batch, len(os.sched_getaffinity(0))))

    def open_instance(self, *, double_buffer: bool = False) -> OnnxInstance:
        """Load a copy of the model."""
        return OnnxInstance(session(self._model, self._entries))

    def configuration(self) -> dict[str, str]:
        """Nothing: there is no device."""
        return {}

    def close(self) -> None:
        """Nothing is held."""


class OnnxInstance:
    """One session."""

    late = 0

    def __init__(self, opened: Any) -> None:  # noqa: ANN401 - onnxruntime has no types
        self._session = opened
        self._input = opened.get_inputs()[0].name

    def run(self, source: NDArray[np.int8], target: NDArray[np.int8]) -> None:
        """One call."""
        target[...] = self._session.run(None, {self._input: source})[0]

    def close(self) -> None:
        """Release the session."""
        del self._session


class AxeleraRuntime:
    """A Metis device through the low-level runtime: Context, Model, Connection, ModelInstance."""

    measured_on = "device"
    double_buffer = True
    #: Of every instance. Its memory is ours, numpy's; shared buffers would be another scope.
    options: Mapping[str, int] | None = {"input_dmabuf": 0, "output_dmabuf": 0}

    def __init__(self, bundle: Bundle, device: str | None) -> None:
        try:
            self._library = import_module("axelera.runtime")
        except (ImportError, OSError) as error:  # OSError: one of its libraries does not load
            raise CheckError(
                f"axelera.runtime does not load ({error}); install the package axelera-rt of the "
                "SDK release that compiled this model",
                5,
            ) from error
        self.version = f"axelera-rt {_version(self._library)}"
        self._compiled_by = str(bundle.index["backend"])
        self._batch = bundle.batch
        self._opening = threading.Lock()
        self.instances = AIPU_CORES // bundle.batch
        try:
            self._context = self._library.Context()
            self._info = self._choose(self._context.list_devices(), device)
        except Exception as error:
            raise self._error("no device", error, 6) from error
        self.device = self._describe()
        with tempfile.TemporaryDirectory() as scratch:
            try:
                self._model = self._context.load_model(str(_model_json(bundle.model, scratch)))
            except Exception as error:
                what = f"{bundle.index['model']} does not load{self._releases()}"
                raise self._error(what, error, 1) from error
        self._check_tensors(bundle)

    def _choose(self, devices: list[Any], wanted: str | None) -> Any:  # noqa: ANN401 - the SDK's
        if not devices:
            raise CheckError("no device: axelera.runtime lists none (axdevice shows why)", 6)
        if wanted is None:
            return devices[0]
        # SDK 1.8 writes hyphens for colons in the names of device nodes.
        named = {device.name.replace(":", "-"): device for device in devices}
        if wanted.replace(":", "-") not in named:
            names = ", ".join(device.name for device in devices)
            raise CheckError(f"no device {wanted!r}; there are {names}", 6)
        return named[wanted.replace(":", "-")]

    def _describe(self) -> dict[str, Any]:
        fields = (
            "name",
            "board_type",
            "board_revision",
            "firmware_version",
            "flashed_firmware_version",
            "board_controller_firmware_version",
            "board_controller_board_type",
            "subdevice_count",
        )
        found = {name: getattr(self._info, name, None) for name in fields}
        return {n: v if isinstance(v, int | None) else str(v) for n, v in found.items()}

    def _check_tensors(self, bundle: Bundle) -> None:
        """What the runtime says of the model's tensors must be what the bundle says."""
        ends = (
            ("input", self._model.inputs, bundle.inputs),
            ("output", self._model.outputs, bundle.outputs),
        )
        for end, tensors, spec in ends:
            infos = tensors()
            if len(infos) != 1:
                raise CheckError(f"the model has {len(infos)} {end}s; kdbench measures one", 4)
            info = infos[0]
            found = {
                "shape": tuple(info.shape),
                "padding": tuple((lo, hi) for lo, hi in info.padding),
                "scale": float(info.scale),
                "zero_point": int(info.zero_point),
            }
            for name, value in found.items():
                expected = getattr(spec, name)
                same = (
                    abs(value - expected) <= 1e-6 * expected
                    if name == "scale"
                    else value == expected
                )
                if not same:
                    raise CheckError(
                        f"the model's {end} has {name} {value} on the device, {expected} in the "
                        "bundle: compiled model and bundle do not belong together",
                        4,
                    )

    def open_instance(self, *, double_buffer: bool = False) -> AxeleraInstance:
        """Reserve as many cores as one call needs and load a copy of the model on them.

        One thread after the other: no page says that a context takes two calls at a time.
        """
        with self._opening:
            return self._open(double_buffer)

    def _open(self, double_buffer: bool) -> AxeleraInstance:
        try:
            connection = self._context.device_connect(self._info.name, num_sub_devices=self._batch)
        except Exception as error:
            raise self._error(f"{self._info.name} does not connect", error, 6) from error
        try:
            loaded = connection.load_model_instance(
                self._model,
                num_sub_devices=self._batch,
                aipu_cores=self._batch,
                double_buffer=int(double_buffer),
                **(self.options or {}),
            )
        except Exception as error:
            connection.release()
            what = f"the model does not load on the device{self._releases()}"
            raise self._error(what, error, 1) from error
        return AxeleraInstance(
            self, connection, loaded, DOUBLE_BUFFER_DELAY if double_buffer else 0
        )

    def configuration(self) -> dict[str, str]:
        """Clocks and limits as the device has them now; empty when it does not tell."""
        try:
            return {
                k: str(v) for k, v in self._context.read_device_configuration(self._info).items()
            }
        except Exception:  # noqa: BLE001 - a figure beside the point must not end a measurement
            return {}

    def close(self) -> None:
        """Release the device and everything on it."""
        self._context.release()

    def _releases(self) -> str:
        """Both releases where they differ: 1.8 loads no model of 1.7 or before.

        No page says where a model's format version stands, so the runtime is the one to judge it.
        """
        made, here = (re.search(r"\d+\.\d+", name) for name in (self._compiled_by, self.version))
        if made and here and made[0] != here[0]:
            return (
                f" (compiled by {self._compiled_by}, here is {self.version}: compile again with "
                "this release, or install that one)"
            )
        return ""

    def _error(self, what: str, error: Exception, status: int) -> CheckError:
        """The SDK's own words; its exceptions have no documented base class."""
        if isinstance(error, CheckError):
            return error
        kind = type(error).__name__
        advice = _ADVICE.get(kind)
        return CheckError(
            f"{what}: {kind}: {error}" + (f"; {advice}" if advice else ""), 6 if advice else status
        )


class AxeleraInstance:
    """One loaded copy on its own cores."""

    def __init__(self, runtime: AxeleraRuntime, connection: Any, loaded: Any, late: int) -> None:  # noqa: ANN401 - the SDK's
        self._runtime = runtime
        self._connection = connection
        self._loaded = loaded
        self.late = late

    def run(self, source: NDArray[np.int8], target: NDArray[np.int8]) -> None:
        """One call; with double buffering `target` gets the result of two calls before."""
        try:
            self._loaded.run([source], [target])
        except Exception as error:
            raise self._runtime._error("the device failed while running", error, 6) from error

    def close(self) -> None:
        """Free the cores."""
        with self._runtime._opening:
            self._connection.release()


RUNTIMES: dict[str, type[OnnxRuntime] | type[AxeleraRuntime]] = {
    "onnxruntime": OnnxRuntime,
    "axelera": AxeleraRuntime,
}

Runtime = OnnxRuntime | AxeleraRuntime


def open_runtime(bundle: Bundle, device: str | None) -> Runtime:
    """The runtime that the bundle names.

    Raises:
        CheckError: unknown or not installed (5), no device or a busy one (6), the model does not
            load (1) or is not the bundle's (4).
    """
    kind = RUNTIMES.get(bundle.index["runtime"])
    if kind is None:
        raise CheckError(f"this kdbench has no runtime {bundle.index['runtime']!r}", 5)
    return kind(bundle, device)


def _version(library: Any) -> str:  # noqa: ANN401 - the SDK's module
    try:
        return metadata.version("axelera-rt")
    except metadata.PackageNotFoundError:
        return str(getattr(library, "__version__", "of unknown release"))


def _model_json(entry: Path, scratch: str) -> Path:
    """What the low-level runtime loads: model.json, which an .axm (a ZIP) may hold inside."""
    if entry.suffix != ".axm":
        return entry
    beside = entry.with_name("model.json")
    if beside.is_file():
        return beside
    with zipfile.ZipFile(entry) as archive:
        archive.extractall(scratch)
    found = sorted(Path(scratch).rglob("model.json"))
    if not found:
        raise FileNotFoundError(f"{entry.name} holds no model.json")
    return found[0]
