"""What an int8 convolution of Metis computes, in plain int32 numpy: the emulator's reference.

Slow and obvious. Codes are int8 in int64 arrays, NCHW; `scale` and `zero` belong to a tensor. The
other operators are in `tests/integer_network.py`.

    acc = sum (q_x - z_x) * q_w + q_b                        int32
    q_y = clip(rint(float32(acc) * float32(s_x * s_w / s_y)) + z_y, -128, 127), half to even

Documented (Voyager SDK 1.2.5 to 1.8): int8 codes, asymmetric activations per tensor, weights per
output channel by min-max, `clip(round(x / scale + zero_point), -128, 127)`. Assumed: the width of
accumulator and multiplier, where element-wise operators are requantized, rounding half to even.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    Array = NDArray[Any]


def requantize(acc: Array, multiplier: Array | np.float32, zero: int) -> Array:
    """Accumulators to codes; the multiplier is float32, one or one per channel (axis 1)."""
    factor = np.asarray(multiplier, np.float32)
    if factor.ndim == 1:
        factor = factor.reshape(-1, *[1] * (acc.ndim - 2))
    codes: Array = np.clip(np.rint(acc.astype(np.float32) * factor) + zero, -128, 127)
    return codes.astype(np.int64)


def convolve(
    q: Array,
    zero: int,
    weight: Array,
    bias: Array | None,
    *,
    strides: Sequence[int] = (1, 1),
    pads: Sequence[int] = (0, 0, 0, 0),
    dilations: Sequence[int] = (1, 1),
    group: int = 1,
) -> Array:
    """Accumulators of a convolution, int64 (N, out, H, W); checked to fit into int32.

    Args:
        q: codes (N, in, H, W).
        zero: zero point of the input, which is also what it is padded with.
        weight: codes (out, in / group, kh, kw).
        bias: codes (out,), or None.
        strides: of rows and columns.
        pads: top, left, bottom, right.
        dilations: of rows and columns.
        group: number of groups.
    """
    top, left, bottom, right = pads
    x = np.pad(q - zero, ((0, 0), (0, 0), (top, bottom), (left, right)))
    out, per_group, kh, kw = weight.shape
    height = (x.shape[2] - (kh - 1) * dilations[0] - 1) // strides[0] + 1
    width = (x.shape[3] - (kw - 1) * dilations[1] - 1) // strides[1] + 1
    acc = np.zeros((len(x), out, height, width), np.int64)
    for g in range(group):
        outputs = slice(g * out // group, (g + 1) * out // group)
        part = x[:, g * per_group : (g + 1) * per_group]
        for i in range(kh):
            for j in range(kw):
                rows = slice(i * dilations[0], i * dilations[0] + height * strides[0], strides[0])
                cols = slice(j * dilations[1], j * dilations[1] + width * strides[1], strides[1])
                taps = weight[outputs, :, i, j]
                acc[:, outputs] += np.einsum("nihw,oi->nohw", part[:, :, rows, cols], taps)
    return _int32(acc if bias is None else acc + bias.reshape(-1, 1, 1))


def _int32(acc: Array) -> Array:
    if np.abs(acc).max(initial=0) >= 2**31:
        raise OverflowError("an accumulator does not fit into int32")
    return acc
