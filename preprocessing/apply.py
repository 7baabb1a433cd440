"""The numerics of the contract: scale, z-score, encode to 8 bit, resize. numpy only.

Images are NHWC, network tensors NCHW. Every function works on a whole batch, keeps no temporary
larger than the batch, and rounds the same way on every machine.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from preprocessing.contract import GREY_MAX

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from preprocessing.contract import Scaling, StudentInput, ZScore

_Value = TypeVar("_Value", bound=np.generic)

#: Values handled at a time where a batch passes through several steps, so that they stay in cache.
_BLOCK = 1 << 19


def scale(patches: NDArray[np.generic], scaling: Scaling) -> NDArray[np.float32]:
    """Stored values to contract units: the affine map of the modality, clipped first if it says so.

    Args:
        patches: stored values, any real dtype, any shape.
        scaling: of their modality.

    Returns:
        Contract units, float32, same shape.
    """
    return _affine(patches, scaling, 1.0, 0.0)


def teacher_tensor(
    patches: NDArray[np.generic],
    scaling: Scaling,
    zscore: ZScore | None,
    size_hw: tuple[int, int],
    *,
    interpolation: str = "nearest",
) -> NDArray[np.float32]:
    """Stored patches to what a teacher sees: scale, z-score, resize, to NCHW.

    Args:
        patches: stored values of the teacher's bands, in its order, any real dtype, (N, H, W, C).
        scaling: of the bands' modality.
        zscore: of these bands (`Contract.statistics`); None when z-scoring is off.
        size_hw: the teacher's input size.
        interpolation: "nearest" or "bilinear".

    Returns:
        float32, (N, C, H', W'), in standard deviations when z-scoring is on.
    """
    gain: float | NDArray[np.float64] = 1.0
    offset: float | NDArray[np.float64] = 0.0
    if zscore is not None:
        sigma = np.array(zscore.sigma, np.float64)[:, None, None]
        gain, offset = 1.0 / sigma, -np.array(zscore.mu, np.float64)[:, None, None] / sigma
    count, height, width, channels = patches.shape
    tensor = np.empty((count, channels, height, width), np.float32)
    for part in _blocks(count, tensor[:1].size):
        values = tensor[part]
        values[...] = patches[part].astype(np.float32).transpose(0, 3, 1, 2)
        _apply_affine(values, scaling, gain, offset)
    return resize_float(tensor, size_hw, interpolation, axes=(2, 3))


def _affine(
    patches: NDArray[np.generic],
    rule: Scaling,
    gain: float | NDArray[np.float64],
    offset: float | NDArray[np.float64],
) -> NDArray[np.float32]:
    """`scaled * gain + offset` as one float32 multiply-add per value."""
    values = patches.astype(np.float32)  # a copy, so the caller's patches stay as they are
    _apply_affine(values, rule, gain, offset)
    return values


def _apply_affine(
    values: NDArray[np.float32],
    rule: Scaling,
    gain: float | NDArray[np.float64],
    offset: float | NDArray[np.float64],
) -> None:
    """`scaled * gain + offset`, in place."""
    if rule.type == "clip_linear":
        lo, hi = (np.float32(v) for v in rule.src_range)
        np.clip(values, lo, hi, out=values)
    values *= np.asarray(gain * rule.gain, np.float32)
    values += np.asarray(gain * rule.offset + offset, np.float32)


def encode(
    patches: NDArray[np.generic], scaling: Scaling, given: StudentInput
) -> NDArray[np.uint8]:
    """Stored patches to the 8-bit images that the device receives, at the patches' own size.

    Grey levels are rounded half to even and clipped to 0..255; truncating instead costs accuracy.

    Args:
        patches: stored values of the student's bands, in its order, (N, H, W, channels).
        scaling: of the student's modality.
        given: the student's input.

    Returns:
        uint8, (N, H, W, channels).
    """
    lo = np.array(given.grey_lo, np.float64)
    levels_per_unit = GREY_MAX / (np.array(given.grey_hi, np.float64) - lo)
    grey = _affine(patches, scaling, levels_per_unit, -lo * levels_per_unit)
    np.rint(grey, out=grey)
    return np.clip(grey, 0, GREY_MAX, out=grey).astype(np.uint8)


def share_outside(
    patches: NDArray[np.generic], scaling: Scaling, given: StudentInput
) -> NDArray[np.float64]:
    """Share of every patch's values that `encode` moves to an end, 0..1, (N,).

    Half a grey level beyond an end is what rounding takes. For arguments see `encode`.
    """
    lo = np.array(given.grey_lo, np.float64)
    levels_per_unit = GREY_MAX / (np.array(given.grey_hi, np.float64) - lo)
    straight = replace(scaling, type="linear")  # what clip_linear cuts is outside too
    grey = _affine(patches, straight, levels_per_unit, -lo * levels_per_unit)
    outside = (grey < -0.5) | (grey > GREY_MAX + 0.5)
    share: NDArray[np.float64] = outside.mean(axis=(1, 2, 3))
    return share


def device_image(images: NDArray[np.uint8], given: StudentInput) -> NDArray[np.uint8]:
    """Stored 8-bit images to the size of the network's input, uint8, (N, H', W', channels)."""
    return resize(images, given.size_hw, given.interpolation, given.half_pixel_centers)


