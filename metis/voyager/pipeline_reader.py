"""Read a Voyager pipeline YAML and do to images what it says, operator by operator.

Written against the SDK's documentation and public code, and on purpose not against the file that
writes the YAML: what one of them gets wrong, the other must not repeat.

Source: Voyager SDK 1.2.5 to 1.8, operators as written (the calibration path); an operator that
appears twice gets both times the parameters of the last one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import yaml
from PIL import Image

from preprocessing.resize import resize

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from preprocessing.student_input import StudentInput


_PILLOW_FILTERS = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
}


class PipelineError(ValueError):
    """A pipeline YAML that does not say what to do, or says it in another way than documented."""


class Pipeline:
    """The task of a pipeline YAML."""

    def __init__(self, text: str) -> None:
        """Parse the text.

        Raises:
            PipelineError: not YAML, or not one task with input and preprocess.
        """
        try:
            tree = yaml.safe_load(text)
            (task,) = tree["pipeline"]
            ((self.name, body),) = task.items()
            self.color_format = str(body["input"]["color_format"])
            steps = [_only(step) for step in body["preprocess"]]
            self.model: dict[str, Any] = dict(tree["models"][body["model_name"]])
            names = [_plain(name) for name, _ in steps]
            last = {n: dict(params or {}) for n, (_, params) in zip(names, steps, strict=True)}
        except (yaml.YAMLError, KeyError, TypeError, ValueError, AttributeError) as error:
            raise PipelineError(f"not a pipeline with one task: {error!r}") from error
        #: (name, parameters) in order; a name that appears twice has its last parameters twice.
        self.operators = [(name, last[name]) for name in names]

    def tensor(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        """What the network gets for images as files hold them.

        Args:
            images: uint8, (N, H, W, 3) in RGB order or (N, H, W, 1) gray.

        Returns:
            float32, (N, C, H', W').

        Raises:
            PipelineError: an operator that is unknown, out of place or without sense.
        """
        # Readers of image files give RGB, whatever they hold.
        value: NDArray[Any] = np.repeat(images, 3, axis=3) if images.shape[3] == 1 else images
        if self.color_format == "BGR":
            value = value[..., ::-1]
        elif self.color_format != "RGB":
            raise PipelineError(f"input.color_format {self.color_format} is not RGB or BGR")
        for name, params in self.operators:
            operator = _OPERATORS.get(name)
            if operator is None:
                raise PipelineError(f"operator {name} is not known here")
            try:
                value = operator(value, params)
            except PipelineError:
                raise
            except (TypeError, ValueError, OverflowError, MemoryError) as error:
                raise PipelineError(f"{name} can't be done with {params}: {error}") from error
        if value.dtype != np.float32:
            raise PipelineError("no torch-totensor: the network would get an image")
        return value


def _only(step: dict[str, Any]) -> tuple[str, Any]:
    """The operator of a list item, and its parameters; ValueError when there is not one."""
    ((name, params),) = step.items()
    return name, params


def _plain(name: str) -> str:
    return name.replace("-", "").replace("_", "")


def _image(value: NDArray[Any], operator: str) -> NDArray[np.uint8]:
    if value.dtype != np.uint8:
        raise PipelineError(f"{operator} stands after torch-totensor; it works on images")
    return value


def _tensor(value: NDArray[Any], operator: str) -> NDArray[np.float32]:
    if value.dtype != np.float32:
        raise PipelineError(f"{operator} stands before torch-totensor; it works on tensors")
    return value


def _resize(value: NDArray[Any], params: dict[str, Any]) -> NDArray[Any]:
    images = _image(value, "resize")
    width, height = int(params.get("width", 0)), int(params.get("height", 0))
    interpolation = str(params.get("interpolation", "bilinear"))
    if not width or not height or interpolation not in _PILLOW_FILTERS:
        raise PipelineError(f"resize {params} is not width and height, nearest or bilinear")
    if params.get("half_pixel_centers", False):
        # OpenCV's functions; ours are tested to be equal to them bit for bit.
        return resize(images, (height, width), interpolation, True)
    return np.stack([_pillow(image, width, height, interpolation) for image in images])


def _pillow(
    image: NDArray[np.uint8], width: int, height: int, interpolation: str
) -> NDArray[np.uint8]:
    gray = image.shape[2] == 1
    pixels = np.asarray(
        Image.fromarray(image[..., 0] if gray else np.ascontiguousarray(image)).resize(
            (width, height), _PILLOW_FILTERS[interpolation]
        )
    )
    return pixels[..., None] if gray else pixels


def _convert_color(value: NDArray[Any], params: dict[str, Any]) -> NDArray[Any]:
    images = _image(value, "convert-color")
    kind = params.get("format")
    if kind in ("RGB2BGR", "BGR2RGB"):
        reordered: NDArray[np.uint8] = images[..., ::-1]
        return reordered
    if kind in ("RGB2GRAY", "BGR2GRAY"):
        # ITU-R BT.601 with 14 fractional bits, as OpenCV's cvtColor.
        weights = np.array([4899, 9617, 1868], np.int32)
        sums = images.astype(np.int32) @ (weights if kind == "RGB2GRAY" else weights[::-1])
        gray: NDArray[np.uint8] = ((sums + 8192) >> 14).astype(np.uint8)[..., None]
        return gray
    raise PipelineError(f"convert-color format {kind} is not known here")


def _to_tensor(value: NDArray[Any], params: dict[str, Any]) -> NDArray[Any]:
    tensor: NDArray[np.float32] = (
        _image(value, "torch-totensor").transpose(0, 3, 1, 2).astype(np.float32)
    )
    return tensor / np.float32(255) if params.get("scale", True) else tensor


def _normalize(value: NDArray[Any], params: dict[str, Any]) -> NDArray[Any]:
    tensor = _tensor(value, "normalize")
    mean, std = (
        _numbers(params.get(k, v), tensor.shape[1]) for k, v in (("mean", "0"), ("std", "1"))
    )
    return (tensor - mean) / std


def _linear_scaling(value: NDArray[Any], params: dict[str, Any]) -> NDArray[Any]:
    tensor = _tensor(value, "linear-scaling")
    mean, shift = (
        _numbers(params.get(k, v), tensor.shape[1]) for k, v in (("mean", "1"), ("shift", "0"))
    )
    return tensor / mean + shift


def _numbers(words: object, channels: int) -> NDArray[np.float32]:
    """A comma string, a YAML list or one number, as (1, C, 1, 1)."""
    items = words if isinstance(words, list) else str(words).split(",")
    try:
        values = np.array([float(item) for item in items], np.float32)
    except (TypeError, ValueError) as error:
        raise PipelineError(f"{words!r} is not numbers") from error
    if len(values) not in (1, channels):
        raise PipelineError(f"{words!r} has {len(values)} values for {channels} channels")
    return values.reshape(1, -1, 1, 1)


_OPERATORS = {
    "resize": _resize,
    "convertcolor": _convert_color,
    "torchtotensor": _to_tensor,
    "normalize": _normalize,
    "linearscaling": _linear_scaling,
}


def pipeline_differences(pipeline: Pipeline, student_input: StudentInput) -> list[str]:
    """Where a pipeline says something else than the student's input needs, field by field.

    The reference is the student's input itself: which operators its numbers call for.
    """
    differences = []
    if pipeline.color_format != "RGB":
        differences.append(f"input.color_format is {pipeline.color_format}, needed is RGB")
    expected: list[tuple[str, dict[str, Any]]] = []
    if len(student_input.bands) == 1:
        expected.append(("convertcolor", {"format": "RGB2GRAY"}))
    if student_input.device_resize:
        height, width = student_input.size_hw
        expected.append(
            (
                "resize",
                {
                    "width": width,
                    "height": height,
                    "half_pixel_centers": student_input.half_pixel_centers,
                    "interpolation": student_input.interpolation,
                },
            )
        )
    expected += [
        ("torchtotensor", {"scale": False}),
        ("normalize", {"mean": student_input.mean, "std": student_input.std}),
    ]
    names = [name for name, _ in pipeline.operators]
    if names != [name for name, _ in expected]:
        operators = ", ".join(name for name, _ in expected)
        differences.append(f"preprocess is {', '.join(names)}; needed is {operators}")
    present = dict(pipeline.operators)
    for name, params in expected:
        for key, value in params.items():
            actual = present.get(name, {}).get(key)
            if name in present and not _is_same(actual, value):
                differences.append(f"{name}.{key} is {actual}, needed is {_format(value)}")
    needed_of_model = {
        "input_tensor_layout": "NCHW",
        "input_tensor_shape": [1, len(student_input.bands), *student_input.size_hw],
        "input_color_format": "GRAY" if len(student_input.bands) == 1 else "RGB",
    }
    for key, value in needed_of_model.items():
        if pipeline.model.get(key) != value:
            differences.append(f"{key} is {pipeline.model.get(key)}, needed is {value}")
    return differences


def _is_same(actual: object, expected: object) -> bool:
    if isinstance(expected, tuple):
        count = len(expected)
        try:
            return np.array_equal(_numbers(actual, count), _numbers(list(expected), count))
        except PipelineError:
            return False
    return actual == expected


def _format(value: object) -> str:
    return ", ".join(f"{v:.7g}" for v in value) if isinstance(value, tuple) else str(value)
