"""How far float32 lets two ways to compute the same number lie apart, on any processor.

A sum of n products in float32 differs from the exact one by at most `n u / (1 - n u)` times the sum
of their absolute values, u = 2^-24, in whatever order it is added up, with fused multiply-adds or
without them, in any number of lanes and threads (Higham 2002, section 3.1). Kernels that multiply
transformed tensors (Winograd, FFT) do not keep this; neither torch nor onnxruntime chooses one on a
CPU by itself.
"""

import numpy as np
import torch

from metis.quantize.folding import COMPUTE

#: float32 rounds a result by at most this share of it.
UNIT = 2.0**-24

#: Roundings besides those of a sum, generously: scales and their products, operands that come from
#: codes, exp and tanh of whatever library.
_OTHERS = 32

#: Operators whose values near 0 come out of numbers near 1.
_FUNCTIONS = ("HardSigmoid", "HardSwish", "Selu", "Sigmoid", "Softmax", "Tanh")


def widest(kind, operator, given, inputs):
    """The most by which float32 results of an operator can lie apart, element by element.

    Args:
        kind: of the operator, as ONNX calls it.
        operator: the function in torch, `operator(given, *inputs)`.
        given: its attributes.
        inputs: equal for both results, to the bit.

    Returns:
        float64, an array per output.
    """
    sizes = [
        x.detach().double().abs() if torch.is_tensor(x) and x.is_floating_point() else x
        for x in inputs
    ]
    terms = 1
    if kind in COMPUTE:
        weight, group = sizes[1], given.get("group", 1)
        outputs = weight.shape[1] * group if kind == "ConvTranspose" else weight.shape[0]
        terms = weight.numel() // outputs + 1
    elif kind in ("AveragePool", "GlobalAveragePool"):
        terms = sizes[0].shape[2] * sizes[0].shape[3]
    total = sizes[0] + sizes[1] if kind == "Sub" else operator(given, *sizes)
    share = (terms + _OTHERS) * UNIT / (1 - (terms + _OTHERS) * UNIT)
    parts = total if isinstance(total, tuple) else (total,)
    return [2 * share * (part.abs().numpy() + (kind in _FUNCTIONS)) for part in parts]


def assert_codes(codes, values, scale, zero_point, apart):
    """Codes are those of real values, but where a value lies between two codes.

    Args:
        codes: int8, of values that may lie `apart` from these.
        values: float32, before they are rounded to the grid.
        scale: of the grid.
        zero_point: of the grid.
        apart: by how much, in the unit of the values.
    """
    exact = np.clip(values.astype(np.float64) / scale + zero_point, -128, 127)
    # Dividing by the scale and adding the zero point are rounded too; all that counts is below 256.
    allowed = 0.5 + apart / scale + 4 * 256 * UNIT
    wrong = np.abs(exact - codes) > allowed
    assert not wrong.any(), f"{wrong.sum()} of {wrong.size} codes are not those of their values"
