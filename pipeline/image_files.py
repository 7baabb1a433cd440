"""Images as users store them: PNG, JPEG or TIFF, 8 or 16 bit, 1 to 4 channels."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import png
import tifffile
from PIL import Image

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff")

_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


def read_image(path: Path) -> NDArray[Any]:
    """Read one image as it is stored: no color conversion, no change of depth.

    Returns:
        uint8 or uint16, (H, W, C), C from 1 to 4; channels in file order (RGB, not BGR).

    Raises:
        ValueError: more channels, another depth, or a palette.
        OSError: not readable.
    """
    if path.suffix.lower() in (".tif", ".tiff"):
        pixels = _read_tiff(path)
    elif _is_deep_png(path):
        pixels = _read_deep_png(path)
    else:
        with Image.open(path) as image:
            if image.mode not in ("L", "LA", "RGB", "RGBA"):
                raise ValueError(
                    f"its mode is {image.mode}; needed is gray or RGB, with alpha or not"
                )
            pixels = np.asarray(image)
    if pixels.ndim == 2:
        pixels = pixels[..., None]
    if pixels.ndim != 3 or not 1 <= pixels.shape[2] <= 4:
        raise ValueError(f"it has the shape {pixels.shape}; needed is (height, width, 1 to 4)")
    if pixels.dtype not in (np.uint8, np.uint16):
        raise ValueError(f"its values are {pixels.dtype}; needed is 8 or 16 bit")
    return pixels


def _read_tiff(path: Path) -> NDArray[Any]:
    try:
        with tifffile.TiffFile(path) as file:
            page = file.pages.first
            pixels: NDArray[Any] = page.asarray()
            planar = page.axes.startswith("S") and pixels.ndim == 3
    except tifffile.TiffFileError as error:
        raise ValueError(str(error)) from error
    return np.moveaxis(pixels, 0, -1) if planar else pixels


def _is_deep_png(path: Path) -> bool:
    """Whether this is a PNG with 16 bit per channel; Pillow would cut colors down to 8."""
    with path.open("rb") as file:
        head = file.read(25)
    return head.startswith(_PNG_SIGNATURE) and len(head) == 25 and head[24] == 16


def _read_deep_png(path: Path) -> NDArray[Any]:
    with path.open("rb") as file:
        try:
            width, height, rows, info = png.Reader(file=file).read()
            pixels = np.array([np.frombuffer(row, np.uint16) for row in rows])
        except png.Error as error:
            raise ValueError(str(error)) from error
    return pixels.reshape(height, width, info["planes"])
