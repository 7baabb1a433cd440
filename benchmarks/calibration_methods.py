"""One calibration in a process of its own; started by calibration.py, also with other pythons.

    python benchmarks/calibration_methods.py METHOD MODEL.onnx CROPS_FOLDER COUNT INT8.onnx

Prints one line of JSON: CPU seconds (user and system) of everything between the float file and the
int8 file, and the peak of resident memory above that of a float session after one inference, which
stays open. Imports count in neither. The process runs on one core, and may hold 8 GB.

All methods: uint8 or int8 activations per tensor, int8 weights per output channel, QDQ. The file
imports nothing of kdpipe where the method is not kdpipe's: NNCF and Quark have their own venvs.
"""

from __future__ import annotations

import json
import os
import resource
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort

LIMIT_GB = 8

#: Crops that kdpipe reads from disk at a time; the others ask for them one by one.
_READ = 4


@dataclass(frozen=True)
class Crops:
    """Calibration tensors on disk, one .npy file each, (1, C, H, W); never all in memory."""

    folder: Path
    count: int

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[np.ndarray]:
        return (np.load(path) for path in sorted(self.folder.iterdir())[: self.count])


Calibrate = Callable[[Path, Crops, Path], None]


def kdpipe(observer: str = "mse", correct_bias: bool = True) -> Calibrate:
    """What `kdpipe calibrate` does: bake, then the emulator's graph."""
    from metis.quantize.folding import prepare
    from metis.quantize.qdq import quantize_graph

    def calibrate(model: Path, crops: Crops, into: Path) -> None:
        baked, ranges = _baked(model, crops, observer, correct_bias)
        core = prepare(baked).core
        onnx.save(quantize_graph(core, ranges, scheme="per_tensor_histogram"), into)

    return calibrate


def _baked(
    model: Path, crops: Crops, observer: str, correct_bias: bool
) -> tuple[onnx.ModelProto, Any]:
    from metis.quantize.baking import bake_weights
    from metis.quantize.folding import prepare
    from metis.quantize.placement import open_observations
    from metis.quantize.ranges import choose

    parts = prepare(onnx.load(model))
    seen = open_observations(parts)
    some: list[np.ndarray] = []
    for number, crop in enumerate(crops, 1):
        some.append(crop)
        if len(some) == _READ or number == len(crops):
            seen.add(np.concatenate(some), lambda n: None)
            some = []
    ranges = choose(seen, observer)
    return bake_weights(parts, seen, ranges, correct_bias=correct_bias), ranges


def onnxruntime(method: str) -> Calibrate:
    """`quantize_static` with its defaults, but per channel and QUInt8 activations."""
    from onnxruntime import quantization

    def calibrate(model: Path, crops: Crops, into: Path) -> None:
        quantization.quantize_static(
            model,
            into,
            _Reader(crops, _input_of(model)),
            per_channel=True,
            activation_type=quantization.QuantType.QUInt8,
            weight_type=quantization.QuantType.QInt8,
            calibrate_method=quantization.CalibrationMethod[method],
        )

    return calibrate


class _Reader:
    """What onnxruntime and Quark call a CalibrationDataReader."""

    def __init__(self, crops: Crops, name: str) -> None:
        self._crops, self._name = crops, name
        self.rewind()

    def rewind(self) -> None:
        self._feeds = ({self._name: crop} for crop in self._crops)

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self._feeds, None)


def baked_then_onnxruntime() -> Calibrate:
    """kdpipe's baked float file, then onnxruntime's MinMax as anybody would use it."""
    import metis.quantize.qdq  # noqa: F401  imports do not count

    minmax = onnxruntime("MinMax")

    def calibrate(model: Path, crops: Crops, into: Path) -> None:
        handed_over = into.with_suffix(".float.onnx")
        onnx.save(_baked(model, crops, "mse", True)[0], handed_over)
        minmax(handed_over, crops, into)

    return calibrate


def nncf() -> Calibrate:
    """`nncf.quantize` with its defaults (fast bias correction among them)."""
    import nncf as tool

    def calibrate(model: Path, crops: Crops, into: Path) -> None:
        name = _input_of(model)
        dataset = tool.Dataset(crops, lambda crop: {name: crop})
        onnx.save(tool.quantize(onnx.load(model), dataset, subset_size=len(crops)), into)

    return calibrate


def quark() -> Calibrate:
    """MinMax, uint8 activations, int8 weights per channel; the other options are of its A8W8."""
    from quark.onnx import ModelQuantizer
    from quark.onnx.quantization.config.config import QConfig
    from quark.onnx.quantization.config.spec import (
        CalibMethod,
        Int8Spec,
        QLayerConfig,
        QuantGranularity,
        UInt8Spec,
    )

    layer = QLayerConfig(
        activation=UInt8Spec(calibration_method=CalibMethod.MinMax),
        weight=Int8Spec(
            calibration_method=CalibMethod.MinMax, quant_granularity=QuantGranularity.Channel
        ),
    )
    options = {"AlignSlice": False, "FoldRelu": True, "AlignConcat": True}

    def calibrate(model: Path, crops: Crops, into: Path) -> None:
        quantizer = ModelQuantizer(QConfig(global_config=layer, extra_options=options))
        quantizer.quantize_model(str(model), str(into), _Reader(crops, _input_of(model)))

    return calibrate


METHODS: dict[str, Callable[[], Calibrate]] = {
    "kdpipe": kdpipe,
    "kdpipe min-max": partial(kdpipe, "min_max"),
    "kdpipe without bias correction": partial(kdpipe, "mse", False),
    "onnxruntime MinMax": partial(onnxruntime, "MinMax"),
    "onnxruntime Percentile": partial(onnxruntime, "Percentile"),
    "onnxruntime Entropy": partial(onnxruntime, "Entropy"),
    "baked + onnxruntime MinMax": baked_then_onnxruntime,
    "NNCF": nncf,
    "Quark MinMax": quark,
}


def _input_of(model: Path) -> str:
    name: str = onnx.load(model, load_external_data=False).graph.input[0].name
    return name


def _cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def _peak_mb() -> float:
    """Highest resident memory so far; ru_maxrss would start at the parent's, which it inherits."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


def _out_of_memory(error: Exception) -> bool:
    """numpy's MemoryError, or onnxruntime's and the standard library's words for it."""
    words = str(error).lower()
    return isinstance(error, MemoryError) or "bad_alloc" in words or "allocate memory" in words


def measure(method: str, model: Path, crops: Crops, into: Path) -> dict[str, Any]:
    """Calibrate once; the figures that calibration.py reads."""
    calibrate = METHODS[method]()
    session = ort.InferenceSession(str(model), providers=["CPUExecutionProvider"])
    session.run(None, {session.get_inputs()[0].name: next(iter(crops))})
    base, start = _peak_mb(), _cpu_seconds()
    try:
        calibrate(model, crops, into)
    except Exception as error:
        if not _out_of_memory(error):
            raise
        return {"stopped": f"stopped at {LIMIT_GB} GB", "cpu_s": _cpu_seconds() - start}
    return {"cpu_s": _cpu_seconds() - start, "extra_mb": _peak_mb() - base}


if __name__ == "__main__":
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    resource.setrlimit(resource.RLIMIT_DATA, (LIMIT_GB << 30, LIMIT_GB << 30))
    name, model_file, folder, samples, int8_file = sys.argv[1:]
    given = Crops(Path(folder), int(samples))
    print(json.dumps(measure(name, Path(model_file), given, Path(int8_file))))
