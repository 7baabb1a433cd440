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
    return _round_to_grid(tensor, scale, zero_point).astype(np.int8)


def _round_to_grid(
    tensor: NDArray[np.float32],
    scale: float,
    zero_point: int,
    out: NDArray[np.float32] | None = None,
) -> NDArray[np.float32]:
    """The codes of `quantize`, still as float32."""
    codes: NDArray[np.float32] = np.divide(tensor, np.float32(scale), out=out)
    codes += np.float32(zero_point)
    np.rint(codes, out=codes)
    np.clip(codes, INT8_MIN, INT8_MAX, out=codes)
    return codes


def dequantize(
    codes: NDArray[np.int8],
    scale: float,
    zero_point: int,
    out: NDArray[np.float32] | None = None,
) -> NDArray[np.float32]:
    """`(q - zero_point) * scale`, float32, any shape; written into `out` where it is given."""
    result: NDArray[np.float32] = np.subtract(
        codes, np.float32(zero_point), out=out, dtype=np.float32
    )
    result *= np.float32(scale)
    return result


class InputBuffer:
    """A device input, allocated once and filled for every call; for one thread.

    Args:
        spec: of the device input.

    Attributes:
        codes: int8, `spec.shape`, what the device takes; its padding always holds the zero point.
    """

    def __init__(self, spec: TensorSpec) -> None:
        self.spec = spec
        self.codes: NDArray[np.int8] = np.full(spec.shape, spec.zero_point, np.int8)
        n, h, w, c = spec.unpadded
        self._inside = self.codes[spec.inside]
        self._rounded: NDArray[np.float32] = np.empty((n, c, h, w), np.float32)

    def fill(self, tensor: NDArray[np.float32]) -> NDArray[np.int8]:
        """Quantize a network's input, float32 (N, C, H, W), into `codes`.

        Raises:
            ValueError: the tensor does not have the spec's unpadded shape.
        """
        if tensor.shape != self._rounded.shape:
            n, c, h, w = tensor.shape
            raise ValueError(
                f"tensor {self.spec.name!r} takes {self.spec.unpadded} (NHWC) before padding, "
                f"not {(n, h, w, c)}"
            )
        _round_to_grid(tensor, self.spec.scale, self.spec.zero_point, out=self._rounded)
        # Channel by channel: NumPy copies a whole NCHW to NHWC four times slower.
        for channel in range(tensor.shape[1]):
            self._inside[..., channel] = self._rounded[:, channel]
        return self.codes


class OutputBuffer:
    """A device output, allocated once and read after every call; for one thread.

    Args:
        spec: of the device output.

    Attributes:
        codes: int8, `spec.shape`, where the device writes.
    """

    def __init__(self, spec: TensorSpec) -> None:
        self.spec = spec
        self.codes: NDArray[np.int8] = np.full(spec.shape, spec.zero_point, np.int8)
        self._nchw = self.codes[spec.inside].transpose(0, 3, 1, 2)
        self._tensor: NDArray[np.float32] = np.empty(self._nchw.shape, np.float32)

    def read(self) -> NDArray[np.float32]:
        """`codes` as the network's output, float32 (N, C, H, W); the next call overwrites it."""
        return dequantize(self._nchw, self.spec.scale, self.spec.zero_point, out=self._tensor)


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
    return InputBuffer(spec).fill(tensor)


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
