"""The backend on Axelera's Voyager SDK, releases 1.6 to 1.8. Never imports the SDK.

Every verb is one child process in the SDK's interpreter, see `metis.voyager.process`; what the SDK
says there goes to the log of the stage.
"""

from __future__ import annotations

import json
import shutil
import sys
from typing import TYPE_CHECKING, Any

from metis.backend import SCHEMES, BackendError, CompiledModel, Probe, QuantizedModel, SdkOptions
from metis.voyager.artifacts import Artifacts, collect
from metis.voyager.process import find_interpreter, fresh_folder, run_in_sdk
from metis.voyager.routes import ROUTES, Order
from metis.voyager.settings import EXPORT, FLOAT_ONNX, RECORD, settings_for

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    import numpy as np
    from numpy.typing import NDArray


class Voyager:
    """Drives the SDK that `compile.sdk_python`, $KDPIPE_SDK_PYTHON or this interpreter has."""

    name = "voyager"
    emulates = False

    def __init__(self, options: SdkOptions | None = None) -> None:
        self._options = options or SdkOptions()

    def probe(self) -> Probe:
        """Releases of devkit, rt, Python and torch in the SDK's interpreter. See `Backend`."""
        interpreter = find_interpreter(self._options.python)
        versions = dict(interpreter.versions) if "axelera-devkit" in interpreter.versions else {}
        return Probe(not interpreter.problem, versions, interpreter.problem)

    def quantize(
        self,
        student: Path,
        samples: Path,
        destination: Path,
        *,
        scheme: str,
        progress: Callable[[int], object] = lambda n: None,
        ranges: Path | None = None,
    ) -> QuantizedModel:
        """Let the SDK observe the samples, and keep its export. See `Backend`."""
        if scheme not in SCHEMES:
            raise BackendError(f"the SDK has no scheme {scheme!r}; use {', '.join(SCHEMES)}")
        with fresh_folder(destination.parent) as folder:
            answer = self._work(
                "quantize",
                folder,
                progress,
                student=str(student.absolute()),
                samples=str(samples.absolute()),
                settings=settings_for(scheme, cores=1),
                export=EXPORT,
            )
            destination.mkdir(parents=True)
            shutil.move(folder / "work" / EXPORT, destination / EXPORT)
        shutil.copyfile(student, destination / FLOAT_ONNX)
        interpreter = find_interpreter(self._options.python)
        record = {"versions": interpreter.versions, **answer}
        (destination / RECORD).write_text(json.dumps(record, indent=1, sort_keys=True) + "\n")
        model = QuantizedModel(
            path=destination,
            entry=EXPORT,
            backend=self.name,
            version=interpreter.release,
            scheme=scheme,
            inputs=(),  # the SDK decides on layout and padding when it compiles
            outputs=(),
        )
        model.save()
        return model

    def infer(self, model: QuantizedModel, inputs: NDArray[np.float32]) -> NDArray[np.float32]:
        """Run the SDK's quantized model on this machine's CPU. See `Backend`."""
        import numpy as np

        from preprocessing.scores import without_positions

        with fresh_folder() as folder:
            tensors, logits = folder / "inputs.npy", folder / "logits.npy"
            np.save(tensors, np.ascontiguousarray(inputs, np.float32))
            self._work(
                "infer",
                folder,
                quantized=str((model.path / model.entry).absolute()),
                inputs=str(tensors.absolute()),
                outputs=str(logits.absolute()),
            )
            return without_positions(np.load(logits))

    def compile(
        self,
        model: QuantizedModel,
        destination: Path,
        *,
        aipu_cores: int,
        samples: Path | None = None,
        pipeline: Path | None = None,
    ) -> CompiledModel:
        """Lower the model by a route; load and run it where there is a card. See `Backend`."""
        order = Order(model, aipu_cores, samples, pipeline, self._options.extra)
        with fresh_folder(destination.parent) as folder:
            answer = ROUTES[self._options.route](self._work, order, folder)
            return self._adopt(model, folder / "work", destination, aipu_cores, answer)

    def arithmetic(self, scheme: str) -> str:
        """See `Backend`."""
        return "the SDK's"

    def runtime_python(self) -> str:
        """The SDK's interpreter, if it has the runtime; else ours. See `Backend`."""
        interpreter = find_interpreter(self._options.python)
        return interpreter.python if "axelera-rt" in interpreter.versions else sys.executable

    def runtime_versions(self) -> dict[str, str | None]:
        """Release of the runtime, which a box without the devkit may have. See `Backend`."""
        versions = find_interpreter(self._options.python).versions
        return {"axelera-rt": versions.get("axelera-rt")}

    def describe(self) -> dict[str, str]:
        """Where the SDK was looked for, and whether its compiler will find its helper program."""
        interpreter = find_interpreter(self._options.python)
        helper = "found" if interpreter.axkernelcc else "not found; compiling needs it"
        return {
            "interpreter": interpreter.python,
            "axkernelcc": helper if interpreter.versions else "not looked for",
        }

    def _adopt(
        self,
        model: QuantizedModel,
        work_folder: Path,
        destination: Path,
        cores: int,
        answer: dict[str, Any],
    ) -> CompiledModel:
        """Make a compiled model of what a compiler left in its working folder, and prove it.

        Raises:
            BackendError: there is nothing loadable, or it does not fit the quantized model.
        """
        destination.mkdir(parents=True)
        artifacts = collect(work_folder, destination)
        _check(artifacts, destination, cores)
        interpreter = find_interpreter(self._options.python)
        record = {
            "versions": interpreter.versions,
            "manifest_version": artifacts.manifest_version,
            "axm": artifacts.axm,
            "run": self._run(destination / artifacts.entry, cores),
            **answer,
        }
        (destination / RECORD).write_text(json.dumps(record, indent=1, sort_keys=True) + "\n")
        compiled_model = CompiledModel(
            path=destination,
            entry=artifacts.entry,
            backend=self.name,
            version=interpreter.release,
            runtime="axelera",
            aipu_cores=cores,
            inputs=artifacts.inputs,
            outputs=artifacts.outputs,
            preamble=artifacts.preamble,
            postamble=artifacts.postamble,
        )
        compiled_model.save()
        return compiled_model

    def _run(self, entry: Path, cores: int) -> dict[str, Any]:
        """One inference, where it can be done: a compile without an error is not a model yet."""
        if entry.suffix != ".json":
            return {"ran": False, "why": f"{entry.name} holds no model.json"}
        with fresh_folder() as folder:
            return self._work("run", folder, model=str(entry.absolute()), cores=cores)

    def _work(
        self,
        verb: str,
        folder: Path,
        progress: Callable[[int], object] = lambda n: None,
        **request: Any,  # noqa: ANN401 - JSON
    ) -> dict[str, Any]:
        return run_in_sdk(
            verb,
            {"extra": dict(self._options.extra), **request},
            folder,
            time_limit_s=self._options.time_limit_s,
            python=self._options.python,
            progress=progress,
        )


def _check(artifacts: Artifacts, folder: Path, cores: int) -> None:
    """The device tensors are those of a classifier compiled for this many cores."""
    inputs, outputs = len(artifacts.inputs), len(artifacts.outputs)
    if (inputs, outputs) != (1, 1):
        raise BackendError(
            f"the compiled model has {inputs} inputs and {outputs} outputs; "
            "kdpipe's students have one of each"
        )
    batches = {spec.unpadded[0] for spec in (*artifacts.inputs, *artifacts.outputs)}
    if batches != {cores}:
        raise BackendError(
            f"the compiled model takes {batches} frames a call, and {cores} cores were asked for"
        )
    for name in filter(None, (artifacts.entry, artifacts.preamble, artifacts.postamble)):
        if not (folder / name).is_file():
            raise BackendError(f"the compiled model lacks {name}")
