"""The numerics of the contract: scale, z-score, encode to 8 bit, resize. numpy only.

Images are NHWC, network tensors NCHW. Every function works on a whole batch, keeps no temporary
larger than the batch, and rounds the same way on every machine.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from preprocessing.contract import GREY_MAX
from preprocessing.resize import resize, resize_float, resize_nearest, row_blocks

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from preprocessing.contract import Channels, Scaling
    from preprocessing.student_input import StudentInput


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
    channels: Channels,
    size_hw: tuple[int, int],
    *,
    interpolation: str = "nearest",
) -> NDArray[np.float32]:
    """Stored patches to what a teacher sees: scale, z-score, resize, to NCHW.

    Args:
        patches: stored values of the teacher's bands, in its order, any real dtype, (N, H, W, C).
        channels: these bands.
        size_hw: the teacher's input size.
        interpolation: "nearest" or "bilinear".

    Returns:
        float32, (N, C, H', W'), in standard deviations when z-scoring is on.
    """
    gain: float | NDArray[np.float64] = 1.0
    offset: float | NDArray[np.float64] = 0.0
    zscore = channels.zscore
    if zscore is not None:
        sigma = np.array(zscore.sigma, np.float64)[:, None, None]
        gain, offset = 1.0 / sigma, -np.array(zscore.mu, np.float64)[:, None, None] / sigma
    count, height, width, depth = patches.shape
    tensor = np.empty((count, depth, height, width), np.float32)
    for part in row_blocks(count, tensor[:1].size):
        values = tensor[part]
        values[...] = patches[part].astype(np.float32, copy=False).transpose(0, 3, 1, 2)
        _apply_affine(values, channels.scaling, gain, offset)
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
    patches: NDArray[np.generic], channels: Channels, student_input: StudentInput
) -> NDArray[np.uint8]:
    """Stored patches to the 8-bit images that the device receives, at the patches' own size.

    Grey levels are rounded half to even and clipped to 0..255; truncating instead costs accuracy.

    Args:
        patches: stored values of the student's bands, in its order, (N, H, W, channels).
        channels: these bands.
        student_input: gives the encoding.

    Returns:
        uint8, (N, H, W, channels).
    """
    lo = np.array(student_input.grey_lo, np.float64)
    levels_per_unit = GREY_MAX / (np.array(student_input.grey_hi, np.float64) - lo)
    grey = _affine(patches, channels.scaling, levels_per_unit, -lo * levels_per_unit)
    np.rint(grey, out=grey)
    return np.clip(grey, 0, GREY_MAX, out=grey).astype(np.uint8)


def share_outside(
    patches: NDArray[np.generic], channels: Channels, student_input: StudentInput
) -> NDArray[np.float64]:
    """Share of every patch's values that `encode` moves to an end, 0..1, (N,).

    Half a grey level beyond an end is what rounding takes. For arguments see `encode`.
    """
    lo = np.array(student_input.grey_lo, np.float64)
    levels_per_unit = GREY_MAX / (np.array(student_input.grey_hi, np.float64) - lo)
    straight = replace(channels.scaling, type="linear")  # what clip_linear cuts is outside too
    grey = _affine(patches, straight, levels_per_unit, -lo * levels_per_unit)
    outside = (grey < -0.5) | (grey > GREY_MAX + 0.5)
    share: NDArray[np.float64] = outside.mean(axis=(1, 2, 3))
    return share


def device_image(images: NDArray[np.uint8], student_input: StudentInput) -> NDArray[np.uint8]:
    """Stored 8-bit images to the size of the network's input, uint8, (N, H', W', channels)."""
    return resize(
        images, student_input.size_hw, student_input.interpolation, student_input.half_pixel_centers
    )


def exported_images(images: NDArray[np.uint8], student_input: StudentInput) -> NDArray[np.uint8]:
    """Stored 8-bit images as they are handed to the device: at their own size where it resizes."""
    return images if student_input.device_resize else device_image(images, student_input)


def student_tensor(images: NDArray[np.uint8], student_input: StudentInput) -> NDArray[np.float32]:
    """8-bit images to the student's input, as the device computes it: resize, then normalize.

    Args:
        images: stored 8-bit images, uint8, (N, H, W, channels).
        student_input: the student's input.

    Returns:
        float32, (N, channels, H', W').
    """
    count, height, width, channels = images.shape
    new_height, new_width = student_input.size_hw
    if student_input.interpolation == "nearest" and new_height >= height and new_width >= width:
        # Nearest only repeats pixels, so the few are normalized and not the many.
        small = normalize(images, student_input)
        return resize_nearest(
            small, (2, 3), student_input.size_hw, student_input.half_pixel_centers
        )
    # Resized channel by channel, the values already lie in the network's order.
    planes = np.ascontiguousarray(images.transpose(0, 3, 1, 2)).reshape(-1, height, width, 1)
    nchw = device_image(planes, student_input).reshape(count, channels, new_height, new_width)
    return normalize(nchw.transpose(0, 2, 3, 1), student_input)


def normalize(images: NDArray[np.uint8], student_input: StudentInput) -> NDArray[np.float32]:
    """Device images of the network's size to its input: `(grey - mean) / std`, in float32.

    The subtraction comes first, as in the device pipeline's normalize operator.

    Args:
        images: uint8, (N, H', W', channels).
        student_input: the student's input.

    Returns:
        float32, (N, channels, H', W').
    """
    mean = np.array(student_input.mean, np.float32)[:, None, None]
    std = np.array(student_input.std, np.float32)[:, None, None]
    tensor = np.empty((len(images), len(mean), *images.shape[1:3]), np.float32)
    for part in row_blocks(len(images), tensor[:1].size):
        values = tensor[part]
        values[...] = images[part].transpose(0, 3, 1, 2)
        values -= mean
        values /= std
    return tensor


def to_nchw(nhwc: NDArray[np.float32]) -> NDArray[np.float32]:
    """(N, H, W, C) to a contiguous (N, C, H, W)."""
    return np.ascontiguousarray(nhwc.transpose(0, 3, 1, 2))
