"""What runs in the SDK's interpreter: reads a request, drives the SDK, writes an answer.

Started as a program by `metis.voyager.process`, in a fresh working folder. Imports the standard
library, numpy and `axelera`, nothing of ours.

Source of what it knows of the SDK: public documentation of Voyager 1.6 to 1.8. Where pages of one
release disagree (names of settings, kinds of arguments and results) it asks the installed SDK, and
its answer says which reading was right.
"""

from __future__ import annotations

import difflib
import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import traceback
from contextlib import contextmanager
from enum import Enum
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import numpy as np
    from numpy.typing import NDArray


# A program's own folder comes first on the import path, and no file of ours may answer to an import
# of the SDK's.
sys.path[:] = [p for p in sys.path if Path(p).resolve() != Path(__file__).resolve().parent]

#: What we set, and the names that pages of the SDK's documentation give it; the first that the
#: installed CompilerConfig has is used.
SETTINGS = {
    "model_name": ("model_name",),
    "scheme": ("quantization_scheme", "ptq_scheme"),
    "cores": ("aipu_cores_used", "aipu_cores"),
    "resources": ("resources_used", "resources"),
    "output_dir": ("output_dir",),
    "axm": ("output_axm_format",),
}

#: Settings that a release may lack: the reference of 1.6.1 does not list them.
OPTIONAL = ("output_dir", "axm")

#: Failures of a connection that say nothing about the model.
_NO_CARD = ("ConnectionError", "DeviceInUse", "IncompatibleDevice")


class StepError(Exception):
    """The SDK raised at this step; the cause holds its words."""


@contextmanager
def step(name: str) -> Iterator[None]:
    """Say what begins, and remember where it failed."""
    print(f"kdpipe: {name}", flush=True)
    try:
        yield
    except StepError:
        raise
    except (Exception, SystemExit) as error:
        raise StepError(name) from error


