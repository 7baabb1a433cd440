"""A stand-in of `axelera.compiler`: the names and the strictness of the documented API, no chip.

Its int8 is onnxruntime's own static quantization. Its release is that of the distribution
`axelera-devkit` in its interpreter; what releases do differently, it does too.

Environment:
    FAKE_FAIL       "import", "quantize", "export", "load", "infer" or "compile": that step raises
    FAKE_HANG       "quantize" or "compile": that step never ends, and leaves a helper that hangs
    FAKE_CRASH      "quantize" or "compile": the process dies there
    FAKE_SILENT     "1": compile ends without an error and without a model
    FAKE_NAMES, FAKE_DEAF   see config.py
    FAKE_RETURNS    "torch": the quantized model takes and gives torch tensors only
    FAKE_EXPORT     "str": export and load take strings only
"""

import os
import shutil
import subprocess
import threading
import zipfile
from pathlib import Path

if os.environ.get("PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION") != "python":
    raise TypeError("Descriptors cannot be created directly.")

import numpy as np
import onnx
from axelera.compiler._graphs import lower, quantize_graph, refuse_unlisted
from axelera.compiler._release import RELEASE
from axelera.compiler.config import CompilerConfig
from axelera.compiler.exceptions import QtoolsError
from axelera.compiler.quantized_model import AxeleraQuantizedModel
from axelera.compiler.told import told

__all__ = ["CompilerConfig", "compile", "quantize"]

told("import", ImportError)

_state = {"compiled": False}


def quantize(model, calibration_dataset, config, transform_fn=None):
    print("Quantizing...")
    if not isinstance(model, str | onnx.ModelProto):
        raise TypeError(f"model must be str, ModelProto or Module, not {type(model).__name__}")
    if not isinstance(config, CompilerConfig):
        raise TypeError("config must be a CompilerConfig")
    told("quantize", QtoolsError)
    graph = onnx.load(model) if isinstance(model, str) else model
    refuse_unlisted(graph.graph)
    shape = [d.dim_value for d in graph.graph.input[0].type.tensor_type.shape.dim]
    samples = []
    for item in calibration_dataset:
        sample = np.asarray(transform_fn(item) if transform_fn else item)
        if sample.dtype != np.float32 or list(sample.shape) != shape:
            raise QtoolsError(f"sample is {sample.dtype} {sample.shape}, not float32 {shape}")
        samples.append(sample)
    if not samples:
        raise QtoolsError("the calibration dataset is empty; was it used before?")
    return AxeleraQuantizedModel(quantize_graph(graph, samples, config))


def compile(model, config, output_dir):
    if not isinstance(model, AxeleraQuantizedModel):
        raise TypeError(f"model must be a quantized model, not {type(model).__name__}")
    if not isinstance(output_dir, Path):
        raise TypeError("output_dir must be a pathlib.Path")
    if threading.current_thread() is not threading.main_thread() or _state["compiled"]:
        raise RuntimeError("compile() changes state of the process: once, in the main thread")
    _state["compiled"] = True
    print("Running LowerFrontend")
    told("compile", RuntimeError)
    kernel = subprocess.run(["axkernelcc"], capture_output=True, text=True, check=True)
    if os.environ.get("FAKE_SILENT"):
        return
    _write(model, config, output_dir, kernel.stdout)


def _write(model, config, output_dir, kernel):
    cores = config.meaning("aipu_cores_used")
    if config.meaning("resources_used") < 0.25 * cores:
        raise RuntimeError("not enough resources for the cores")
    shutil.rmtree(output_dir, ignore_errors=True)
    output_dir.mkdir(parents=True)
    files = {**lower(model, cores), "kernel_function.c": kernel.encode()}
    if output_dir.is_absolute():  # what Ultralytics saw with 1.7: models that don't load
        files["core.onnx"] = b""
    name = config.meaning("model_name")
    final = "".join(f"# {k}\n" for k in config.model_fields)
    if not config.meaning("output_axm_format"):
        for file, data in files.items():
            (output_dir / file).write_bytes(data)
        (output_dir / "compiler_config_final.toml").write_text(final)
        return
    if cores != 1:
        raise RuntimeError("the axm format is for one core")
    # Pages of 1.7 say the working folder, recipes of 1.8 look below output_dir.
    place = Path() if RELEASE < (1, 8) else output_dir
    with zipfile.ZipFile(place / f"{name}.axm", "w") as archive:
        for file, data in files.items():
            archive.writestr(zipfile.ZipInfo(file), data)
    (place / "compiler_config_final.toml").write_text(final)
