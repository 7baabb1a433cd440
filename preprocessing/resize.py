"""Resizing as the device does it, bit for bit."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, TypeVar

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray


_Value = TypeVar("_Value", bound=np.generic)

#: Values handled at a time where a batch passes through several steps, so that they stay in cache.
_BLOCK = 1 << 19


def row_blocks(count: int, values: int) -> Iterator[slice]:
    """Slices over `count` images of so many values each."""
    step = max(1, _BLOCK // max(1, values))
    return (slice(start, start + step) for start in range(0, count, step))


def resize(
    images: NDArray[np.uint8],
    size_hw: tuple[int, int],
    interpolation: str,
    half_pixel_centers: bool,
) -> NDArray[np.uint8]:
    """Resize 8-bit images exactly as the `resize` operator of the Voyager pipeline YAML does.

    The operator hands over to Pillow when `half_pixel_centers` is false and to OpenCV when it is
    true, whatever that name suggests:

    | interpolation | half_pixel_centers | samples |
    |---|---|---|
    | nearest | False (Pillow) | floor((i + 0.5) * in / out) |
    | nearest | True (OpenCV) | floor(i * in / out) |
    | bilinear | False (Pillow) | (i + 0.5) * in / out - 0.5, antialiased when shrinking |
    | bilinear | True (OpenCV) | (i + 0.5) * in / out - 0.5, never antialiased |

    Args:
        images: uint8, (N, H, W, C).
        size_hw: the new height and width.
        interpolation: "nearest" or "bilinear".
        half_pixel_centers: the operator's parameter of the same name.

    Returns:
        uint8, (N, H', W', C).

    Source:
        Voyager SDK 1.2.5 to 1.8, resize operator; fixed-point arithmetic of Pillow's
        Resample.c (22 fractional bits) and OpenCV's resize.cpp (11 fractional bits).
    """
    if images.shape[1:3] == tuple(size_hw):
        return images
    if interpolation == "nearest":
        return resize_nearest(images, (1, 2), size_hw, half_pixel_centers)
    bilinear = _bilinear_opencv if half_pixel_centers else _bilinear_pillow
    resized = np.empty((len(images), *size_hw, images.shape[3]), np.uint8)
    for part in row_blocks(len(images), max(images[:1].size, resized[:1].size)):
        resized[part] = bilinear(images[part], size_hw)
    return resized


def resize_float(
    images: NDArray[np.float32],
    size_hw: tuple[int, int],
    interpolation: str,
    *,
    axes: tuple[int, int] = (1, 2),
) -> NDArray[np.float32]:
    """Resize float images: nearest or bilinear at half-pixel centers, without antialiasing.

    Args:
        images: float32, (N, H, W, C), or of any other order that `axes` describes.
        size_hw: the new height and width.
        interpolation: "nearest" or "bilinear".
        axes: those of height and width.

    Returns:
        float32, (N, H', W', C), or in the order given.
    """
    if interpolation == "nearest":
        return resize_nearest(images, axes, size_hw, False)
    for axis, size in zip(axes, size_hw, strict=True):
        old = images.shape[axis]
        if old == size:
            continue
        low, fraction = _bilinear(old, size)
        weight = fraction.astype(np.float32).reshape(-1, *(1,) * (images.ndim - 1 - axis))
        below, above = (np.take(images, np.clip(low + k, 0, old - 1), axis) for k in (0, 1))
        images = below * (1 - weight) + above * weight
    return images


def resize_nearest(
    images: NDArray[_Value],
    axes: tuple[int, int],
    size_hw: tuple[int, int],
    half_pixel_centers: bool,
) -> NDArray[_Value]:
    """Resize along the axes of height and width; columns first, so that rows move as wholes."""
    for axis, new in zip(reversed(axes), reversed(size_hw), strict=True):
        old = images.shape[axis]
        if old != new:
            images = np.take(images, _nearest(old, new, half_pixel_centers), axis)
    return images


def _nearest(old: int, new: int, half_pixel_centers: bool) -> NDArray[np.intp]:
    """Source index of each new pixel along one axis."""
    step = old / new
    if half_pixel_centers:  # OpenCV multiplies by the inverse of the rounded scale
        position = np.arange(new) * (1.0 / (new / old))
    else:  # Pillow adds the step up, so its rounding errors add up too
        position = np.add.accumulate(np.concatenate([[step * 0.5], np.full(new - 1, step)]))
    indices: NDArray[np.intp] = np.minimum(np.floor(position).astype(np.intp), old - 1)
    return indices


def _bilinear(old: int, new: int) -> tuple[NDArray[np.intp], NDArray[np.float64]]:
    """Lower source index, which may be -1, and the weight of the next, at half-pixel centers."""
    position = (np.arange(new) + 0.5) * (1.0 / (new / old)) - 0.5
    low = np.floor(position)
    return low.astype(np.intp), position - low


def _bilinear_opencv(images: NDArray[np.uint8], size_hw: tuple[int, int]) -> NDArray[np.int32]:
    """OpenCV's INTER_LINEAR on 8-bit images, bit for bit (checked against OpenCV 5.0): 0..255."""
    height, width = images.shape[1:3]
    # Columns outside the image get weight 0, rows outside are repeated with both weights: the two
    # round differently, so each is done as OpenCV does it.
    low, weight = _opencv_weights(width, size_hw[1])
    outside = (low < 0) | (low >= width - 1)
    low = np.clip(low, 0, width - 1)
    left = np.where(outside, 2048, weight[0])[:, None]
    right = np.where(outside, 0, weight[1])[:, None]
    wide = _weigh(images, low, left, 2)
    wide += _weigh(images, np.minimum(low + 1, width - 1), right, 2)
    wide >>= 4
    low, weight = _opencv_weights(height, size_hw[0])
    above = _weigh(wide, np.clip(low, 0, height - 1), weight[0][:, None, None], 1)
    above >>= 16
    below = _weigh(wide, np.clip(low + 1, 0, height - 1), weight[1][:, None, None], 1)
    below >>= 16
    above += below
    above += 2
    above >>= 2
    return above


