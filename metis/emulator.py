"""The backend that needs no SDK: int8 arithmetic of Metis, emulated on the host CPU.

What follows documented facts of the SDK (1.2.5 to 1.8): int8 activations, asymmetric, one scale per
tensor; int8 weights, symmetric, one scale per output channel, by min-max; device tensors in NHWC,
padded, quantized by `clip(round(x / scale + zero_point), -128, 127)`.
What we assume: int32 accumulation, requantization rounded half to even, input channels padded to a
multiple of 4 and output channels to a multiple of 64.

Whatever is measured on this backend is an emulation and is labelled `host-emulation`.
"""

from __future__ import annotations

from dataclasses import replace
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import (
    CalibrationDataReader,
    CalibrationMethod,
    QuantFormat,
    QuantType,
    quantize_static,
)

from metis.backend import SCHEMES, BackendError, CompiledModel, Probe, QuantizedModel
from preprocessing.int8 import TensorSpec, dequantize, from_device, quantize, to_device

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from numpy.typing import NDArray

INPUT_CHANNELS_MULTIPLE = 4
OUTPUT_CHANNELS_MULTIPLE = 64

#: Activations are stored as uint8 codes with the zero point moved by this much: the same arithmetic
#: as int8, and the only storage for which onnxruntime fuses every convolution (onnxruntime 1.31).
UINT8_SHIFT = 128

_METHODS = {
    "per_tensor_histogram": CalibrationMethod.Percentile,
    "per_tensor_min_max": CalibrationMethod.MinMax,
}


