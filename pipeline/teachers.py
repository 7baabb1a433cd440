"""Teacher networks: open, check, run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from onnx import TensorProto

from pipeline.prefetch import prefetched
from pipeline.reference import Threads, fastest_threads, open_session
from pipeline.stage import InputError
from pipeline.teacher_graphs import (
    GraphError,
    external_files,
    graph_inputs,
    leading_normalization,
    trailing_softmax,
    with_outputs,
)
from preprocessing.apply import teacher_tensor

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from pathlib import Path

    from numpy.typing import NDArray

    from pipeline.sources import TeacherParams
    from preprocessing.contract import Contract, Scaling, ZScore

#: Patches per call where a model's batch size is free.
BATCH = 256

#: Patches per call when threads are compared.
_TRIAL_BATCH = 16

_INPUT_TYPES: dict[int, type[np.floating[Any]]] = {
    TensorProto.FLOAT: np.float32,
    TensorProto.FLOAT16: np.float16,
}


@dataclass(frozen=True)
class Teacher:
    """One checked teacher."""

    name: str  # file name without suffix
    files: tuple[Path, ...]  # its file and those with weights outside; none when from a hub
    params: TeacherParams
    scaling: Scaling
    zscore: ZScore | None  # of its bands; None when z-scoring is off or done by the graph
    size_hw: tuple[int, int]
    layout: str
    batch: int | None  # fixed batch size, None when free
    dtype: type[np.floating[Any]]  # of the input
    opset: int | None  # None for a torch teacher
    ending: str  # "logits"; "softmax cut off" when its own output came after a softmax
    infer: Callable[[NDArray[Any]], list[NDArray[Any]]]  # one batch in; logits, then features

    @property
    def modality(self) -> str:
        """Of its bands."""
        return self.params.modality

    @property
    def bands(self) -> tuple[int, ...]:
        """That it sees, in channel order."""
        return self.params.bands

    def prepare(self, patches: NDArray[np.generic]) -> NDArray[np.float32]:
        """Stored patches of its bands, in its order, (N, H, W, C), as the contract wants them.

        Returns:
            float32, (N, C, H', W'), see `teacher_tensor`.
        """
        return teacher_tensor(
            patches, self.scaling, self.zscore, self.size_hw, interpolation=self.params.resize
        )

    def outputs(
        self,
        patches: NDArray[np.generic],
        prepare: Callable[[NDArray[np.generic]], NDArray[np.float32]] | None = None,
    ) -> list[NDArray[np.float32]]:
        """What the network says of some patches.

        Args:
            patches: stored values of its bands, in its order, (N, H, W, C).
            prepare: makes tensors of them in another way than the contract's.

        Returns:
            float32: its final output (N, classes), then every tensor of `params.features`.
        """
        step = self.batch or BATCH
        tensors = prefetched(self._batches(patches, step, prepare or self.prepare))
        parts = [
            [part[:count].astype(np.float32) for part in self._run(tensor)]
            for tensor, count in tensors
        ]
        first, *features = (np.concatenate(same) for same in zip(*parts, strict=True))
        return [first.reshape(len(patches), -1), *features]

    def _batches(
        self,
        patches: NDArray[np.generic],
        step: int,
        prepare: Callable[[NDArray[np.generic]], NDArray[np.float32]],
    ) -> Iterator[tuple[NDArray[Any], int]]:
        for start in range(0, len(patches), step):
            tensor: NDArray[Any] = prepare(patches[start : start + step])
            count = len(tensor)
            if self.layout == "NHWC":
                tensor = np.ascontiguousarray(tensor.transpose(0, 2, 3, 1))
            if self.batch and count < step:  # a fixed batch needs its size; the rest is thrown away
                tensor = np.concatenate([tensor, np.repeat(tensor[-1:], step - count, axis=0)])
            yield tensor.astype(self.dtype, copy=False), count

    def _run(self, tensor: NDArray[Any]) -> list[NDArray[Any]]:
        first, *features = self.infer(tensor)
        return [first.reshape(len(tensor), -1), *features]


def open_teacher(
    path: Path | None,
    params: TeacherParams,
    contract: Contract,
    bands_in_data: int,
    threads: Threads | None = None,
) -> Teacher:
    """Open a teacher and check it against the contract and the data.

    Args:
        path: its ONNX file, or the weights of a torch teacher; None: those of a hub.
        params: how it is described in kdpipe.yaml.
        contract: statistics and classes.
        bands_in_data: of its modality.
        threads: for onnxruntime.

    Raises:
        InputError: unreadable, truncated or unsafe file; not one input; wrong channel count, input
            size, type or number of classes; a second normalization. The message names the file.
        ContractError: the contract has no statistics for the teacher's bands.
    """
    zscore = contract.statistics(params.modality, params.bands, bands_in_data)
    if params.zscore == "graph":
        zscore = None
    if params.timm is not None:
        from pipeline.torch_teachers import open_torch_teacher

        teacher = open_torch_teacher(path, params, contract, zscore)
    else:
        assert path is not None, "ingest's own checks"
        teacher = _open_onnx(path, params, contract, zscore, threads)
    _check_classes(teacher, contract)
    return teacher


def open_teachers(
    wanted: Iterable[tuple[Path | None, TeacherParams, int]], contract: Contract
) -> tuple[list[Teacher], Threads | None]:
    """Open teachers on as many threads as are fastest for the first of them here and now.

    Args:
        wanted: file, description and number of bands in the data, as `open_teacher` takes them.
        contract: statistics and classes.

    Returns:
        The teachers, and the threads of those in onnxruntime, if there are any.

    Raises:
        InputError, ContractError: see `open_teacher`.
    """
    teachers = []
    threads: Threads | None = None
    for path, params, bands_in_data in wanted:
        teacher = open_teacher(path, params, contract, bands_in_data, threads)
        if threads is None and (threads := choose_threads(teacher)):
            teacher = open_teacher(path, params, contract, bands_in_data, threads)
        teachers.append(teacher)
    return teachers, threads


def choose_threads(teacher: Teacher) -> Threads | None:
    """Measure how onnxruntime runs a teacher fastest on this machine; None for a torch teacher."""
    if teacher.opset is None:
        return None
    channels, (height, width) = len(teacher.bands), teacher.size_hw
    batch = teacher.batch or _TRIAL_BATCH
    shape = (
        (batch, channels, height, width)
        if teacher.layout == "NCHW"
        else (batch, height, width, channels)
    )
    return fastest_threads(teacher.files[0], shape, teacher.dtype)


def _open_onnx(
    path: Path,
    params: TeacherParams,
    contract: Contract,
    zscore: ZScore | None,
    threads: Threads | None,
) -> Teacher:
    model, external = _read(path)
    source = _only_input(path, model)
    channels_first = contract.layout == "NCHW"
    tensor_type = source.type.tensor_type
    dims = [d.dim_value if d.HasField("dim_value") else None for d in tensor_type.shape.dim]
    if len(dims) != 4:
        raise InputError(f"{path.name}: its input has {len(dims)} dimensions, not 4")
    batch, channels = dims[0], dims[1 if channels_first else 3]
    height, width = dims[2:] if channels_first else dims[1:3]
    if channels is not None and channels != len(params.bands):
        raise InputError(
            f"{path.name}: its input has {channels} channels ({contract.layout}), but its bands in "
            f"kdpipe.yaml are {list(params.bands)}"
        )
    if tensor_type.elem_type not in _INPUT_TYPES:
        kind = TensorProto.DataType.Name(tensor_type.elem_type).lower()
        raise InputError(f"{path.name}: its input is {kind}; float or float16 is needed")
    _check_normalization(path, model, params, zscore)
    logits = trailing_softmax(model)
    session = _session(path, model, [logits] if logits else [], params.features, threads)
    name = source.name
    versions = [o.version for o in model.opset_import if o.domain in ("", "ai.onnx")]
    return Teacher(
        name=path.stem,
        files=(path, *external),
        params=params,
        scaling=contract.scaling_of(params.modality),
        zscore=zscore,
        size_hw=(height or contract.size_hw[0], width or contract.size_hw[1]),
        layout=contract.layout,
        batch=batch,
        dtype=_INPUT_TYPES[tensor_type.elem_type],
        opset=max(versions, default=0),
        ending="softmax cut off" if logits else "logits",
        infer=lambda tensor: session.run(None, {name: tensor}),
    )


def _session(
    path: Path,
    model: onnx.ModelProto,
    logits: list[str],
    features: Iterable[str],
    threads: Threads | None,
) -> Any:  # noqa: ANN401 - onnxruntime has no types
    """The session of a model, edited where its own output is not the one that is wanted."""
    wanted = [*(logits or [model.graph.output[0].name]), *features]
    try:
        if wanted == [value.name for value in model.graph.output]:
            return open_session(path, threads, cuda=True)
        whole = onnx.load(path)  # with its weights: a model in memory has no folder to look in
        return open_session(with_outputs(whole, wanted).SerializeToString(), threads, cuda=True)
    except GraphError as error:
        raise InputError(f"{path.name}: {error}") from error
    except Exception as error:  # onnxruntime's exceptions share no narrower base
        raise InputError(f"{path.name}: onnxruntime can't run it: {_first_line(error)}") from error


def _check_normalization(
    path: Path, model: onnx.ModelProto, params: TeacherParams, zscore: ZScore | None
) -> None:
    """Refuse to normalize twice, or not at all, unless the config says so."""
    nodes = leading_normalization(model)
    if nodes and zscore is not None and params.zscore == "contract":
        raise InputError(
            f"{path.name} normalizes its input itself ({', '.join(nodes)}), and preprocessing.json "
            "asks for a z-score before; say which with ingest.teachers.zscore: graph (only the "
            "graph does) or both (one after the other)"
        )
    if not nodes and params.zscore == "graph":
        raise InputError(
            f"{path.name}: ingest.teachers.zscore is graph, but its graph does not begin with a "
            "normalization (Sub, Add, Div, Mul by constants, or BatchNormalization)"
        )


def _read(path: Path) -> tuple[onnx.ModelProto, tuple[Path, ...]]:
    """Parse and check an ONNX file; its weights outside must lie in its own folder."""
    try:
        model = onnx.load(path, load_external_data=False)
    except Exception as error:  # protobuf's DecodeError has no stable home across its versions
        raise InputError(
            f"{path.name} is not a readable ONNX file (truncated?): {_first_line(error)}"
        ) from error
    external = []
    for name in external_files(model):
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


def _only_input(path: Path, model: onnx.ModelProto) -> onnx.ValueInfoProto:
    inputs = graph_inputs(model)
    for what, values in (("inputs", inputs), ("outputs", list(model.graph.output))):
        if len(values) != 1:
            names = ", ".join(value.name for value in values) or "none"
            raise InputError(f"{path.name} has {len(values)} {what} ({names}); a teacher has one")
    return inputs[0]


def _check_classes(teacher: Teacher, contract: Contract) -> None:
    """Run one patch of zeros: the output must have a value for every class."""
    shown = teacher.files[0].name if teacher.files else teacher.name
    height, width = teacher.size_hw
    zeros = np.zeros((1, height, width, len(teacher.bands)), np.float32)
    try:
        classes = teacher.outputs(zeros)[0].shape[-1]
    except Exception as error:  # onnxruntime's exceptions share no narrower base
        raise InputError(f"{shown} fails on a patch: {_first_line(error)}") from error
    if classes != len(contract.labels):
        raise InputError(
            f"{shown} has {classes} classes, but preprocessing.json labels {len(contract.labels)}"
        )


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
