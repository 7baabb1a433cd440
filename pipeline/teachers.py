"""Teacher networks in ONNX: open, check, run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from onnx import TensorProto
from onnx.external_data_helper import ExternalDataInfo

from pipeline.reference import open_session
from pipeline.stage import InputError
from preprocessing.apply import teacher_tensor

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    import onnxruntime as ort
    from numpy.typing import NDArray

    from pipeline.sources import TeacherParams
    from preprocessing.contract import Contract, Scaling, ZScore

#: Patches per call where a model's batch size is free.
BATCH = 256

#: Probabilities are taken as at least this before their logarithm; float32 holds no less.
SMALLEST_PROBABILITY = float(np.finfo(np.float32).tiny)

_INPUT_TYPES: dict[int, type[np.floating[Any]]] = {
    TensorProto.FLOAT: np.float32,
    TensorProto.FLOAT16: np.float16,
}


@dataclass(frozen=True)
class Teacher:
    """One checked teacher."""

    name: str  # file name without suffix
    path: Path
    modality: str
    bands: tuple[int, ...]
    weight: float
    resize: str  # interpolation from patch to input size
    scaling: Scaling
    zscore: ZScore | None  # of its bands
    size_hw: tuple[int, int]
    layout: str
    batch: int | None  # fixed batch size, None when free
    dtype: type[np.floating[Any]]  # of the input
    opset: int
    external: tuple[Path, ...]  # files with weights outside the ONNX file
    session: ort.InferenceSession

    def raw(self, patches: NDArray[np.generic]) -> NDArray[np.float32]:
        """The model's output for stored patches of its bands, in its order, (N, H, W, C).

        Returns:
            float32, (N, classes): logits or probabilities, whatever the model ends with.
        """
        tensor: NDArray[Any] = teacher_tensor(
            patches, self.scaling, self.zscore, self.size_hw, interpolation=self.resize
        )
        if self.layout == "NHWC":
            tensor = np.ascontiguousarray(tensor.transpose(0, 2, 3, 1))
        tensor = tensor.astype(self.dtype, copy=False)
        name = self.session.get_inputs()[0].name
        step = self.batch or BATCH
        outputs = []
        for start in range(0, len(tensor), step):
            part = tensor[start : start + step]
            short = step - len(part) if self.batch else 0
            if short:  # a fixed batch needs its size; what fills it up is thrown away
                part = np.concatenate([part, np.repeat(part[-1:], short, axis=0)])
            result = self.session.run(None, {name: part})[0]
            outputs.append(result[: step - short].reshape(-1, result.shape[-1]))
        return np.concatenate(outputs).astype(np.float32, copy=False)


def open_teacher(
    path: Path, params: TeacherParams, contract: Contract, bands_in_data: int
) -> Teacher:
    """Open a teacher and check it against the contract and the data.

    Raises:
        InputError: unreadable, truncated or unsafe file; not one input; wrong channel count, input
            size, type or number of classes. The message names the file.
        ContractError: the contract has no statistics for the teacher's bands.
    """
    zscore = contract.statistics(params.modality, params.bands, bands_in_data)
    model, external = _read(path)
    source = _only_input(path, model)
    channels_first = contract.layout == "NCHW"
    dims = [d.dim_value if d.HasField("dim_value") else None for d in source.tensor_type.shape.dim]
    if len(dims) != 4:
        raise InputError(f"{path.name}: its input has {len(dims)} dimensions, not 4")
    batch, channels = dims[0], dims[1 if channels_first else 3]
    height, width = dims[2:] if channels_first else dims[1:3]
    if channels is not None and channels != len(params.bands):
        raise InputError(
            f"{path.name}: its input has {channels} channels ({contract.layout}), but its bands in "
            f"kdpipe.yaml are {list(params.bands)}"
        )
    if source.tensor_type.elem_type not in _INPUT_TYPES:
        kind = TensorProto.DataType.Name(source.tensor_type.elem_type).lower()
        raise InputError(f"{path.name}: its input is {kind}; float or float16 is needed")
    try:
        session = open_session(path)
    except Exception as error:  # onnxruntime's exceptions share no narrower base
        raise InputError(f"{path.name}: onnxruntime can't run it: {_first_line(error)}") from error
    teacher = Teacher(
        name=path.stem,
        path=path,
        modality=params.modality,
        bands=params.bands,
        weight=params.weight,
        resize=params.resize,
        scaling=contract.scaling_of(params.modality),
        zscore=zscore,
        size_hw=(height or contract.size_hw[0], width or contract.size_hw[1]),
        layout=contract.layout,
        batch=batch,
        dtype=_INPUT_TYPES[source.tensor_type.elem_type],
        opset=max(
            (o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), default=0
        ),
        external=external,
        session=session,
    )
    _check_classes(teacher, contract)
    return teacher


def _read(path: Path) -> tuple[onnx.ModelProto, tuple[Path, ...]]:
    """Parse and check an ONNX file; its weights outside must lie in its own folder."""
    try:
        model = onnx.load(path, load_external_data=False)
    except Exception as error:  # protobuf's DecodeError has no stable home across its versions
        raise InputError(
            f"{path.name} is not a readable ONNX file (truncated?): {_first_line(error)}"
        ) from error
    external = []
    for name in sorted(set(_external_files(model))):
        file = path.parent / name
        if not file.resolve().is_relative_to(path.parent.resolve()):
            raise InputError(
                f"{path.name}: its external data {name!r} lies outside its folder; refused"
            )
        if not file.is_file():
            raise InputError(f"{path.name}: its external data {name!r} is missing beside it")
        external.append(file)
    try:
        onnx.checker.check_model(str(path))
    except Exception as error:  # ValidationError for most, RuntimeError or ValueError for some
        raise InputError(f"{path.name} is not a valid ONNX model: {_first_line(error)}") from error
    return model, tuple(external)


def _external_files(model: onnx.ModelProto) -> Iterator[str]:
    for tensor in model.graph.initializer:
        if tensor.data_location == TensorProto.EXTERNAL:
            yield str(ExternalDataInfo(tensor).location)


def _only_input(path: Path, model: onnx.ModelProto) -> onnx.TypeProto:
    weights = {initializer.name for initializer in model.graph.initializer}
    inputs = [value for value in model.graph.input if value.name not in weights]
    if len(inputs) != 1:
        names = ", ".join(value.name for value in inputs) or "none"
        raise InputError(f"{path.name} has {len(inputs)} inputs ({names}); a teacher has one")
    kind: onnx.TypeProto = inputs[0].type
    return kind


def _check_classes(teacher: Teacher, contract: Contract) -> None:
    """Run one patch of zeros: the output must have a value for every class."""
    height, width = teacher.size_hw
    zeros = np.zeros((1, height, width, len(teacher.bands)), np.float32)
    try:
        classes = teacher.raw(zeros).shape[-1]
    except Exception as error:  # onnxruntime's exceptions share no narrower base
        raise InputError(f"{teacher.path.name} fails on a patch: {_first_line(error)}") from error
    if classes != len(contract.labels):
        raise InputError(
            f"{teacher.path.name} has {classes} classes, but preprocessing.json labels "
            f"{len(contract.labels)}"
        )


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def gives_probabilities(outputs: NDArray[np.float32]) -> bool:
    """Whether rows look like the output of a softmax: none below 0, each sums to 1 within 1e-3."""
    return bool((outputs >= 0).all() and np.allclose(outputs.sum(axis=1), 1, atol=1e-3))


def to_logits(outputs: NDArray[np.float32], probabilities: bool) -> NDArray[np.float32]:
    """Outputs (N, classes) as logits.

    The logarithm of softmax(z) is z minus one number per row, and softmax(z / T) does not change
    when such a number is taken off: for every temperature it is as good as z.
    """
    if not probabilities:
        return outputs
    return np.log(np.maximum(outputs, SMALLEST_PROBABILITY))


def ensemble_logits(
    members: Sequence[NDArray[np.float32]], weights: Sequence[float]
) -> NDArray[np.float32]:
    """Weighted mean of the members' logits, each (N, classes); weights are divided by their sum."""
    total = sum(weights)
    mean = np.zeros_like(members[0], dtype=np.float64)
    for logits, weight in zip(members, weights, strict=True):
        mean += logits * (weight / total)
    return mean.astype(np.float32)