def exported_images(images: NDArray[np.uint8], given: StudentInput) -> NDArray[np.uint8]:
    """Stored 8-bit images as they are handed to the device: at their own size where it resizes."""
    return images if given.device_resize else device_image(images, given)


def student_tensor(images: NDArray[np.uint8], given: StudentInput) -> NDArray[np.float32]:
    """8-bit images to the student's input, as the device computes it: resize, then normalize.

    Args:
        images: stored 8-bit images, uint8, (N, H, W, channels).
        given: the student's input.

    Returns:
        float32, (N, channels, H', W').
    """
    count, height, width, channels = images.shape
    new_height, new_width = given.size_hw
    if given.interpolation == "nearest" and new_height >= height and new_width >= width:
        # Nearest only repeats pixels, so the few are normalized and not the many.
        small = normalized(images, given)
        return _resize_nearest(small, (2, 3), given.size_hw, given.half_pixel_centers)
    # Resized channel by channel, the values already lie in the network's order.
    planes = np.ascontiguousarray(images.transpose(0, 3, 1, 2)).reshape(-1, height, width, 1)
    nchw = device_image(planes, given).reshape(count, channels, new_height, new_width)
    return normalized(nchw.transpose(0, 2, 3, 1), given)


def normalized(images: NDArray[np.uint8], given: StudentInput) -> NDArray[np.float32]:
    """Device images of the network's size to its input: `(grey - mean) / std`, in float32.

    The subtraction comes first, as in the device pipeline's normalize operator.

    Args:
        images: uint8, (N, H', W', channels).
        given: the student's input.

    Returns:
        float32, (N, channels, H', W').
    """
    mean = np.array(given.mean, np.float32)[:, None, None]
    std = np.array(given.std, np.float32)[:, None, None]
    tensor = np.empty((len(images), len(mean), *images.shape[1:3]), np.float32)
    for part in _blocks(len(images), tensor[:1].size):
        values = tensor[part]
        values[...] = images[part].transpose(0, 3, 1, 2)
        values -= mean
        values /= std
    return tensor


def _blocks(count: int, values: int) -> Iterator[slice]:
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
        return _resize_nearest(images, (1, 2), size_hw, half_pixel_centers)
    bilinear = _bilinear_opencv if half_pixel_centers else _bilinear_pillow
    resized = np.empty((len(images), *size_hw, images.shape[3]), np.uint8)
    for part in _blocks(len(images), max(images[:1].size, resized[:1].size)):
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
        return _resize_nearest(images, axes, size_hw, False)
    for axis, size in zip(axes, size_hw, strict=True):
        old = images.shape[axis]
        if old == size:
            continue
        low, fraction = _bilinear(old, size)
        weight = fraction.astype(np.float32).reshape(-1, *(1,) * (images.ndim - 1 - axis))
        below, above = (np.take(images, np.clip(low + k, 0, old - 1), axis) for k in (0, 1))
        images = below * (1 - weight) + above * weight
    return images


def _resize_nearest(
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
    wide = _weighted(images, low, left, 2)
    wide += _weighted(images, np.minimum(low + 1, width - 1), right, 2)
    wide >>= 4
    low, weight = _opencv_weights(height, size_hw[0])
    above = _weighted(wide, np.clip(low, 0, height - 1), weight[0][:, None, None], 1)
    above >>= 16
    below = _weighted(wide, np.clip(low + 1, 0, height - 1), weight[1][:, None, None], 1)
    below >>= 16
    above += below
    above += 2
    above >>= 2
    return above


def _weighted(
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
        total = _weighted(values, *taps[0], axis)
        for tap in taps[1:]:
            total += _weighted(values, *tap, axis)
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


def to_nchw(nhwc: NDArray[np.float32]) -> NDArray[np.float32]:
    """(N, H, W, C) to a contiguous (N, C, H, W)."""
    return np.ascontiguousarray(nhwc.transpose(0, 3, 1, 2))
