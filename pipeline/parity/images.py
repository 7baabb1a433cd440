"""Prove on the validation split that what was trained is what is deployed."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
from msgspec import UNSET, UnsetType

from metis.voyager.pipeline_reader import Pipeline, PipelineError, pipeline_differences
from metis.voyager.pipeline_yaml import yaml_obstacle
from pipeline.data.dataset import DatasetSplit, StudentData
from pipeline.facts import ImageValues, PngLeg, YamlLeg
from preprocessing.apply import normalize, student_tensor
from preprocessing.images import class_folders, read_png
from preprocessing.student_input import StudentInput, linear_encoding

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path
    from typing import Any

    from numpy.typing import NDArray

    from preprocessing.contract import Contract


#: Exported images that are compared, evenly spaced over the split; the leg says how many.
SAMPLES = 2000

_BLOCK = 64


def image_legs(
    data: StudentData,
    device_pipeline: Path,
    run: str,
    progress: Callable[[int], object] = lambda n: None,
) -> list[PngLeg | YamlLeg]:
    """Training tensor against the exported PNG files, read back by two independent ways.

    Args:
        data: of the run.
        device_pipeline: folder of the artifact.
        run: name of the run, which the pipeline YAML is called by.
        progress: called with the number of images just compared.

    Returns:
        The legs `png` (read back by preprocessing/ alone) and `yaml` (by doing what the YAML says).
    """
    source = "training tensor of the student"
    by_package = "tensor from the exported PNG, by preprocessing/ alone"
    by_pipeline = "tensor from the exported PNG, by doing what the YAML says"
    student_input = data.student_input
    if obstacle := yaml_obstacle(student_input):
        none = ImageValues()
        return [
            PngLeg(source, by_package, 0, none, obstacle),
            YamlLeg(source, by_pipeline, 0, none, obstacle),
        ]
    folder = device_pipeline / f"{run}-images" / "val"
    val = data.val.spread(SAMPLES)
    promised, fields = _by_contract(student_input, data.contract)
    pipeline, yaml_fields = _read_pipeline(device_pipeline / f"{run}.yaml", student_input)
    by_png = _Found(fields)
    by_yaml = _Found(yaml_fields, None if pipeline is None else 0.0)
    read_back = student_tensor if student_input.device_resize else normalize
    for part, trained in data.blocks(val, _BLOCK):
        try:
            images = _read_images(folder, class_folders(data.labels), val, part, student_input)
        except _ImageError as error:
            by_png.give_up(str(error))
            by_yaml.give_up(str(error))
            break
        by_png.compare(read_back(images, promised), trained)
        if pipeline and by_yaml.difference is not None:
            try:
                with np.errstate(divide="ignore", invalid="ignore"):  # a std of 0
                    by_yaml.compare(pipeline.tensor(images), trained)
            except PipelineError as error:
                by_yaml.give_up(str(error))
        progress(len(trained))
    # Where nothing is resized bilinear there is nothing that two implementations could round apart.
    bilinear = student_input.device_resize and student_input.interpolation == "bilinear"
    grey_level = 1 / min(student_input.std) if bilinear else 0.0
    n = len(val)
    return [
        PngLeg(source, by_package, n, by_png.values(grey_level)),
        YamlLeg(source, by_pipeline, n, by_yaml.values()),
    ]


class _ImageError(ValueError):
    """An exported image that is not what the dataset says."""


class _Found:
    """What a leg found so far: the largest difference, None without a tensor to compare."""

    def __init__(self, fields: list[str], difference: float | None = 0.0) -> None:
        self.fields = fields  # what is wrong, in words
        self.difference = difference

    def give_up(self, words: str) -> None:
        self.fields.append(words)
        self.difference = None

    def compare(self, tensor: NDArray[np.float32], trained: NDArray[np.float32]) -> None:
        if self.difference is None:
            return
        if tensor.shape != trained.shape:
            self.give_up(f"the tensor is {tensor.shape[1:]}, needed is {trained.shape[1:]}")
            return
        difference = float(np.abs(tensor - trained).max())
        if np.isfinite(difference):
            self.difference = max(self.difference, difference)
        else:
            self.give_up("the tensor is not finite")

    def values(self, grey_level: float | UnsetType = UNSET) -> ImageValues:
        return ImageValues(self.difference, tuple(self.fields), grey_level)


def _by_contract(student_input: StudentInput, contract: Contract) -> tuple[StudentInput, list[str]]:
    """The student's input with its z-score folded anew, and where that is not what it says."""
    entries = contract.zscore.get(student_input.modality, contract.zscore.get(""))
    bands_in_data = len(entries.mu) if entries else max(student_input.bands) + 1
    channels = contract.bind(student_input.modality, student_input.bands, bands_in_data)
    ranges = list(zip(student_input.grey_lo, student_input.grey_hi, strict=True))
    if student_input.encoding == "contract":
        ranges = [channels.scaling.dst_range] * len(student_input.bands)
    bands = ", ".join(map(str, student_input.bands))
    folded: dict[str, Any] = {**linear_encoding(ranges, channels)}
    wrong = [
        f"student_input.json: {key} is {_format_values(getattr(student_input, key))}, "
        f"preprocessing.json gives {_format_values(values)} for bands {bands} of "
        f"{student_input.modality}"
        for key, values in folded.items()
        if getattr(student_input, key) != values
    ]
    return replace(student_input, **folded), wrong


def _format_values(values: tuple[float, ...]) -> str:
    return ", ".join(f"{value:.7g}" for value in values)


def _read_pipeline(path: Path, student_input: StudentInput) -> tuple[Pipeline | None, list[str]]:
    try:
        pipeline = Pipeline(path.read_text())
    except (OSError, UnicodeDecodeError, PipelineError) as error:
        return None, [f"{path.name}: {error}"]
    return pipeline, [
        f"{path.name}: {words}" for words in pipeline_differences(pipeline, student_input)
    ]


def _read_images(
    folder: Path, classes: list[str], val: DatasetSplit, part: slice, student_input: StudentInput
) -> NDArray[np.uint8]:
    height, width = student_input.patch_hw if student_input.device_resize else student_input.size_hw
    images = np.empty((len(val.labels[part]), height, width, len(student_input.bands)), np.uint8)
    for i, (label, row) in enumerate(zip(val.labels[part], val.rows[part], strict=True)):
        path = folder / classes[label] / f"row{row}.png"
        name = path.relative_to(folder.parent).as_posix()
        try:
            image = read_png(path)
        except FileNotFoundError as error:
            raise _ImageError(f"{name} is missing") from error
        except (OSError, ValueError) as error:
            raise _ImageError(f"{name} is not a readable image: {error}") from error
        if image.shape != images.shape[1:] or image.dtype != np.uint8:
            raise _ImageError(
                f"{name} is {image.dtype} {image.shape}, needed is uint8 {images.shape[1:]}"
            )
        images[i] = image
    return images
