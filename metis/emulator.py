"""The backend that needs no SDK: int8 arithmetic of Metis, emulated on the host CPU.

What follows documented facts of the SDK (1.2.5 to 1.8), and what we assume, is listed in `FACTS`
and `ASSUMPTIONS`; `kdpipe doctor` prints both. Whatever is measured on this backend is an emulation
and is labelled `host-emulation`.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache, partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper

from metis import int8
from metis.backend import SCHEMES, BackendError, CompiledModel, Probe, QuantizedModel
from metis.device_tensors import device_specs, with_device_tensors
from metis.folding import Parts, prepare, with_batch
from metis.quantizer import UINT8_SHIFT, quantized_graph, watch
from metis.ranges import RangeError, Ranges, choose
from preprocessing.int8 import TensorSpec, dequantize, from_device, quantize, to_device

if TYPE_CHECKING:
    from collections.abc import Sequence

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

#: Integer kernels that add up without saturating. Without this, CPUs that lack VNNI saturate 16-bit
#: sums, and the loss that is reported is the CPU's, not the quantization's (onnxruntime's answer to
#: its issue 14642).
EXACT = {
    "session.x64quantprecision": "1",
    # Else older releases (1.18) merge a table's two grids into one of their own.
    "session.disable_double_qdq_remover": "1",
}

#: The same grid in float arithmetic: for per-channel activations, which onnxruntime's integer
#: kernels can't take, and for CPUs whose kernels fail the self-test.
SIMULATED = {"session.disable_quant_qdq": "1"}

_OBSERVERS = {
    "per_tensor_histogram": "mse",
    "per_tensor_min_max": "min_max",
    "hybrid_per_tensor_per_channel": "mse",
}

#: Frames per call of the host's int8 model.
_BATCH = 64


def observer_of(scheme: str) -> str:
    """The observer of `metis.ranges` that stands for a scheme of the SDK."""
    return _OBSERVERS[scheme]


def arithmetic(scheme: str) -> tuple[str, Mapping[str, str]]:
    """How int8 models of this scheme run on this CPU: in words, and as options for onnxruntime."""
    if scheme.startswith("hybrid"):
        return "float simulation of the int8 grid: activations per channel", SIMULATED
    if not kernels_are_exact():
        return "float simulation of the int8 grid: this CPU's int8 kernels failed the self-test", (
            SIMULATED
        )
    return "int8 kernels, equal to int32 arithmetic in the self-test", EXACT


@cache
def kernels_are_exact() -> bool:
    """Whether this CPU's integer kernels agree with plain int32 arithmetic."""
    return self_test(EXACT)


def self_test(options: Mapping[str, str]) -> bool:
    """Run two convolutions at the ends of the range, and compare every bit with `metis.int8`."""
    random = np.random.default_rng(0)
    return all(
        _convolution_agrees(random, kernel, frames, options)
        for kernel in (1, 3)
        for frames in (np.full((1, 96, 6, 6), 127), random.integers(-128, 128, (1, 96, 6, 6)))
    )


