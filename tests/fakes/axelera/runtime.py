"""A stand-in of `axelera.runtime`: the names and the strictness of the documented API, no chip.

A model is a `model.json` with `manifest.json` (the keys that the SDK's own code reads) and
`core.onnx` (int8, NHWC, padded, in and out) beside it; core.onnx runs in onnxruntime. What the
documentation forbids raises here: two threads on one instance, another dtype or shape, padding that
does not hold the zero point, more cores than a chip has, an object whose parent was released.

Environment, read at every call:
    FAKE_DEVICES       how many devices there are (1)
    FAKE_BUSY          "1": another process holds the cores
    FAKE_FAIL          "list", "connect", "load", "instance" or "run": InternalError at that call
    FAKE_LATENCY_MS    a run takes at least this long (0); with double buffering a fifth less
    FAKE_CLOCK         clock_profile in the device's configuration (800); "800,400": it changes
    FAKE_DELAY         how many runs later results arrive with double buffering (2, as documented)
    FAKE_CACHE         "1": an input that was seen before is answered from memory
    FAKE_OLDEST        oldest format of a model that loads; model.json of the stand-in's own has it
    FAKE_RELEASE       what the package says it is
    FAKE_HIDE          "1": onnxruntime, which this file itself uses, is not installed for others
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections import deque
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnxruntime

if TYPE_CHECKING:
    from collections.abc import Iterator

__version__ = os.environ.get("FAKE_RELEASE", "0-stand-in")

CORES = 4


class ConnectionError(Exception):
    pass


class DeviceInUse(Exception):  # noqa: N818 - the SDK's own name
    pass


class InternalError(Exception):
    pass


class InvalidArgument(Exception):  # noqa: N818 - the SDK's own name
    pass


@dataclass(frozen=True)
class DeviceInfo:
    name: str
    subdevice_count: int = CORES
    board_type: str = "unknown"
    board_revision: int = 0
    firmware_version: str = "stand-in"
    flashed_firmware_version: str = "stand-in"
    board_controller_firmware_version: str = "stand-in"
    board_controller_board_type: str = "unknown"


@dataclass(frozen=True)
class TensorInfo:
    shape: tuple[int, ...]
    dtype: type
    name: str
    padding: list[tuple[int, int]]
    scale: float
    zero_point: int

    @property
    def size(self) -> int:
        return int(np.prod(self.shape))

    @property
    def unpadded_shape(self) -> tuple[int, ...]:
        return tuple(s - a - b for s, (a, b) in zip(self.shape, self.padding, strict=True))


class _Object:
    """A node in the tree of parents; what is released takes its children along."""

    def __init__(self, parent: _Object | None) -> None:
        self._children: list[_Object] = []
        self._alive = True
        if parent:
            parent._check()
            parent._children.append(self)

    def _check(self) -> None:
        if not self._alive:
            raise InvalidArgument(f"{type(self).__name__} was released")

    def release(self) -> None:
        for child in self._children:
            child.release()
        self._alive = False


class Context(_Object):
    def __init__(self) -> None:
        super().__init__(None)
        if _env("FAKE_HIDE", 0):
            sys.modules["onnxruntime"] = None
        self.free = CORES
        self._looks = 0
        self._call = threading.Lock()
        self.lock = threading.Lock()

    def __enter__(self) -> Context:
        return self

    def __exit__(self, *error: object) -> None:
        self.release()

    def list_devices(self) -> list[DeviceInfo]:
        self._check()
        _fail_if("list")
        return [DeviceInfo(f"metis-0:{n}:0") for n in range(1, _env("FAKE_DEVICES", 1) + 1)]

    def read_device_configuration(self, device: DeviceInfo) -> dict[str, str]:
        self._check()
        self._looks += 1
        clocks = os.environ.get("FAKE_CLOCK", "800").split(",")
        # The idle clock is invented: a configuration may hold more than what was set.
        idle = {"idle_clock": str(self._looks)}
        return {"clock_profile": clocks[min(self._looks, len(clocks)) - 1], **idle}

    def load_model(self, path: str | Path) -> Model:
        _fail_if("load")
        if Path(path).suffix != ".json":
            raise InvalidArgument(f"{path} is no model.json")
        return Model(self, Path(path))

    def device_connect(
        self, device: int | str | None = None, num_sub_devices: int = 1, **options: object
    ) -> Connection:
        names = [info.name for info in self.list_devices()]
        if isinstance(device, str) and device not in names:
            raise ConnectionError(f"no device {device}")
        if not names:
            raise ConnectionError("no device")
        _fail_if("connect")
        with self.alone():
            return Connection(self, num_sub_devices)

    @contextmanager
    def alone(self) -> Iterator[None]:
        """No page says that a context takes two calls at a time, so here it does not."""
        if not self._call.acquire(blocking=False):
            raise InternalError("two calls of one context at a time")
        try:
            time.sleep(0.005)
            yield
        finally:
            self._call.release()


class Model(_Object):
    def __init__(self, context: Context, path: Path) -> None:
        super().__init__(context)
        raw = json.loads((path.parent / "manifest.json").read_text())
        found, oldest = json.loads(path.read_text()).get("axmodel", 5), _env("FAKE_OLDEST", 4)
        if found < oldest:  # the words of release 1.8
            raise InternalError(
                f"Unsupported model version: {found}.0, expected at least {oldest}.0"
            )
        self._tensors = {
            end: [
                TensorInfo(
                    shape=tuple(shape),
                    dtype=np.int8,
                    name=f"{end}_{n}",
                    padding=[(pads[2 * d], pads[2 * d + 1]) for d in range(4)],
                    scale=scale,
                    zero_point=zero_point,
                )
                for n, (shape, pads, (scale, zero_point)) in enumerate(
                    zip(
                        raw[f"{end}_shapes"],
                        raw[f"n_padded_ch_{end}s"],
                        raw[f"{'de' if end == 'output' else ''}quantize_params"],
                        strict=True,
                    )
                )
            ]
            for end in ("input", "output")
        }
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 3
        options.add_session_config_entry("session.x64quantprecision", "1")
        self.core = onnxruntime.InferenceSession(
            str(path.parent / "core.onnx"), options, providers=["CPUExecutionProvider"]
        )
        self.preamble_graph = raw.get("preprocess_graph") or ""
        self.postamble_graph = raw.get("postprocess_graph") or ""
        self.input_tensor_layout = raw["input_tensor_layout"]

    def inputs(self) -> list[TensorInfo]:
        return list(self._tensors["input"])

    def outputs(self) -> list[TensorInfo]:
        return list(self._tensors["output"])


class Connection(_Object):
    def __init__(self, context: Context, cores: int) -> None:
        super().__init__(context)
        self.context, self.cores = context, cores
        with context.lock:
            if _env("FAKE_BUSY", 0) or cores > context.free:
                raise DeviceInUse(f"{cores} cores wanted, {context.free} free")
            context.free -= cores

    def release(self) -> None:
        if self._alive:
            with self.context.lock:
                self.context.free += self.cores
        super().release()

    def load_model_instance(self, model: Model, **options: int) -> ModelInstance:
        _fail_if("instance")
        known = {
            "num_sub_devices", "aipu_cores", "double_buffer", "input_dmabuf", "output_dmabuf",
            "host_profiling", "device_profiling", "elf_in_ddr",
        }  # fmt: skip
        if unknown := set(options) - known:
            raise InvalidArgument(f"unknown options {sorted(unknown)}")
        batch = model.inputs()[0].shape[0]
        if not batch == self.cores == options.get("num_sub_devices") == options.get("aipu_cores"):
            raise InvalidArgument(f"batch {batch} needs {batch} sub-devices and AIPU cores")
        with self.context.alone():
            return ModelInstance(self, model, bool(options.get("double_buffer", 0)))


class ModelInstance(_Object):
    def __init__(self, connection: Connection, model: Model, double_buffer: bool) -> None:
        super().__init__(connection)
        model._check()
        self._model = model
        self._thread = threading.get_ident()
        self._late: deque[np.ndarray] | None = deque() if double_buffer else None
        self._seen: dict[bytes, np.ndarray] = {}

    def run(self, inputs: list[np.ndarray], outputs: list[np.ndarray]) -> None:
        self._check()
        _fail_if("run")
        if threading.get_ident() != self._thread:
            raise InvalidArgument("an instance belongs to one thread")
        for arrays, infos in ((inputs, self._model.inputs()), (outputs, self._model.outputs())):
            for array, info in zip(arrays, infos, strict=True):
                if array.dtype != np.int8 or array.shape != info.shape:
                    raise InvalidArgument(f"{info.name} is {array.dtype} {array.shape}")
                if not array.flags.c_contiguous:
                    raise InvalidArgument(f"{info.name} is not contiguous")
        (source,), (info,) = inputs, self._model.inputs()
        inside = tuple(slice(a, s - b) for s, (a, b) in zip(info.shape, info.padding, strict=True))
        outside = np.ones(info.shape, bool)
        outside[inside] = False
        if not (source[outside] == info.zero_point).all():
            raise InvalidArgument(f"the padding of {info.name} does not hold {info.zero_point}")
        start = time.perf_counter()
        if _env("FAKE_CACHE", 0) and source.tobytes() in self._seen:
            outputs[0][...] = self._seen[source.tobytes()]
            return
        core = self._model.core
        (result,) = core.run(None, {core.get_inputs()[0].name: source})
        shortest = _env("FAKE_LATENCY_MS", 0.0) / 1e3 * (1.0 if self._late is None else 0.8)
        time.sleep(max(0.0, shortest - (time.perf_counter() - start)))
        if self._late is None:
            outputs[0][...] = self._seen[source.tobytes()] = result
            return
        self._late.append(result)
        outputs[0][...] = self._late.popleft() if len(self._late) > _env("FAKE_DELAY", 2) else 77


def _env(name: str, default: float) -> float:
    return type(default)(os.environ.get(name, default))


def _fail_if(call: str) -> None:
    if os.environ.get("FAKE_FAIL") == call:
        raise InternalError(f"the stand-in was told to fail at {call}")
