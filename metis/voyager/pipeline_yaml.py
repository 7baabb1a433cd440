"""The student's input as a Voyager pipeline YAML (axelera-model-format 1.0.0).

Source: Voyager SDK 1.2.5 to 1.8, public Python layer. The text is written by hand because the SDK
reads a strict subset of YAML: block style, no anchors, no null, bare True and False, and one
operator per list item.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from decimal import Decimal
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from preprocessing.student_input import StudentInput


@dataclass(frozen=True)
class DevicePipeline:
    """What the YAML says besides the student's input."""

    name: str  # of the network; also of the file
    labels: int  # number of classes
    weight_path: str  # ONNX of the student, relative to the YAML
    dataset: str  # folder beside the YAML, with calibration/, val/ and labels.txt
    scheme: str
    aipu_cores: int
    sdk_release: str = "1.8"  # before 1.3 compilation_config comes in sections
    path_prefix: str = ""  # put before the names of files: where the folder will lie

    def at(self, name: str) -> str:
        """A file's name as the YAML gives it: relative to the YAML, or below the prefix."""
        return f"{self.path_prefix.rstrip('/')}/{name}" if self.path_prefix else name


def yaml_obstacle(student_input: StudentInput) -> str:
    """Why this input can't go through the YAML pipeline, or nothing.

    The SDK's image readers give three channels (or one, by conversion), 8 bit. Its normalize takes
    four values too, but no reader gives a fourth channel: alpha is dropped, or 255 everywhere.
    """
    channels = len(student_input.bands)
    if channels in (1, 3):
        return ""
    return (
        f"the student sees {channels} bands, and the SDK's image readers give 1 or 3 channels; "
        "deploy it through the runtime API with tensors"
    )


def render_yaml(student_input: StudentInput, pipeline: DevicePipeline) -> str:
    """The text of the YAML file.

    Raises:
        ValueError: the input can't go through the YAML pipeline; see `yaml_obstacle`.
    """
    obstacle = yaml_obstacle(student_input)
    if obstacle:
        raise ValueError(obstacle)
    height, width = student_input.size_hw
    gray = len(student_input.bands) == 1
    bands = ", ".join(map(str, student_input.bands))
    return "\n".join(
        [
            f"# preprocessing.json sha256: {student_input.contract}",
            f"# channels are bands {bands} of {student_input.modality}",
            "axelera-model-format: 1.0.0",
            f"name: {pipeline.name}",
            f"description: {pipeline.name}, a student distilled by kdpipe",
            "pipeline:",
            f"  - {pipeline.name}:",
            f"      model_name: {pipeline.name}",
            "      input:",
            "        type: image",
            "        color_format: RGB",
            "      preprocess:",
            *_preprocess(student_input, gray=gray),
            "      postprocess:",
            "        - topk:",
            "            k: 1",
            "models:",
            f"  {pipeline.name}:",
            "    class: AxONNXModel",
            "    class_path: $AXELERA_FRAMEWORK/ax_models/base_onnx.py",
            f"    weight_path: {pipeline.at(pipeline.weight_path)}",
            "    task_category: Classification",
            "    input_tensor_layout: NCHW",
            f"    input_tensor_shape: [1, {len(student_input.bands)}, {height}, {width}]",
            f"    input_color_format: {'GRAY' if gray else 'RGB'}",
            f"    num_classes: {pipeline.labels}",
            f"    dataset: {pipeline.dataset}",
            "    extra_kwargs:",
            *_compilation(pipeline),
            "datasets:",
            f"  {pipeline.dataset}:",
            "    class: TorchvisionDataAdapter",
            "    class_path: $AXELERA_FRAMEWORK/ax_datasets/torchvision.py",
            # Without a name of its own, a folder called ImageNet or MNIST would be taken for it.
            "    dataset_name: ImageFolder",
            # Below --data-root; the keys that end in _path are relative to this file.
            f"    data_dir_name: {pipeline.dataset}",
            "    val_data: val",
            f"    repr_imgs_dir_path: {pipeline.at(f'{pipeline.dataset}/calibration')}",
            f"    labels_path: {pipeline.at(f'{pipeline.dataset}/labels.txt')}",
            "",
        ]
    )


def _compilation(pipeline: DevicePipeline) -> list[str]:
    """Compiler settings, under the names and in the form of the SDK's release."""
    if tuple(int(n) for n in pipeline.sdk_release.split(".")) < (1, 3):
        return [
            f"      aipu_cores: {pipeline.aipu_cores}",
            f"      max_compiler_cores: {pipeline.aipu_cores}",
            "      compilation_config:",
            # A section replaces the SDK's own, so its other values are said again.
            "        quantization_config:",
            f"          ptq_scheme: {pipeline.scheme}",
            "          quantizer_version: 2",
            "          remove_quantization_of_inputs_outputs_from_graph: True",
            "          quantization_debug: False",
        ]
    share = "0.25" if pipeline.aipu_cores == 1 else "1.0"
    return [
        "      compilation_config:",
        f"        quantization_scheme: {pipeline.scheme}",
        f"        aipu_cores_used: {pipeline.aipu_cores}",
        f"        resources_used: {share}",
    ]


def _preprocess(student_input: StudentInput, *, gray: bool) -> list[str]:
    lines = []
    if gray:
        # Images are read as RGB whatever they hold; this is the conversion that calibration and
        # inference both do. Equal channels give back exactly the gray value.
        lines += ["        - convert-color:", "            format: RGB2GRAY"]
    if student_input.device_resize:
        height, width = student_input.size_hw
        lines += [
            "        - resize:",
            f"            width: {width}",
            f"            height: {height}",
            f"            half_pixel_centers: {student_input.half_pixel_centers}",
            f"            interpolation: {student_input.interpolation}",
        ]
    return [
        *lines,
        "        - torch-totensor:",
        "            scale: False",
        "        - normalize:",
        f"            mean: {_numbers(student_input.mean)}",
        f"            std: {_numbers(student_input.std)}",
    ]


def _numbers(values: Sequence[float]) -> str:
    return ", ".join(map(shortest_float32, values))


def shortest_float32(value: float) -> str:
    """The fewest decimal digits that read back as the same float32; never an exponent."""
    exact = struct.unpack("f", struct.pack("f", value))[0]
    for digits in range(1, 18):
        text = f"{exact:.{digits}g}"
        if struct.unpack("f", struct.pack("f", float(text)))[0] == exact:
            break
    return format(Decimal(text), "f")