def _convolution_agrees(
    random: np.random.Generator, kernel: int, q: NDArray[Any], options: Mapping[str, str]
) -> bool:
    weight = random.choice([-127, 127], (64, q.shape[1], kernel, kernel))
    bias = random.integers(-(2**16), 2**16, 64)
    pads = [kernel // 2] * 4
    acc = int8.convolve(q, 0, weight, bias, pads=pads)
    step = np.float32(np.abs(acc).max() / 127)
    constants = {
        "one": np.float32(1),
        "middle": np.uint8(UINT8_SHIFT),
        "w": weight.astype(np.int8),
        "ones": np.ones(64, np.float32),
        "w_zero": np.zeros(64, np.int8),
        "b": bias.astype(np.int32),
        "b_zero": np.zeros(64, np.int32),
        "step": step,
    }
    make = helper.make_node
    nodes = [
        make("DequantizeLinear", ["codes", "one", "middle"], ["x"]),
        make("DequantizeLinear", ["w", "ones", "w_zero"], ["w_float"], axis=0),
        make("DequantizeLinear", ["b", "ones", "b_zero"], ["b_float"], axis=0),
        make("Conv", ["x", "w_float", "b_float"], ["y"], pads=pads),
        make("QuantizeLinear", ["y", "step", "middle"], ["made"]),
    ]
    graph = helper.make_graph(
        nodes,
        "self_test",
        [helper.make_tensor_value_info("codes", TensorProto.UINT8, q.shape)],
        [helper.make_tensor_value_info("made", TensorProto.UINT8, acc.shape)],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    session = _session(model.SerializeToString(), options)
    made = session.run(None, {"codes": (q + UINT8_SHIFT).astype(np.uint8)})[0]
    return np.array_equal(
        made.astype(np.int64) - UINT8_SHIFT, int8.requantize(acc, np.float32(1) / step, 0)
    )


class Emulator:
    """Quantizes on the grid of Metis; "compiles" by giving the model device tensors."""

    name = "emulator"

    def probe(self) -> Probe:
        """Always here: it needs what kdpipe itself is installed with."""
        return Probe(True, {name: version(name) for name in ("onnxruntime", "onnx")}, "")

    def quantize(
        self,
        student: Path,
        samples: Path,
        into: Path,
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
                chosen = Ranges.load(ranges)
            else:
                seen = watch(parts)
                seen.add(np.load(samples, mmap_mode="r")[:, 0], progress)
                chosen = choose(seen, observer_of(scheme))
            return self.write(parts, chosen, into, scheme=scheme)
        except RangeError as error:
            raise BackendError(str(error)) from error

    def write(self, parts: Parts, ranges: Ranges, into: Path, *, scheme: str) -> QuantizedModel:
        """Write the int8 model of a prepared student; `into` must not exist."""
        into.mkdir(parents=True)
        graph = quantized_graph(parts.core, ranges, scheme=scheme)
        onnx.save(graph, into / "model.onnx")
        for name, part in (("preamble", parts.preamble), ("postamble", parts.postamble)):
            if part is not None:
                onnx.save(part, into / f"{name}.onnx")
        inputs, outputs = device_specs(graph)
        made = QuantizedModel(
            path=into,
            entry="model.onnx",
            backend=self.name,
            version=version("onnxruntime"),
            scheme=scheme,
            inputs=(inputs,),
            outputs=(outputs,),
        )
        made.save()
        return made

    def infer(self, model: QuantizedModel, inputs: NDArray[np.float32]) -> NDArray[np.float32]:
        """Run the QDQ graph, and the host's parts before and after it. See `Backend`."""

        def host(name: str) -> list[Step]:
            path = model.path / name
            return [partial(_run, _session(path, {}))] if path.is_file() else []

        core = _session(model.path / model.entry, arithmetic(model.scheme)[1])
        on_grid: Step = partial(_on_grid, spec=model.inputs[0])
        run: Step = partial(_run, core)
        return _in_batches([*host("preamble.onnx"), on_grid, run, *host("postamble.onnx")], inputs)

    def compile(self, model: QuantizedModel, into: Path, *, aipu_cores: int) -> CompiledModel:
        """Give the model the tensors of a device: int8, NHWC, padded. See `Backend`."""
        into.mkdir(parents=True)
        inputs, outputs = (
            replace(spec, shape=(aipu_cores, *spec.shape[1:]))
            for spec in (model.inputs[0], model.outputs[0])
        )
        graph = with_batch(onnx.load(model.path / model.entry), aipu_cores)
        lowered = with_device_tensors(graph, inputs, outputs)
        onnx.checker.check_model(lowered)
        onnx.save(lowered, into / "model.onnx")
        ends = {}
        for end in ("preamble", "postamble"):
            if (model.path / f"{end}.onnx").is_file():
                shutil.copyfile(model.path / f"{end}.onnx", into / f"{end}.onnx")
                ends[end] = f"{end}.onnx"
        made = CompiledModel(
            path=into,
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
        made.save()
        self._check_compiled(model, made)
        return made

    def _check_compiled(self, model: QuantizedModel, compiled: CompiledModel) -> None:
        """One inference through the device tensors must give the logits of the quantized model."""
        spec = compiled.inputs[0]
        n, height, width, channels = spec.unpadded
        ramp = np.linspace(-128, 127, n * channels * height * width, dtype=np.float32)
        tensor = (ramp.reshape(n, channels, height, width) - spec.zero_point) * spec.scale
        tensor = tensor.astype(np.float32)
        codes = _run(
            _session(compiled.path / compiled.entry, compiled.session), to_device(tensor, spec)
        )
        logits = from_device(codes, compiled.outputs[0]).reshape(n, -1)
        core = _session(model.path / model.entry, arithmetic(model.scheme)[1])
        expected = _run(core, _on_grid(tensor, model.inputs[0])).reshape(n, -1)
        if not np.array_equal(logits, expected):
            raise BackendError(
                "the compiled model does not reproduce the quantized model's logits; "
                f"compare {model.entry} and {compiled.entry}"
            )


def _session(model: Path | bytes, options: Mapping[str, str]) -> ort.InferenceSession:
    chosen = ort.SessionOptions()
    chosen.log_severity_level = 3
    for key, value in options.items():
        chosen.add_session_config_entry(key, value)
    return ort.InferenceSession(
        model if isinstance(model, bytes) else str(model),
        chosen,
        providers=["CPUExecutionProvider"],
    )


def _run(session: ort.InferenceSession, batch: NDArray[Any]) -> NDArray[Any]:
    made: NDArray[Any] = session.run(None, {session.get_inputs()[0].name: batch})[0]
    return made


Step = Callable[["NDArray[np.float32]"], "NDArray[np.float32]"]


def run_graphs(
    graphs: Sequence[tuple[onnx.ModelProto | None, Mapping[str, str]]],
    frames: NDArray[np.float32],
) -> NDArray[np.float32]:
    """Run graphs with a free batch one after the other, without a file.

    Args:
        graphs: each with its options for onnxruntime; None is passed over.
        frames: float32 (N, C, H, W).

    Returns:
        Logits, float32 (N, classes).
    """
    steps = [
        partial(_run, _session(graph.SerializeToString(), options))
        for graph, options in graphs
        if graph is not None
    ]
    return _in_batches(steps, frames)


def int8_logits(
    parts: Parts, graph: onnx.ModelProto, scheme: str, frames: NDArray[np.float32]
) -> NDArray[np.float32]:
    """What `Emulator.infer` gives for this int8 graph of the core, without a file."""
    options = arithmetic(scheme)[1]
    steps: list[Step] = [
        partial(_on_grid, spec=device_specs(graph)[0]),
        partial(_run, _session(graph.SerializeToString(), options)),
    ]
    if parts.preamble is not None:
        steps.insert(0, partial(_run, _session(parts.preamble.SerializeToString(), {})))
    if parts.postamble is not None:
        steps.append(partial(_run, _session(parts.postamble.SerializeToString(), {})))
    return _in_batches(steps, frames)


def _in_batches(steps: Sequence[Step], frames: NDArray[np.float32]) -> NDArray[np.float32]:
    logits = []
    for batch in np.array_split(frames, max(1, -(-len(frames) // _BATCH))):
        made = batch
        for step in steps:
            made = step(made)
        logits.append(made.reshape(len(batch), -1))
    return np.concatenate(logits)


def _on_grid(tensor: NDArray[np.float32], spec: TensorSpec) -> NDArray[np.float32]:
    """Real values as the device input's codes carry them.

    onnxruntime rounds before it adds the zero point, the SDK after. Values that lie on the int8
    grid already come out the same either way.
    """
    return dequantize(quantize(tensor, spec.scale, spec.zero_point), spec.scale, spec.zero_point)
