"""Prove on the validation split that what was trained is what is deployed."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from metis.backend import QuantizedModel, open_backend
from metis.pipeline_reader import Pipeline, PipelineError, pipeline_differences
from metis.pipeline_yaml import yaml_obstacle
from pipeline.legs import Leg
from pipeline.metrics import (
    agreement,
    cosines,
    paired_difference,
    sqnr_db,
    top1,
    undisputed_agreement,
)
from pipeline.reference import reference_logits
from pipeline.splits import DatasetSplit
from preprocessing.apply import normalized, student_tensor
from preprocessing.contract import StudentInput, load_contract
from preprocessing.images import class_folders, read_png

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path
    from typing import Any

    from numpy.typing import NDArray

    from pipeline.recipe import DistillParams

#: Exported images that are compared, evenly spaced over the split; the leg says how many.
SAMPLES = 2000

_BLOCK = 64


def image_legs(
    artifacts: Mapping[str, Path], run: str, progress: Callable[[int], object] = lambda n: None
) -> list[Leg]:
    """Training tensor against the exported PNG files, read back by two independent ways.

    Args:
        artifacts: contract, student_input, dataset, device_pipeline.
        run: name of the run, which the pipeline YAML is called by.
        progress: called with the number of images just compared.

    Returns:
        The legs `png` (read back by preprocessing/ alone) and `yaml` (by doing what the YAML says).
    """
    source = "training tensor of the student"
    targets = {
        "png": "tensor from the exported PNG, by preprocessing/ alone",
        "yaml": "tensor from the exported PNG, by doing what the YAML says",
    }
    given = StudentInput.load(artifacts["student_input"])
    if obstacle := yaml_obstacle(given):
        return [Leg(name, source, to, 0, obstacle=obstacle) for name, to in targets.items()]
    labels = load_contract(artifacts["contract"]).labels
    folder = artifacts["device_pipeline"] / f"{run}-images" / "val"
    val = _spread(DatasetSplit.load(artifacts["dataset"] / "val"))
    pipeline, fields = _read_pipeline(artifacts["device_pipeline"] / f"{run}.yaml", given)
    by_png, by_yaml = 0.0, 0.0 if pipeline else None
    for start in range(0, len(val.labels), _BLOCK):
        part = slice(start, start + _BLOCK)
        trained = student_tensor(val.images[part], given)
        images = _exported(folder, class_folders(labels), val, part)
        read_back = student_tensor if given.device_resize else normalized
        by_png = max(by_png, _difference(read_back(images, given), trained))
        if pipeline and by_yaml is not None:
            try:
                by_yaml = max(by_yaml, _difference(pipeline.tensor(images), trained))
            except PipelineError as error:
                fields.append(str(error))
                by_yaml = None
        progress(len(trained))
    # Where nothing is resized bilinear there is nothing that two implementations could round apart.
    bilinear = given.device_resize and given.interpolation == "bilinear"
    n = len(val.labels)
    of_png = {
        "max_abs_difference": by_png,
        "grey_level": 1 / min(given.std) if bilinear else 0.0,
    }
    of_yaml = {"max_abs_difference": by_yaml, "fields": fields}
    return [
        Leg("png", source, targets["png"], n, of_png),
        Leg("yaml", source, targets["yaml"], n, of_yaml),
    ]


def _spread(whole: DatasetSplit) -> DatasetSplit:
    count = len(whole.labels)
    chosen = np.unique(np.linspace(0, count - 1, min(SAMPLES, count)).round().astype(int))
    return DatasetSplit(whole.images[chosen], whole.labels[chosen], whole.rows[chosen])


def _read_pipeline(path: Path, given: StudentInput) -> tuple[Pipeline | None, list[str]]:
    try:
        pipeline = Pipeline(path.read_text())
    except (OSError, PipelineError) as error:
        return None, [f"{path.name}: {error}"]
    return pipeline, [f"{path.name}: {words}" for words in pipeline_differences(pipeline, given)]


def _exported(
    folder: Path, classes: list[str], val: DatasetSplit, part: slice
) -> NDArray[np.uint8]:
    pairs = zip(val.labels[part], val.rows[part], strict=True)
    return np.stack([read_png(folder / classes[label] / f"row{row}.png") for label, row in pairs])


def _difference(one: NDArray[np.float32], other: NDArray[np.float32]) -> float:
    return float(np.abs(one - other).max()) if one.shape == other.shape else float("inf")


def export_values(
    params: DistillParams,
    weights: Path,
    given: StudentInput,
    classes: int,
    onnx: Path,
    val: DatasetSplit,
) -> dict[str, float]:
    """Torch student against ONNX student, computed anew; needs the extra `train`.

    Args:
        params: the section `distill`, which names the network.
        weights: student.safetensors.
        given: the student's input.
        classes: number of classes.
        onnx: the exported student.
        val: the patches.
    """
    from safetensors.torch import load_file

    from pipeline.students import build_student, torch_logits

    network = build_student(params.student, given, classes, seed=0, stem_stride=params.stem_stride)
    network.load_state_dict(load_file(weights))
    tensors = student_tensor(val.images, given)
    return compare_export(torch_logits(network, tensors), reference_logits(onnx, tensors))


def compare_export(trained: NDArray[np.float32], exported: NDArray[np.float32]) -> dict[str, float]:
    """Logits (N, classes) of the torch student and of its ONNX file, compared."""
    difference = float(np.abs(trained - exported).max())
    return {
        "max_abs_logit_difference": difference,
        "top1_agreement": undisputed_agreement(trained, exported, difference),
    }


def compare_int8(
    onnx: Path, model: QuantizedModel, given: StudentInput, val: DatasetSplit
) -> dict[str, Any]:
    """The float student against its int8 model on the host, on some patches."""
    tensors = student_tensor(val.images, given)
    exact, int8 = reference_logits(onnx, tensors), open_backend(model.backend).infer(model, tensors)
    loss, interval = paired_difference(
        exact.argmax(axis=1) == val.labels, int8.argmax(axis=1) == val.labels
    )
    angles = cosines(exact, int8)
    return {
        "n_val": len(val.labels),
        "top1_val_float": top1(exact, val.labels),
        "top1_val_int8": top1(int8, val.labels),
        "measured_on": "host-emulation",
        "top1_agreement": agreement(exact, int8),
        "logits_cosine_mean": float(angles.mean()),
        "logits_cosine_min": float(angles.min()),
        "logits_sqnr_db": sqnr_db(exact, int8),
        "int8_loss_points": 100 * loss,
        "int8_loss_interval95_points": [100 * bound for bound in interval],
    }
