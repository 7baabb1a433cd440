"""The operators of the chip in torch: `operator(attributes, *inputs)` as ONNX (opset 17) says it.

Tensors are NCHW; inputs that are whole numbers (shapes, axes) come as lists, those left out as
None. What onnxruntime computes is the standard: `pipeline.quantization_aware` compares the network
with it before anything is trained.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional as F  # noqa: N812 - the name everybody knows it by

if TYPE_CHECKING:
    from torch import Tensor

    Attributes = Mapping[str, Any]


def _pad_rest(x: Tensor, attributes: Attributes, value: float = 0.0) -> tuple[Tensor, list[int]]:
    """What torch's kernels pad themselves (rows, columns); an uneven rest is padded here."""
    top, left, bottom, right = attributes.get("pads", (0, 0, 0, 0))
    if (top, left) == (bottom, right):
        return x, [top, left]
    return F.pad(x, (left, right, top, bottom), value=value), [0, 0]


def _conv(attributes: Attributes, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    x, padding = _pad_rest(x, attributes)
    return F.conv2d(
        x,
        weight,
        bias,
        stride=attributes.get("strides", 1),
        padding=padding,
        dilation=attributes.get("dilations", 1),
        groups=attributes.get("group", 1),
    )


def _conv_transpose(
    attributes: Attributes, x: Tensor, weight: Tensor, bias: Tensor | None = None
) -> Tensor:
    return F.conv_transpose2d(
        x,
        weight,
        bias,
        stride=attributes.get("strides", 1),
        padding=list(attributes.get("pads", (0, 0)))[:2],
        output_padding=attributes.get("output_padding", 0),
        groups=attributes.get("group", 1),
        dilation=attributes.get("dilations", 1),
    )


def _gemm(attributes: Attributes, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return F.linear(x, weight if attributes.get("transB", 0) else weight.t(), bias)


def _clip(
    attributes: Attributes, x: Tensor, low: Tensor | None = None, high: Tensor | None = None
) -> Tensor:
    return x.clamp(low, high)


def _hard_sigmoid(attributes: Attributes, x: Tensor) -> Tensor:
    alpha, beta = float(attributes.get("alpha", 0.2)), float(attributes.get("beta", 0.5))
    return (x * alpha + beta).clamp(0, 1)


def _prelu(attributes: Attributes, x: Tensor, slope: Tensor) -> Tensor:
    return torch.where(x >= 0, x, x * slope)


def _average_pool(attributes: Attributes, x: Tensor) -> Tensor:
    x, padding = _pad_rest(x, attributes)
    return F.avg_pool2d(
        x,
        attributes["kernel_shape"],
        attributes.get("strides", 1),
        padding,
        ceil_mode=bool(attributes.get("ceil_mode", 0)),
        count_include_pad=bool(attributes.get("count_include_pad", 0)),
    )


def _max_pool(attributes: Attributes, x: Tensor) -> Tensor:
    x, padding = _pad_rest(x, attributes, value=float("-inf"))
    return F.max_pool2d(
        x,
        attributes["kernel_shape"],
        attributes.get("strides", 1),
        padding,
        dilation=attributes.get("dilations", 1),
        ceil_mode=bool(attributes.get("ceil_mode", 0)),
    )


def _reshape(attributes: Attributes, x: Tensor, shape: Sequence[int]) -> Tensor:
    return x.reshape([x.shape[i] if size == 0 else size for i, size in enumerate(shape)])


def _squeeze(attributes: Attributes, x: Tensor, axes: Sequence[int] | None = None) -> Tensor:
    if axes is None:
        axes = [i for i, size in enumerate(x.shape) if size == 1 and i]
    return x.squeeze(tuple(axes))


def _slice(
    attributes: Attributes,
    x: Tensor,
    starts: Sequence[int],
    ends: Sequence[int],
    axes: Sequence[int] | None = None,
    steps: Sequence[int] | None = None,
) -> Tensor:
    for i, (start, end) in enumerate(zip(starts, ends, strict=True)):
        parts = [slice(None)] * x.ndim
        parts[axes[i] if axes else i] = slice(start, end, steps[i] if steps else 1)
        x = x[tuple(parts)]
    return x


def _split(
    attributes: Attributes, x: Tensor, sizes: Sequence[int] | None = None
) -> tuple[Tensor, ...]:
    axis = attributes.get("axis", 0)
    return torch.split(
        x, list(sizes) if sizes else x.shape[axis] // attributes["outputs"], dim=axis
    )


def _pad(
    attributes: Attributes, x: Tensor, pads: Sequence[int], value: Tensor | None = None
) -> Tensor:
    rank = len(pads) // 2
    pairs = [side for axis in reversed(range(rank)) for side in (pads[axis], pads[axis + rank])]
    return F.pad(x, pairs, value=0.0 if value is None else float(value))


def _resize(
    attributes: Attributes,
    x: Tensor,
    roi: Tensor | None = None,
    scales: Tensor | None = None,
    sizes: Sequence[int] | None = None,
) -> Tensor:
    if sizes is None:
        assert scales is not None
        sizes = [int(n * factor) for n, factor in zip(x.shape, scales.tolist(), strict=True)]
    linear = attributes.get("mode", b"nearest") == b"linear"
    options = {"mode": "bilinear", "align_corners": False} if linear else {"mode": "nearest"}
    return F.interpolate(x, list(sizes[-2:]), **options)


OPERATORS: dict[str, Callable[..., Any]] = {
    "Add": lambda given, a, b: a + b,
    "AveragePool": _average_pool,
    "Clip": _clip,
    "Concat": lambda given, *parts: torch.cat(parts, dim=given["axis"]),
    "Conv": _conv,
    "ConvTranspose": _conv_transpose,
    "Flatten": lambda given, x: x.flatten(given.get("axis", 1)),
    "Gemm": _gemm,
    "GlobalAveragePool": lambda given, x: x.mean(dim=(2, 3), keepdim=True),
    "GlobalMaxPool": lambda given, x: x.amax(dim=(2, 3), keepdim=True),
    "HardSigmoid": _hard_sigmoid,
    "HardSwish": lambda given, x: F.hardswish(x),
    "LeakyRelu": lambda given, x: F.leaky_relu(x, given.get("alpha", 0.01)),
    "MaxPool": _max_pool,
    "Mul": lambda given, a, b: a * b,
    "PRelu": _prelu,
    "Pad": _pad,
    "Relu": lambda given, x: F.relu(x),
    "Reshape": _reshape,
    "Resize": _resize,
    "Selu": lambda given, x: F.selu(x),
    "Sigmoid": lambda given, x: x.sigmoid(),
    "Slice": _slice,
    "Softmax": lambda given, x: x.softmax(given.get("axis", -1)),
    "Split": _split,
    "Squeeze": _squeeze,
    "Sub": lambda given, a, b: a - b,
    "Tanh": lambda given, x: x.tanh(),
    "Transpose": lambda given, x: x.permute(given["perm"]),
}
