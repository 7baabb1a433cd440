"""Float tensors to the int8 tensors that the device takes and gives, and back. numpy only.

Device tensors are int8, NHWC and padded; networks see float32, NCHW and no padding.

Source: Voyager SDK 1.2.5 to 1.8, `q = clip(round(x / scale + zero_point), -128, 127)` with numpy's
half-to-even rounding; padding is added after quantizing and holds the zero point.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

INT8_MIN, INT8_MAX = -128, 127


@dataclass(frozen=True)
class TensorSpec:
    """One device tensor, as spec.json lists it."""

    name: str
    shape: tuple[int, int, int, int]  # NHWC, padding included
    padding: tuple[tuple[int, int], ...]  # (before, after) per dimension of `shape`
    scale: float  # float32 value of one int8 step
    zero_point: int  # int8 code of 0.0
    dtype: str = "int8"

    @property
    def unpadded(self) -> tuple[int, ...]:
        """The shape without padding, NHWC."""
        return tuple(
            size - before - after
            for size, (before, after) in zip(self.shape, self.padding, strict=True)
        )

    @property
    def inside(self) -> tuple[slice, ...]:
        """Where the payload lies within `shape`."""
        return tuple(
            slice(before, size - after)
            for size, (before, after) in zip(self.shape, self.padding, strict=True)
        )

    @staticmethod
    def from_json(raw: dict[str, Any]) -> TensorSpec:
        """The spec that `dataclasses.asdict` and JSON made a dictionary of."""
        n, h, w, c = raw["shape"]
        return TensorSpec(
            name=raw["name"],
            shape=(n, h, w, c),
            padding=tuple((before, after) for before, after in raw["padding"]),
            scale=float(raw["scale"]),
            zero_point=int(raw["zero_point"]),
            dtype=raw["dtype"],
        )


def quantize(tensor: NDArray[np.float32], scale: float, zero_point: int) -> NDArray[np.int8]:
    """`clip(round(x / scale + zero_point), -128, 127)`, half to even, any shape.

    Source: Voyager SDK runtime documentation.
    """
    codes = tensor / np.float32(scale)
    codes += np.float32(zero_point)
    np.rint(codes, out=codes)
    np.clip(codes, INT8_MIN, INT8_MAX, out=codes)
    result: NDArray[np.int8] = codes.astype(np.int8)
    return result


def dequantize(codes: NDArray[np.int8], scale: float, zero_point: int) -> NDArray[np.float32]:
    """`(q - zero_point) * scale`, float32, any shape."""
    result: NDArray[np.float32] = (codes.astype(np.float32) - zero_point) * np.float32(scale)
    return result


def to_device(tensor: NDArray[np.float32], spec: TensorSpec) -> NDArray[np.int8]:
    """A network's input to what the device takes: quantize, NCHW to NHWC, pad.

    Args:
        tensor: float32, (N, C, H, W).
        spec: of the device input; its padding is filled with its zero point.

    Returns:
        int8, `spec.shape`.

    Raises:
        ValueError: the tensor does not have the spec's unpadded shape.
    """
    nhwc = tensor.transpose(0, 2, 3, 1)
    if nhwc.shape != spec.unpadded:
        raise ValueError(
            f"tensor {spec.name!r} takes {spec.unpadded} (NHWC) before padding, not {nhwc.shape}"
        )
    padded = np.full(spec.shape, spec.zero_point, np.int8)
    padded[spec.inside] = quantize(nhwc, spec.scale, spec.zero_point)
    return padded


def from_device(codes: NDArray[np.int8], spec: TensorSpec) -> NDArray[np.float32]:
    """A device output to a network's output: cut the padding, NHWC to NCHW, dequantize.

    Returns:
        float32, (N, C, H, W).

    Raises:
        ValueError: the codes do not have the spec's shape.
    """
    if codes.shape != spec.shape:
        raise ValueError(f"tensor {spec.name!r} is {spec.shape} (NHWC), not {codes.shape}")
    return dequantize(codes[spec.inside].transpose(0, 3, 1, 2), spec.scale, spec.zero_point)