def _weigh(
    images: NDArray[np.int32] | NDArray[np.uint8],
    index: NDArray[np.intp],
    weight: NDArray[np.int32],
    axis: int,
) -> NDArray[np.int32]:
    """Entries picked along one axis, each times its weight."""
    values = np.take(images.astype(np.int32, copy=False), index, axis)
    values *= weight
    return values


@lru_cache
def _opencv_weights(old: int, new: int) -> tuple[NDArray[np.intp], NDArray[np.int32]]:
    """Lower source index and, (2, new), the weights of it and the next in units of 2^-11."""
    low, fraction = _bilinear(old, new)
    upper = fraction.astype(np.float32)
    weights = np.stack([np.float32(1) - upper, upper]) * np.float32(2048)
    return low, np.rint(weights).astype(np.int32)


def _bilinear_pillow(images: NDArray[np.uint8], size_hw: tuple[int, int]) -> NDArray[np.int32]:
    """Pillow's BILINEAR on 8-bit images: columns, rounded to whole grey levels, then rows: 0..255.

    Bit for bit wherever both axes change by the same factor; where they do not, Pillow 13 may do
    the rows first, which moves single values by one grey level.
    """
    values = images.astype(np.int32)
    for axis, new in ((2, size_hw[1]), (1, size_hw[0])):
        if values.shape[axis] == new:
            continue
        # The weights of a pixel add up to 2^22 but for rounding: int32 holds the sum, and the
        # result needs no clipping.
        taps = [
            (index, weight.reshape(-1, *(1,) * (3 - axis)))
            for index, weight in zip(*_pillow_weights(values.shape[axis], new), strict=True)
        ]
        total = _weigh(values, *taps[0], axis)
        for tap in taps[1:]:
            total += _weigh(values, *tap, axis)
        total += 1 << 21
        total >>= 22
        values = total
    return values


@lru_cache
def _pillow_weights(old: int, new: int) -> tuple[NDArray[np.intp], NDArray[np.int32]]:
    """Source indices and filter weights in units of 2^-22, both (taps, new)."""
    step = old / new
    support = max(step, 1.0)
    center = (np.arange(new) + 0.5) * step
    lo = np.maximum(center - support + 0.5, 0).astype(np.intp)
    hi = np.minimum(center + support + 0.5, old).astype(np.intp)
    index = lo + np.arange((hi - lo).max())[:, None]
    rows = np.maximum(0, 1 - np.abs((index - center + 0.5) * (1 / support)))
    rows[index >= hi] = 0
    # Added up one by one as in Pillow, since numpy's sum rounds in another order.
    rows /= np.add.accumulate(rows)[-1]
    weights = (rows * (1 << 22) + 0.5).astype(np.int32)
    return np.minimum(index, old - 1), weights
