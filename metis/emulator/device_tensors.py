"""An int8 graph between float ends, given the tensors of a device: int8, NHWC, padded."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from metis.backend import BackendError
from metis.graph.edit import constants_of
from metis.quantize.grids import UINT8_SHIFT
from preprocessing.int8 import TensorSpec

INPUT_CHANNELS_MULTIPLE = 4

OUTPUT_CHANNELS_MULTIPLE = 64


def _ends_of(graph: onnx.GraphProto) -> tuple[onnx.NodeProto, onnx.NodeProto]:
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


def device_specs(model: onnx.ModelProto) -> tuple[TensorSpec, TensorSpec]:
    """The device tensors of one frame, from the ends of a QDQ graph."""
    graph = model.graph
    first, last = _ends_of(graph)
    _, channels, height, width = (d.dim_value for d in graph.input[0].type.tensor_type.shape.dim)
    _, classes, *sides = (d.dim_value for d in graph.output[0].type.tensor_type.shape.dim)
    constants = constants_of(model)

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
        spec(
            last,
            graph.output[0].name,
            (*(sides if len(sides) == 2 else (1, 1)), classes),
            OUTPUT_CHANNELS_MULTIPLE,
        ),
    )


def with_device_tensors(
    model: onnx.ModelProto, input_spec: TensorSpec, output_spec: TensorSpec
) -> onnx.ModelProto:
    """Replace the float ends of a QDQ graph by the int8, NHWC, padded tensors of a device."""
    graph = model.graph
    first, last = _ends_of(graph)
    nodes = [node for node in graph.node if node not in (first, last)]
    input_nodes, input_constants = _device_to_codes(input_spec, first.output[0])
    output_nodes, output_constants = _codes_to_device(output_spec, last.input[0])
    lowered = helper.make_graph(
        [*input_nodes, *nodes, *output_nodes],
        "metis_emulation",
        [helper.make_tensor_value_info("input_int8", TensorProto.INT8, input_spec.shape)],
        [helper.make_tensor_value_info("output_int8", TensorProto.INT8, output_spec.shape)],
        [*graph.initializer, *input_constants, *output_constants],
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
    """uint8 codes, (N, classes) or NCHW -> int8 NHWC padded with the zero point."""
    n, height, width, channels = spec.unpadded
    nchw = (n, channels, height, width)
    pads = np.array([p[0] for p in spec.padding] + [p[1] for p in spec.padding], np.int64)
    constants = [
        numpy_helper.from_array(np.array(UINT8_SHIFT, np.int32), "output_shift"),
        numpy_helper.from_array(np.array(nchw, np.int64), "output_shape"),
        numpy_helper.from_array(pads, "output_pads"),
        numpy_helper.from_array(np.array(spec.zero_point, np.int32), "output_zero"),
    ]
    make = helper.make_node
    nodes = [
        make("Cast", [codes], ["codes_wide"], to=TensorProto.INT32),
        make("Sub", ["codes_wide", "output_shift"], ["codes_int8"]),
        make("Reshape", ["codes_int8", "output_shape"], ["output_nchw"]),
        make("Transpose", ["output_nchw"], ["nhwc"], perm=[0, 2, 3, 1]),
        make("Pad", ["nhwc", "output_pads", "output_zero"], ["padded"]),
        make("Cast", ["padded"], ["output_int8"], to=TensorProto.INT8),
    ]
    return nodes, constants
