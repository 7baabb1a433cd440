"""Patches as image files in class folders."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import png
import tifffile
from PIL import Image

from pipeline.data.source import PatchSource
from pipeline.run.errors import InputError
from preprocessing.images import class_folders

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from pipeline.params.sources import DataParams


def from_image_folder(
    data: DataParams, path: Path, labels: Path | None, classes: Sequence[str]
) -> PatchSource:
    """Format image-folder; see `pipeline.params.formats`."""
    return open_image_folder(path, data.only_modality(), classes)


def open_image_folder(path: Path, modality: str, classes: Sequence[str]) -> PatchSource:
    """Class folders of PNG, JPEG or TIFF images: 8 or 16 bit, 1 to 4 channels, all of one size.

    Folders are called like the classes, or as `class_folders` calls them.

    Raises:
        InputError: no folder, folders that are no classes, a class without a folder, no image.
    """
    if not path.is_dir():
        raise InputError(f"{path.name} is a file; format image-folder needs a folder of classes")
    if not classes:
        files = [p for p in sorted(path.iterdir()) if p.suffix.lower() in SUFFIXES]
        return _image_source(path, modality, files, None)
    folders = sorted(p.name for p in path.iterdir() if p.is_dir())
    named = list(classes) if set(folders) == set(classes) else class_folders(classes)
    if set(folders) != set(named):
        raise InputError(
            f"{path.name}: its folders are {', '.join(folders) or 'none'}; needed is one per "
            f"class, called {', '.join(classes)} or {', '.join(class_folders(classes))}"
        )
    files = []
    labels: list[int] = []
    for label, name in enumerate(named):
        images = [p for p in sorted((path / name).iterdir()) if p.suffix.lower() in SUFFIXES]
        files += images
        labels += [label] * len(images)
    return _image_source(path, modality, files, np.array(labels, np.int64))


def _image_source(
    path: Path, modality: str, files: Sequence[Path], labels: NDArray[np.int64] | None
) -> PatchSource:
    if not files:
        raise InputError(f"{path.name}: no image ({', '.join(SUFFIXES)}) in it")
    height, width, channels = _image(path, files[0]).shape

    def read_rows(
        modality: str, rows: NDArray[np.int64], bands: Sequence[int]
    ) -> NDArray[np.generic]:
        images = []
        for row in rows.tolist():
            image = _image(path, files[row])
            if image.shape != (height, width, channels):
                raise InputError(
                    f"{files[row].relative_to(path.parent)} is {image.shape} (height, width, "
                    f"channels), the first image is {(height, width, channels)}; all must be equal"
                )
            images.append(image[..., list(bands)])
        return np.stack(images)

    return PatchSource(
        path=path,
        count=len(files),
        shapes={modality: (height, width, channels)},
        labels=labels,
        reader=read_rows,
    )


def _image(folder: Path, file: Path) -> NDArray[Any]:
    try:
        return read_image(file)
    except (OSError, ValueError) as error:
        name = file.relative_to(folder.parent)
        raise InputError(f"{name} is not a readable image: {error}") from error


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
