"""Which of ONNX Runtime's kernels compute exactly as the chip, tested on this processor."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
from onnx import TensorProto, helper, numpy_helper

from metis.graph.sessions import open_session
from metis.quantize import arithmetic as int8
from metis.quantize.grids import UINT8_SHIFT

if TYPE_CHECKING:
    from numpy.typing import NDArray


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
    """Run two convolutions at the ends of the range, and compare every bit with plain integers."""
    random = np.random.default_rng(0)
    return all(
        _convolution_agrees(random, kernel, frames, options)
        for kernel in (1, 3)
        for frames in (np.full((1, 96, 6, 6), 127), random.integers(-128, 128, (1, 96, 6, 6)))
    )


def _convolution_agrees(
    random: np.random.Generator, kernel: int, x_codes: NDArray[Any], options: Mapping[str, str]
) -> bool:
    weight = random.choice([-127, 127], (64, x_codes.shape[1], kernel, kernel))
    bias = random.integers(-(2**16), 2**16, 64)
    pads = [kernel // 2] * 4
    acc = int8.convolve(x_codes, 0, weight, bias, pads=pads)
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
        [helper.make_tensor_value_info("codes", TensorProto.UINT8, x_codes.shape)],
        [helper.make_tensor_value_info("made", TensorProto.UINT8, acc.shape)],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    session = open_session(model, options=options)
    codes = session.run(None, {"codes": (x_codes + UINT8_SHIFT).astype(np.uint8)})[0]
    return np.array_equal(
        codes.astype(np.int64) - UINT8_SHIFT, int8.requantize(acc, np.float32(1) / step, 0)
    )
