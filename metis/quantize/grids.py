"""Int8 grids of tensors and weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import onnx

from metis.quantize.ranges import grid

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from metis.quantize.ranges import Range


#: Activations are stored as uint8 codes with the zero point moved by this much: the same arithmetic
#: as int8, and the only storage for which onnxruntime fuses every convolution (onnxruntime 1.31).
UINT8_SHIFT = 128

#: Bits of the bias code that stay free, so that the int32 accumulator can't overflow.
_BIAS_BITS = 30


def weight_scales(
    weight: NDArray[np.float32],
    bias: NDArray[np.float32] | None,
    input_scale: NDArray[np.float32],
    axis: int,
) -> NDArray[np.float32]:
    """Symmetric int8 scale per output channel: max |w| / 127, and large enough for the bias.

    A channel whose weights vanish but whose bias does not would need a bias code beyond int32; its
    scale is raised to |bias| / (2^30 * input scale), which loses nothing.

    Args:
        weight: float32; `axis` runs over the output channels.
        bias: float32, (channels,), or None.
        input_scale: of the activation that comes in: one, or one per output channel.
        axis: of the output channels.

    Returns:
        float32, (channels,).
    """
    axes = tuple(i for i in range(weight.ndim) if i != axis)
    scales = np.abs(weight).max(axis=axes).astype(np.float64) / 127
    if bias is not None:
        scales = np.maximum(scales, np.abs(bias) / (2.0**_BIAS_BITS * np.float64(input_scale)))
    scales[scales < np.finfo(np.float32).tiny] = 1.0
    result: NDArray[np.float32] = scales.astype(np.float32)
    return result


def on_grid(
    weight: NDArray[np.float32], scales: NDArray[np.float32], axis: int
) -> NDArray[np.int8]:
    """Weights as int8 codes in -127..127, half to even; shape of `weight`."""
    shape = [-1 if i == axis else 1 for i in range(weight.ndim)]
    codes: NDArray[np.int8] = np.clip(np.rint(weight / scales.reshape(shape)), -127, 127).astype(
        np.int8
    )
    return codes


def channel_axis(node: onnx.NodeProto) -> int:
    """Axis of the output channels in the weight of a compute operator."""
    return 1 if node.op_type == "ConvTranspose" else 0


@dataclass(frozen=True)
class Grid:
    """Scale and int8 zero point of a tensor; one entry, or one per channel."""

    scale: NDArray[np.float32]
    zero_point: NDArray[np.int64]


def tensor_grid(span: Range, *, per_channel: bool = False) -> Grid:
    """The grid of a range; `per_channel` uses its channels where it has some."""
    pairs = span.channels if per_channel and span.channels else ((span.lo, span.hi),)
    grids = [grid(lo, hi) for lo, hi in pairs]
    return Grid(
        np.array([scale for scale, _ in grids], np.float32),
        np.array([zero for _, zero in grids], np.int64),
    )