def probe() -> dict[str, Any]:
    """Releases, Python and torch of this interpreter; imports nothing of the SDK."""
    scripts = sysconfig.get_path("scripts")
    programs = os.pathsep.join(
        [str(Path(sys.executable).parent), scripts, os.environ.get("PATH", "")]
    )
    return {
        "python": ".".join(map(str, sys.version_info[:3])),
        "scripts": scripts,
        "axkernelcc": shutil.which("axkernelcc", path=programs) is not None,
        "versions": {
            name: release
            for name in ("axelera-devkit", "axelera-rt", "torch", "axelera-voyager-sdk")
            if (release := _version(name))
        },
    }


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def make_config(settings: dict[str, Any], extra: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """A CompilerConfig with these settings, and what it says when it is read back.

    pydantic may pass unknown words over in silence, so every setting is looked up among the fields
    before, and compared after.
    """
    from axelera.compiler import CompilerConfig

    fields: dict[str, tuple[str, str]] = {}  # any name of a field -> (keyword, attribute)
    for name, field in CompilerConfig.model_fields.items():
        alias = getattr(field, "validation_alias", None) or getattr(field, "alias", None)
        keyword = alias if isinstance(alias, str) else name
        fields[name] = fields[keyword] = (keyword, name)
    choices: dict[str, tuple[str, Any]] = {}  # attribute -> (keyword, value)
    for meaning, value in settings.items():
        name = next((n for n in SETTINGS[meaning] if n in fields), None)
        if name is None and meaning not in OPTIONAL:
            raise LookupError(
                f"this SDK's CompilerConfig has none of {', '.join(SETTINGS[meaning])}"
            )
        if name is not None:
            keyword, attribute = fields[name]
            choices[attribute] = (keyword, value)
    for name, value in extra.items():
        if name not in fields:
            close = difflib.get_close_matches(name, fields, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise LookupError(f"compile.extra: CompilerConfig has no field {name!r}{hint}")
        keyword, attribute = fields[name]
        if attribute in choices:
            raise LookupError(f"compile.extra: {name!r} is set by kdpipe itself")
        choices[attribute] = (keyword, value)
    config = CompilerConfig(**dict(choices.values()))
    for attribute, (_, value) in choices.items():
        actual = _plain(getattr(config, attribute))
        if actual != _plain(value):
            raise LookupError(f"{attribute}={value!r} did not take: CompilerConfig says {actual!r}")
    return config, {attribute: _plain(value) for attribute, (_, value) in sorted(choices.items())}


def _plain(value: Any) -> Any:  # noqa: ANN401 - of any field
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, tuple):
        return list(value)
    return str(value) if isinstance(value, Path) else value


def quantize(request: dict[str, Any]) -> dict[str, Any]:
    """Quantize a float ONNX, and export what came of it."""
    with step("import"):
        from axelera import compiler
    with step("configure"):
        config, settings = make_config(request["settings"], request["extra"])
    with step("quantize"):
        # A str, for a Path is in no signature; the samples are fresh in every call.
        model = compiler.quantize(request["student"], read_samples(request), config)
        if not Path(request["done"]).exists():
            raise RuntimeError("the SDK quantized without looking at one calibration sample")
    with step("export"):
        kind = _with_path(model.export, request["export"])[1]
        if not any(Path(request["export"]).iterdir()):
            raise RuntimeError("the quantized model's export is empty")
    return {"settings": settings, "export_took": kind}


def read_samples(request: dict[str, Any]) -> Iterator[NDArray[np.float32]]:
    """The calibration set in its order, float32 (1, C, H, W) each; a byte of `done` for each."""
    import numpy as np

    samples = np.load(request["samples"], mmap_mode="r")
    for sample in samples:
        yield np.array(sample, np.float32)
        with Path(request["done"]).open("ab") as done:
            done.write(b".")


def _with_path(call: Callable[[Any], Any], path: str) -> tuple[Any, str]:
    """Call with a Path, or with a str where that is refused; the documentation says neither."""
    try:
        return call(Path(path)), "Path"
    except (TypeError, AttributeError) as error:
        try:
            return call(path), "str"
        except (TypeError, AttributeError):
            raise error from None


def _load(folder: str) -> Any:  # noqa: ANN401 - the SDK's quantized model
    from axelera.compiler.quantized_model import AxeleraQuantizedModel

    return _with_path(AxeleraQuantizedModel.load, folder)[0]


def infer(request: dict[str, Any]) -> dict[str, Any]:
    """Run the quantized model on this machine's CPU, one sample after the other."""
    with step("import"):
        import axelera.compiler  # noqa: F401 - before the module below, as the SDK's examples do
    with step("load the quantized model"):
        model = _load(request["quantized"])
    with step("run the quantized model"):
        import numpy as np

        inputs = np.load(request["inputs"], mmap_mode="r")
        rows, took = [], "numpy"
        for i in range(len(inputs)):
            sample = np.array(inputs[i : i + 1], np.float32)
            if took == "numpy":
                try:
                    rows.append(_sample_logits(model(sample)))
                    continue
                except (TypeError, AttributeError):
                    if i:
                        raise
                    took = "torch"  # one page of the documentation shows arrays, another tensors
            import torch

            rows.append(_sample_logits(model(torch.from_numpy(sample))))
        np.save(request["outputs"], np.stack(rows))
    return {"took": took}


def _sample_logits(output: Any) -> NDArray[np.float32]:  # noqa: ANN401 - array or tensor, or a list
    """Logits of one sample, float32 (classes, ...): without the batch of 1, where there is one."""
    import numpy as np

    if isinstance(output, list | tuple):
        if len(output) != 1:
            raise ValueError(f"the quantized model gives {len(output)} outputs, not logits alone")
        output = output[0]
    if hasattr(output, "detach"):
        output = output.detach().cpu().numpy()
    logits = np.asarray(output, np.float32)
    if logits.ndim > 1:
        if len(logits) != 1:
            raise ValueError(f"the quantized model gives {logits.shape} for a batch of 1")
        logits = logits[0]
    if not np.isfinite(logits).all():
        raise ValueError("the quantized model gives NaN or infinity")
    return logits


def compile_model(request: dict[str, Any]) -> dict[str, Any]:
    """Lower a quantized model; the files lie in the working folder afterwards."""
    with step("import"):
        from axelera import compiler
    with step("configure"):
        config, settings = make_config(request["settings"], request["extra"])
    with step("load the quantized model"):
        model = _load(request["quantized"])
    with step("compile"):
        compiler.compile(model, config, Path(request["output_dir"]))
    return {"settings": settings}


def run_once(request: dict[str, Any]) -> dict[str, Any]:
    """Load the compiled model and run it once, where there are a runtime and a card."""
    try:
        from axelera import runtime
    except ImportError as error:
        return {"ran": False, "why": f"no axelera.runtime: {error}"}
    import numpy as np

    with runtime.Context() as context:
        try:
            devices = context.list_devices()
        except Exception as error:  # noqa: BLE001 - no driver and no card have many names
            return {"ran": False, "why": f"no device: {error}"}
        if not devices:
            return {"ran": False, "why": "no device"}
        with step("load"):
            model = context.load_model(request["model"])
        cores = request["cores"]
        try:
            connection = context.device_connect(None, cores)
        except Exception as error:
            if type(error).__name__ in _NO_CARD:
                return {"ran": False, "why": f"{type(error).__name__}: {error}"}
            raise StepError("connect") from error
        with step("run"):
            instance = connection.load_model_instance(
                model, num_sub_devices=cores, aipu_cores=cores
            )
            inputs = [np.full(t.shape, t.zero_point, np.int8) for t in model.inputs()]
            outputs = [np.zeros(t.shape, np.int8) for t in model.outputs()]
            instance.run(inputs, outputs)
    return {"ran": True, "device": devices[0].name}


def axcompile(request: dict[str, Any]) -> dict[str, Any]:
    """Quantize and compile with the SDK's command line; calibration goes through its images."""
    with step("find the program"):
        program = _require_program(shutil.which("axcompile"), "axcompile")
    with step("configure"):
        settings = make_config(request["settings"], request["extra"])[1]
        _speak([program, "--generate-config", "conf"])
        values = {name: value for name, value in settings.items() if name != "output_dir"}
        conf = _overlay_settings(Path("conf"), values)
    command = [
        *(program, "-i", request["student"], "-o", "out", "--conf", str(conf)),
        *("--imageset", request["images"], "--transform", request["transform"]),
        *("--input-shape", request["input_shape"], "--input-data-layout", "NCHW"),
        *("--color-format", "RGB", "--imreader-backend", "PIL"),
    ]
    # Whether the transform's tensor has a batch dimension is not documented: first without.
    for batched in ("", "1"):
        with step("axcompile"):
            shutil.rmtree("out", ignore_errors=True)
            problem = ""
            try:
                _speak(command, KDPIPE_BATCHED=batched, KDPIPE_DONE=request["done"])
            except RuntimeError as error:
                problem = str(error)
            status = _status(Path("out"))
            if not problem and status in ("SUCCEEDED", ""):
                break
            if batched or status not in (*_QUANTIZER_REFUSED, ""):
                raise RuntimeError(f"{status or 'no status'}: {problem}")
    with step("axcompile"):
        if not Path(request["done"]).exists():
            raise RuntimeError("it did not ask for a calibration sample, so its data were random")
    return {"settings": settings, "route": "axcompile", "transform_batch": bool(batched)}


#: Statuses of compilation_report.json that can come from a sample of the wrong rank.
_QUANTIZER_REFUSED = ("QTOOLS_ERROR", "TOP_LEVEL_QUANTIZE_ERROR")


def deploy(request: dict[str, Any]) -> dict[str, Any]:
    """Quantize and compile with deploy.py of the SDK's checkout, from a pipeline YAML."""
    with step("find the program"):
        checkout = os.environ.get("AXELERA_FRAMEWORK", "")
        script = Path(checkout) / "deploy.py"
        path = str(script) if checkout and script.is_file() else None
        program = _require_program(path, "deploy.py")
    with step("deploy.py"):
        _speak(
            [
                *(sys.executable, program, request["yaml"], "--mode", "QUANTCOMPILE"),
                *("--num-cal-images", str(request["samples"]), "--pipe", "torch"),
                *("--build-root", "build", "--data-root", request["data_root"]),
                *("--aipu-cores", str(request["cores"])),
            ]
        )
    return {"route": "deploy"}


def _require_program(path: str | None, name: str) -> str:
    if path is None:
        raise FileNotFoundError(
            f"{name} is not here; axcompile comes with axelera-devkit, deploy.py lies in the SDK's "
            "checkout, which AXELERA_FRAMEWORK names"
        )
    return path


def _speak(command: list[str], **environment: str) -> None:
    """Run a program of the SDK; what it prints, we print."""
    last_line = ""
    with subprocess.Popen(
        command,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    ) as child:
        assert child.stdout is not None
        for line in child.stdout:
            print(line, end="", flush=True)
            last_line = line.strip() or last_line
    if child.returncode:
        raise RuntimeError(f"{Path(command[0]).name} ended with {child.returncode}: {last_line}")


def _status(out: Path) -> str:
    try:
        report = json.loads((out / "compilation_report.json").read_text())
    except (OSError, ValueError):
        return ""
    return str(report.get("status", ""))


def _overlay_settings(folder: Path, settings: dict[str, Any]) -> Path:
    """Write our settings over axcompile's own defaults, in the form that this release chose."""
    path = next(iter(sorted(folder.glob("default_conf.*"))), None)
    if path is None:
        raise FileNotFoundError("axcompile --generate-config wrote no default_conf")
    text = path.read_text()
    if path.suffix == ".json":
        defaults = json.loads(text)
        absent = [name for name in settings if name not in defaults]
        text = json.dumps({**defaults, **settings}, indent=1)
    else:
        absent = []
        for name, value in settings.items():
            # Scalars and lists are written alike in JSON and TOML.
            line = f"{name} = {json.dumps(value)}".replace("\\", r"\\")
            text, count = re.subn(rf"(?m)^{re.escape(name)}\s*=.*$", line, text)
            absent += [] if count else [name]
    if absent:
        raise LookupError(f"{path.name} of axcompile has no {', '.join(absent)}")
    target = folder / f"conf{path.suffix}"
    target.write_text(text)
    return target


VERBS = {
    "quantize": quantize,
    "infer": infer,
    "compile": compile_model,
    "run": run_once,
    "axcompile": axcompile,
    "deploy": deploy,
}


def end_with_parent() -> None:
    """Leave a process that ends our whole group when kdpipe is gone, however it went.

    Standard input is a pipe that nobody writes to. Its end can't be missed, as a signal can while
    the compiler holds the interpreter.
    """
    if os.fork() == 0:
        os.read(0, 1)
        os.killpg(0, signal.SIGKILL)
    with Path(os.devnull).open() as null:
        os.dup2(null.fileno(), 0)


def main(request_file: str, answer_file: str) -> None:
    """Do what the request asks; the answer is there only when all of it was written."""
    end_with_parent()
    logging.basicConfig(level=logging.INFO, stream=sys.stdout)  # the compiler tells its phases so
    request = json.loads(Path(request_file).read_text())
    try:
        answer = VERBS[request["verb"]](request)
    except StepError as failure:
        traceback.print_exc()
        cause = failure.__cause__
        error = {"step": str(failure), "kind": type(cause).__name__, "words": str(cause)}
        answer = {"error": error}
    partial = Path(answer_file + ".partial")
    partial.write_text(json.dumps(answer))
    partial.replace(answer_file)


if __name__ == "__main__":
    if sys.argv[1:] == ["probe"]:
        print(json.dumps(probe()))
    else:
        main(*sys.argv[1:])
