"""8-bit device images as PNG files: lossless, in a fixed order. Pillow and numpy only."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    from numpy.typing import NDArray


def write_png(image: NDArray[np.uint8], path: Path) -> None:
    """Write one image, uint8, (H, W, C) with 1 channel (gray) or 3 (RGB order)."""
    Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(path)


def read_png(path: Path) -> NDArray[np.uint8]:
    """Read one image as uint8, (H, W, C)."""
    with Image.open(path) as image:
        pixels = np.asarray(image)
    return pixels[..., None] if pixels.ndim == 2 else pixels


def write_in_order(images: Iterable[NDArray[np.uint8]], folder: Path, count: int) -> None:
    """Write images into one flat folder; sorted by name they are in the order given."""
    folder.mkdir(parents=True)
    digits = len(str(count - 1))
    for i, image in enumerate(images):
        write_png(image, folder / f"{i:0{digits}d}.png")


def class_folders(labels: Sequence[str]) -> list[str]:
    """Folder names whose alphabetical order is the order of the classes.

    Readers of class folders take the alphabetical position for the class index, so `10_x` must not
    come before `2_x`.
    """
    digits = len(str(len(labels) - 1))
    return [
        f"{i:0{digits}d}_{re.sub(r'[^A-Za-z0-9]+', '_', label).strip('_')}"
        for i, label in enumerate(labels)
    ]
