"""The backend that needs no SDK: int8 arithmetic of Metis, emulated on the host CPU.

What follows documented facts of the SDK (1.2.5 to 1.8), and what we assume, is listed in `FACTS`
and `ASSUMPTIONS`; `kdpipe doctor` prints both. Whatever is measured on this backend is an emulation
and is labelled `host-emulation`.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnx

from metis.backend import SCHEMES, BackendError, CompiledModel, Probe, QuantizedModel
from metis.emulator.device_tensors import device_specs, with_device_tensors
from metis.emulator.execute import Step, put_on_grid, run_in_batches, run_session
from metis.emulator.kernels import arithmetic
from metis.graph.edit import with_batch
from metis.graph.sessions import open_session
from metis.quantize.folding import SplitGraph, prepare
from metis.quantize.placement import open_observations
from metis.quantize.qdq import quantize_graph
from metis.quantize.ranges import RangeError, Ranges, choose
from preprocessing.int8 import from_device, to_device
from preprocessing.scores import without_positions

if TYPE_CHECKING:
    from numpy.typing import NDArray


#: Documented, and followed.
FACTS = (
    "activations int8, asymmetric, one scale and zero point per tensor",
    "weights int8, one scale per output channel, by min-max",
    "hybrid scheme: inputs of depthwise convolutions per channel, by min-max",
    "device tensors NHWC, padded with the zero point, clip(round(x / scale + zero_point))",
    "non-linearities are lookup tables; ends that the chip can't run are run by the host in float",
)

#: Not documented; chosen as other int8 hardware does it.
ASSUMPTIONS = (
    "weights symmetric, codes -127 to 127; biases int32; sums int32",
    "requantization with a float32 multiplier, half to even",
    "element-wise operators are requantized to a scale of their own, pooling too",
    "ranges of the histogram scheme minimize the squared error",
    "input channels padded to a multiple of 4, output channels to a multiple of 64",
    "tables have 256 entries and are exact (SDK 1.7 has 16 segments for HardSwish)",
)


class Emulator:
    """Quantizes on the grid of Metis; "compiles" by giving the model device tensors."""

    name = "emulator"
    emulates = True

    def probe(self) -> Probe:
        """Always here: it needs what kdpipe itself is installed with."""
        return Probe(True, {name: version(name) for name in ("onnxruntime", "onnx")}, "")

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
        """Write a QDQ graph with a free batch size; observe the samples where no ranges are given.

        See `Backend`.
        """
        if scheme not in SCHEMES:
            raise BackendError(f"the emulator has no scheme {scheme!r}; use {', '.join(SCHEMES)}")
        parts = prepare(onnx.load(student))
        try:
            if ranges is not None:
                tensor_ranges = Ranges.load(ranges)
            else:
                observations = open_observations(parts)
                observations.add(np.load(samples, mmap_mode="r")[:, 0], progress)
                tensor_ranges = choose(observations, SCHEMES[scheme])
            return self.write(parts, tensor_ranges, destination, scheme=scheme)
        except RangeError as error:
            raise BackendError(str(error)) from error

    def write(
        self, parts: SplitGraph, ranges: Ranges, destination: Path, *, scheme: str
    ) -> QuantizedModel:
        """Write the int8 model of a prepared student; `destination` must not exist."""
        destination.mkdir(parents=True)
        graph = quantize_graph(parts.core, ranges, scheme=scheme)
        onnx.save(graph, destination / "model.onnx")
        for name, part in (("preamble", parts.preamble), ("postamble", parts.postamble)):
            if part is not None:
                onnx.save(part, destination / f"{name}.onnx")
        inputs, outputs = device_specs(graph)
        model = QuantizedModel(
            path=destination,
            entry="model.onnx",
            backend=self.name,
            version=version("onnxruntime"),
            scheme=scheme,
            inputs=(inputs,),
            outputs=(outputs,),
        )
        model.save()
        return model

    def infer(self, model: QuantizedModel, inputs: NDArray[np.float32]) -> NDArray[np.float32]:
        """Run the QDQ graph, and the host's parts before and after it. See `Backend`."""

        def host(name: str) -> list[Step]:
            path = model.path / name
            return [partial(run_session, open_session(path))] if path.is_file() else []

        core = open_session(model.path / model.entry, options=arithmetic(model.scheme)[1])
        on_grid: Step = partial(put_on_grid, spec=model.inputs[0])
        run: Step = partial(run_session, core)
        return run_in_batches(
            [*host("preamble.onnx"), on_grid, run, *host("postamble.onnx")], inputs
        )

    def compile(
        self,
        model: QuantizedModel,
        destination: Path,
        *,
        aipu_cores: int,
        samples: Path | None = None,
        pipeline: Path | None = None,
    ) -> CompiledModel:
        """Give the model the tensors of a device: int8, NHWC, padded. See `Backend`."""
        destination.mkdir(parents=True)
        inputs, outputs = (
            replace(spec, shape=(aipu_cores, *spec.shape[1:]))
            for spec in (model.inputs[0], model.outputs[0])
        )
        graph = with_batch(onnx.load(model.path / model.entry), aipu_cores)
        lowered = with_device_tensors(graph, inputs, outputs)
        onnx.checker.check_model(lowered)
        onnx.save(lowered, destination / "model.onnx")
        ends = {}
        for end in ("preamble", "postamble"):
            if (model.path / f"{end}.onnx").is_file():
                shutil.copyfile(model.path / f"{end}.onnx", destination / f"{end}.onnx")
                ends[end] = f"{end}.onnx"
        compiled_model = CompiledModel(
            path=destination,
            entry="model.onnx",
            backend=self.name,
            version=version("onnxruntime"),
            runtime="onnxruntime",
            aipu_cores=aipu_cores,
            inputs=(inputs,),
            outputs=(outputs,),
            session=dict(arithmetic(model.scheme)[1]),
            **ends,
        )
        compiled_model.save()
        self._check_compiled(model, compiled_model)
        return compiled_model

    def arithmetic(self, scheme: str) -> str:
        """How this CPU computes what the chip computes. See `Backend`."""
        return arithmetic(scheme)[0]

    def runtime_python(self) -> str:
        """Ours. See `Backend`."""
        return sys.executable

    def runtime_versions(self) -> dict[str, str | None]:
        """Nothing beyond onnxruntime, which kdpipe itself needs. See `Backend`."""
        return {}

    def describe(self) -> dict[str, str]:
        """Which statements about the chip it follows, and how this CPU runs it. See `Backend`."""
        return {
            "arithmetic": self.arithmetic("per_tensor_histogram"),
            **{f"documented {i}": fact for i, fact in enumerate(FACTS, 1)},
            **{f"assumed {i}": assumption for i, assumption in enumerate(ASSUMPTIONS, 1)},
        }

    def _check_compiled(self, model: QuantizedModel, compiled: CompiledModel) -> None:
        """One inference through the device tensors must give the logits of the quantized model."""
        spec = compiled.inputs[0]
        n, height, width, channels = spec.unpadded
        ramp = np.linspace(-128, 127, n * channels * height * width, dtype=np.float32)
        tensor = (ramp.reshape(n, channels, height, width) - spec.zero_point) * spec.scale
        tensor = tensor.astype(np.float32)
        codes = run_session(
            open_session(compiled.path / compiled.entry, options=compiled.session),
            to_device(tensor, spec),
        )
        logits = without_positions(from_device(codes, compiled.outputs[0]))
        core = open_session(model.path / model.entry, options=arithmetic(model.scheme)[1])
        expected = without_positions(run_session(core, put_on_grid(tensor, model.inputs[0])))
        if not np.array_equal(logits, expected):
            raise BackendError(
                "the compiled model does not reproduce the quantized model's logits; "
                f"compare {model.entry} and {compiled.entry}"
            )