class Emulator:
    """Quantizes with onnxruntime's quantizer; "compiles" by giving the model device tensors."""

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
    ) -> QuantizedModel:
        """Calibrate on the samples and write a QDQ graph with a free batch size. See `Backend`."""
        if scheme not in SCHEMES:
            raise BackendError(f"the emulator has no scheme {scheme!r}; use {', '.join(SCHEMES)}")
        into.mkdir(parents=True)
        tensors = np.load(samples, mmap_mode="r")
        float_model = onnx.load(student)
        free = _with_batch(float_model, "N")
        _check_same(float_model, free, np.asarray(tensors[: min(4, len(tensors))]))
        free_path = into / "float.onnx"
        onnx.save(free, free_path)
        quantize_static(
            str(free_path),
            str(into / "model.onnx"),
            _Samples(free.graph.input[0].name, tensors, progress),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            calibrate_method=_METHODS[scheme],
            # Without strides the histogram keeps every activation of every sample in memory.
            extra_options={"CalibStridedMinMax": _stride(len(tensors))},
        )
        free_path.unlink()
        inputs, outputs = _device_specs(onnx.load(into / "model.onnx"))
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
        """Run the QDQ graph with exact integer kernels. See `Backend`."""
        session = _session(model.path / model.entry)
        name = session.get_inputs()[0].name
        spec = model.inputs[0]
        logits = []
        for batch in np.array_split(inputs, max(1, len(inputs) // 64)):
            # onnxruntime rounds before it adds the zero point, the SDK after. Values that lie on
            # the int8 grid already come out the same either way.
            codes = quantize(batch, spec.scale, spec.zero_point)
            on_grid = dequantize(codes, spec.scale, spec.zero_point)
            logits.append(session.run(None, {name: on_grid})[0])
        return np.concatenate(logits)

    def compile(self, model: QuantizedModel, into: Path, *, aipu_cores: int) -> CompiledModel:
        """Give the model the tensors of a device: int8, NHWC, padded. See `Backend`."""
        into.mkdir(parents=True)
        inputs, outputs = (
            replace(spec, shape=(aipu_cores, *spec.shape[1:]))
            for spec in (model.inputs[0], model.outputs[0])
        )
        graph = _with_batch(onnx.load(model.path / model.entry), aipu_cores)
        lowered = _with_device_tensors(graph, inputs, outputs)
        onnx.checker.check_model(lowered)
        onnx.save(lowered, into / "model.onnx")
        made = CompiledModel(
            path=into,
            entry="model.onnx",
            backend=self.name,
            version=version("onnxruntime"),
            runtime="onnxruntime",
            aipu_cores=aipu_cores,
            inputs=(inputs,),
            outputs=(outputs,),
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
        session = _session(compiled.path / compiled.entry)
        codes = session.run(None, {session.get_inputs()[0].name: to_device(tensor, spec)})[0]
        logits = from_device(codes, compiled.outputs[0]).reshape(n, -1)
        if not np.array_equal(logits, self.infer(model, tensor)):
            raise BackendError(
                "the compiled model does not reproduce the quantized model's logits; "
                f"compare {model.entry} and {compiled.entry}"
            )


class _Samples(CalibrationDataReader):  # type: ignore[misc]
    """Feeds calibration tensors, (N, 1, C, H, W), one at a time and in order."""

    def __init__(
        self, name: str, tensors: NDArray[np.float32], progress: Callable[[int], object]
    ) -> None:
        self._name = name
        self._tensors = tensors
        self._progress = progress
        self._next, self._end = 0, len(tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def set_range(self, start_index: int, end_index: int) -> None:
        self._next, self._end = start_index, end_index

    def get_next(self) -> dict[str, NDArray[np.float32]] | None:
        if self._next >= self._end:
            return None
        self._next += 1
        self._progress(1)
        return {self._name: np.asarray(self._tensors[self._next - 1])}


def _stride(samples: int) -> int:
    """The largest number up to 16 that divides the number of samples; the quantizer insists."""
    return max(n for n in range(1, 17) if samples % n == 0)


def _session(path: Path) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    # Without this, CPUs that lack VNNI saturate 16-bit sums, and the loss that is reported is the
    # CPU's, not the quantization's (onnxruntime's answer to its issue 14642).
    options.add_session_config_entry("session.x64quantprecision", "1")
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def _with_batch(model: onnx.ModelProto, batch: int | str) -> onnx.ModelProto:
    """A copy whose first dimension, everywhere, is `batch`: a number, or a name for a free one."""
    result = onnx.ModelProto()
    result.CopyFrom(model)
    for value in [*result.graph.input, *result.graph.output]:
        dim = value.type.tensor_type.shape.dim[0]
        if isinstance(batch, str):
            dim.dim_param = batch
        else:
            dim.dim_value = batch
    del result.graph.value_info[:]
    targets = {node.input[1] for node in result.graph.node if node.op_type == "Reshape"}
    for initializer in result.graph.initializer:
        if initializer.name in targets:
            shape = numpy_helper.to_array(initializer).copy()
            if len(shape) and shape[0] == 1:
                shape[0] = 0  # "as in the input", which is the batch
                initializer.CopyFrom(numpy_helper.from_array(shape, initializer.name))
    return result


def _check_same(fixed: onnx.ModelProto, free: onnx.ModelProto, samples: NDArray[Any]) -> None:
    one = ort.InferenceSession(fixed.SerializeToString(), providers=["CPUExecutionProvider"])
    many = ort.InferenceSession(free.SerializeToString(), providers=["CPUExecutionProvider"])
    name = one.get_inputs()[0].name
    singles = np.concatenate([one.run(None, {name: sample})[0] for sample in samples])
    together = many.run(None, {name: np.concatenate(list(samples))})[0]
    if not np.allclose(singles, together, rtol=1e-4, atol=1e-4):
        raise BackendError("the student's graph has its batch size of 1 built in; export it anew")


def _ends(graph: onnx.GraphProto) -> tuple[onnx.NodeProto, onnx.NodeProto]:
    """The QuantizeLinear after the input and the DequantizeLinear before the output."""
    readers = [node for node in graph.node if graph.input[0].name in node.input]
    writers = [node for node in graph.node if graph.output[0].name in node.output]
    kinds = [node.op_type for node in (*readers, *writers)]
    if kinds != ["QuantizeLinear", "DequantizeLinear"]:
        raise BackendError(
            f"the quantized model's ends are {', '.join(kinds)}; a device takes int8 and gives "
            "int8, so one QuantizeLinear must follow the input and one DequantizeLinear end it"
        )
    return readers[0], writers[0]


def _device_specs(model: onnx.ModelProto) -> tuple[TensorSpec, TensorSpec]:
    """The device tensors of one frame, from the ends of a QDQ graph."""
    graph = model.graph
    first, last = _ends(graph)
    _, channels, height, width = (d.dim_value for d in graph.input[0].type.tensor_type.shape.dim)
    classes = graph.output[0].type.tensor_type.shape.dim[1].dim_value
    constants = {i.name: numpy_helper.to_array(i) for i in graph.initializer}

    def spec(
        node: onnx.NodeProto, name: str, hwc: tuple[int, int, int], multiple: int
    ) -> TensorSpec:
        height, width, channels = hwc
        padding = -channels % multiple
        return TensorSpec(
            name=name,
            shape=(1, height, width, channels + padding),
            padding=((0, 0), (0, 0), (0, 0), (0, padding)),
            scale=float(constants[node.input[1]]),
            zero_point=int(constants[node.input[2]]) - UINT8_SHIFT,
        )

    return (
        spec(first, graph.input[0].name, (height, width, channels), INPUT_CHANNELS_MULTIPLE),
        spec(last, graph.output[0].name, (1, 1, classes), OUTPUT_CHANNELS_MULTIPLE),
    )


def _with_device_tensors(
    model: onnx.ModelProto, into: TensorSpec, out: TensorSpec
) -> onnx.ModelProto:
    """Replace the float ends of a QDQ graph by the int8, NHWC, padded tensors of a device."""
    graph = model.graph
    first, last = _ends(graph)
    nodes = [node for node in graph.node if node not in (first, last)]
    before, constants_before = _device_to_codes(into, first.output[0])
    after, constants_after = _codes_to_device(out, last.input[0])
    lowered = helper.make_graph(
        [*before, *nodes, *after],
        "metis_emulation",
        [helper.make_tensor_value_info("input_int8", TensorProto.INT8, into.shape)],
        [helper.make_tensor_value_info("output_int8", TensorProto.INT8, out.shape)],
        [*graph.initializer, *constants_before, *constants_after],
    )
    result = helper.make_model(lowered, opset_imports=model.opset_import)
    result.ir_version = model.ir_version
    return result


def _device_to_codes(
    spec: TensorSpec, codes: str
) -> tuple[list[onnx.NodeProto], list[onnx.TensorProto]]:
    """int8 NHWC padded -> uint8 NCHW codes, whose zero point lies UINT8_SHIFT higher."""
    ends = np.array(spec.unpadded[3:], np.int64)
    constants = [
        numpy_helper.from_array(np.array([0], np.int64), "depad_start"),
        numpy_helper.from_array(ends, "depad_end"),
        numpy_helper.from_array(np.array([3], np.int64), "depad_axis"),
        numpy_helper.from_array(np.array(UINT8_SHIFT, np.int32), "input_shift"),
    ]
    make = helper.make_node
    nodes = [
        make("Slice", ["input_int8", "depad_start", "depad_end", "depad_axis"], ["depadded"]),
        make("Transpose", ["depadded"], ["nchw"], perm=[0, 3, 1, 2]),
        make("Cast", ["nchw"], ["nchw_wide"], to=TensorProto.INT32),
        make("Add", ["nchw_wide", "input_shift"], ["shifted"]),
        make("Cast", ["shifted"], [codes], to=TensorProto.UINT8),
    ]
    return nodes, constants


def _codes_to_device(
    spec: TensorSpec, codes: str
) -> tuple[list[onnx.NodeProto], list[onnx.TensorProto]]:
    """uint8 (N, classes) codes -> int8 (N, 1, 1, classes) padded with the zero point."""
    pads = np.array([p[0] for p in spec.padding] + [p[1] for p in spec.padding], np.int64)
    constants = [
        numpy_helper.from_array(np.array(UINT8_SHIFT, np.int32), "output_shift"),
        numpy_helper.from_array(np.array(spec.unpadded, np.int64), "output_shape"),
        numpy_helper.from_array(pads, "output_pads"),
        numpy_helper.from_array(np.array(spec.zero_point, np.int32), "output_zero"),
    ]
    make = helper.make_node
    nodes = [
        make("Cast", [codes], ["codes_wide"], to=TensorProto.INT32),
        make("Sub", ["codes_wide", "output_shift"], ["codes_int8"]),
        make("Reshape", ["codes_int8", "output_shape"], ["nhwc"]),
        make("Pad", ["nhwc", "output_pads", "output_zero"], ["padded"]),
        make("Cast", ["padded"], ["output_int8"], to=TensorProto.INT8),
    ]
    return nodes, constants
