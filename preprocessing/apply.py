"""The numerics of the contract: scale, z-score, encode to 8 bit, resize. numpy only.

Images are NHWC, network tensors NCHW. Every function works on a whole batch, keeps no temporary
larger than the batch, and rounds the same way on every machine.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from preprocessing.contract import GREY_MAX

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from preprocessing.contract import Scaling, StudentInput, ZScore


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
    if zscore is None:
        values = _affine(patches, scaling, 1.0, 0.0)
    else:
        sigma = np.array(zscore.sigma, np.float64)
        values = _affine(patches, scaling, 1.0 / sigma, -np.array(zscore.mu, np.float64) / sigma)
    return to_nchw(resize_float(values, size_hw, interpolation))


def _affine(
    patches: NDArray[np.generic],
    rule: Scaling,
    gain: float | NDArray[np.float64],
    offset: float | NDArray[np.float64],
) -> NDArray[np.float32]:
    """`scaled * gain + offset` as one float32 multiply-add per value."""
    if rule.type == "clip_linear":
        lo, hi = (np.float32(v) for v in rule.src_range)
        values = np.clip(patches.astype(np.float32), lo, hi)
    else:
        values = patches.astype(np.float32)  # a copy, so the caller's patches stay as they are
    values *= np.asarray(gain * rule.gain, np.float32)
    values += np.asarray(gain * rule.offset + offset, np.float32)
    return values


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
    return normalized(device_image(images, given), given)


def normalized(images: NDArray[np.uint8], given: StudentInput) -> NDArray[np.float32]:
    """Device images of the network's size to its input: `(grey - mean) / std`, in float32.

    The subtraction comes first, as in the device pipeline's normalize operator; as a grey level has
    256 values, a table gives the same bits faster.

    Args:
        images: uint8, (N, H', W', channels).
        given: the student's input.

    Returns:
        float32, (N, channels, H', W').
    """
    levels = np.arange(GREY_MAX + 1, dtype=np.float32)
    mean = np.array(given.mean, np.float32)
    std = np.array(given.std, np.float32)
    tensor = np.empty((len(images), len(mean), *images.shape[1:3]), np.float32)
    for channel in range(len(mean)):
        table = (levels - mean[channel]) / std[channel]
        np.take(table, images[..., channel], out=tensor[:, channel])
    return tensor


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
    rows, columns = (
        _nearest(old, new, half_pixel_centers) if interpolation == "nearest" else None
        for old, new in zip(images.shape[1:3], size_hw, strict=True)
    )
    if rows is not None and columns is not None:
        return images[:, rows][:, :, columns]
    return (
        _bilinear_opencv(images, size_hw)
        if half_pixel_centers
        else _bilinear_pillow(images, size_hw)
    )


def resize_float(
    images: NDArray[np.float32], size_hw: tuple[int, int], interpolation: str
) -> NDArray[np.float32]:
    """Resize float images: nearest or bilinear at half-pixel centers, without antialiasing.

    Args:
        images: float32, (N, H, W, C).
        size_hw: the new height and width.
        interpolation: "nearest" or "bilinear".

    Returns:
        float32, (N, H', W', C).
    """
    for axis, size in zip((1, 2), size_hw, strict=True):
        old = images.shape[axis]
        if old == size:
            continue
        if interpolation == "nearest":
            images = np.take(images, _nearest(old, size, False), axis=axis)
            continue
        low, fraction = _bilinear(old, size)
        weight = fraction.astype(np.float32).reshape(-1, *(1,) * (images.ndim - 1 - axis))
        below, above = (np.take(images, np.clip(low + k, 0, old - 1), axis) for k in (0, 1))
        images = below * (1 - weight) + above * weight
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


def _bilinear_opencv(images: NDArray[np.uint8], size_hw: tuple[int, int]) -> NDArray[np.uint8]:
    """OpenCV's INTER_LINEAR on 8-bit images, bit for bit (checked against OpenCV 5.0)."""
    height, width = images.shape[1:3]
    # Columns outside the image get weight 0, rows outside are repeated with both weights: the two
    # round differently, so each is done as OpenCV does it.
    low, weight = _opencv_weights(width, size_hw[1])
    outside = (low < 0) | (low >= width - 1)
    low = np.clip(low, 0, width - 1)
    left = np.where(outside, 2048, weight[0]).astype(np.int32)[:, None]
    right = np.where(outside, 0, weight[1]).astype(np.int32)[:, None]
    wide = images[:, :, low] * left + images[:, :, np.minimum(low + 1, width - 1)] * right
    wide >>= 4
    low, weight = _opencv_weights(height, size_hw[0])
    above = (wide[:, np.clip(low, 0, height - 1)] * weight[0][:, None, None]) >> 16
    below = (wide[:, np.clip(low + 1, 0, height - 1)] * weight[1][:, None, None]) >> 16
    result: NDArray[np.uint8] = ((above + below + 2) >> 2).astype(np.uint8)
    return result


def _opencv_weights(old: int, new: int) -> tuple[NDArray[np.intp], NDArray[np.int32]]:
    low, fraction = _bilinear(old, new)
    upper = fraction.astype(np.float32)
    weights = np.stack([np.float32(1) - upper, upper]) * np.float32(2048)
    return low, np.rint(weights).astype(np.int32)


def _bilinear_pillow(images: NDArray[np.uint8], size_hw: tuple[int, int]) -> NDArray[np.uint8]:
    """Pillow's BILINEAR on 8-bit images: columns, rounded to 8 bit, then rows.

    Bit for bit wherever both axes change by the same factor; where they do not, Pillow 13 may do
    the rows first, which moves single values by one grey level.
    """
    for axis, new in ((2, size_hw[1]), (1, size_hw[0])):
        if images.shape[axis] == new:
            continue
        weights = _pillow_weights(images.shape[axis], new)
        # Whole numbers below 2^53: the float64 product is the integer one, at BLAS speed.
        values = np.moveaxis(images, axis, -1).astype(np.float64) @ weights.T
        rounded = np.floor((values + (1 << 21)) / (1 << 22))
        images = np.moveaxis(np.clip(rounded, 0, GREY_MAX).astype(np.uint8), -1, axis)
    return np.ascontiguousarray(images)


def _pillow_weights(old: int, new: int) -> NDArray[np.float64]:
    """Rows of filter weights, (new, old), in units of 2^-22."""
    step = old / new
    support = max(step, 1.0)
    weights = np.zeros((new, old))
    for i in range(new):
        center = (i + 0.5) * step
        lo = max(int(center - support + 0.5), 0)
        hi = min(int(center + support + 0.5), old)
        row = np.maximum(0, 1 - np.abs((np.arange(lo, hi) - center + 0.5) / support))
        weights[i, lo:hi] = np.trunc(row / row.sum() * (1 << 22) + 0.5)
    return weights


def to_nchw(nhwc: NDArray[np.float32]) -> NDArray[np.float32]:
    """(N, H, W, C) to a contiguous (N, C, H, W)."""
    return np.ascontiguousarray(nhwc.transpose(0, 3, 1, 2))
