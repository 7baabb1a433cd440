"""A teacher in ONNX: opened, checked, its ends cut."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from onnx import TensorProto

from metis.graph.ends import (
    GraphError,
    external_files,
    graph_inputs,
    leading_normalization,
    trailing_softmax,
    with_outputs,
)
from metis.graph.sessions import Threads, open_session
from pipeline.run.errors import InputError, first_line
from pipeline.teachers.teacher import Teacher

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from pipeline.params.sources import TeacherParams
    from preprocessing.contract import Channels, Contract


_INPUT_TYPES: dict[int, type[np.floating[Any]]] = {
    TensorProto.FLOAT: np.float32,
    TensorProto.FLOAT16: np.float16,
}


def open_onnx(
    path: Path,
    params: TeacherParams,
    contract: Contract,
    channels: Channels,
    threads: Threads | None,
) -> Teacher:
    """A teacher from its ONNX file; see `open_teacher`."""
    model, external = _read_model(path)
    source = _only_input(path, model)
    channels_first = contract.layout == "NCHW"
    tensor_type = source.type.tensor_type
    dims = [d.dim_value if d.HasField("dim_value") else None for d in tensor_type.shape.dim]
    if len(dims) != 4:
        raise InputError(f"{path.name}: its input has {len(dims)} dimensions, not 4")
    batch, depth = dims[0], dims[1 if channels_first else 3]
    height, width = dims[2:] if channels_first else dims[1:3]
    if depth is not None and depth != len(params.bands):
        raise InputError(
            f"{path.name}: its input has {depth} channels ({contract.layout}), but its bands in "
            f"kdpipe.yaml are {list(params.bands)}"
        )
    if tensor_type.elem_type not in _INPUT_TYPES:
        kind = TensorProto.DataType.Name(tensor_type.elem_type).lower()
        raise InputError(f"{path.name}: its input is {kind}; float or float16 is needed")
    _check_normalization(path, model, params, channels)
    logits = trailing_softmax(model)
    session = _session(path, model, [logits] if logits else [], params.features, threads)
    name = source.name
    versions = [o.version for o in model.opset_import if o.domain in ("", "ai.onnx")]
    return Teacher(
        name=path.stem,
        files=(path, *external),
        params=params,
        channels=channels,
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
    names = [*(logits or [model.graph.output[0].name]), *features]
    try:
        if names == [value.name for value in model.graph.output]:
            return open_session(path, threads=threads, cuda=True)
        loaded = onnx.load(path)  # with its weights: a model in memory has no folder to look in
        return open_session(with_outputs(loaded, names), threads=threads, cuda=True)
    except GraphError as error:
        raise InputError(f"{path.name}: {error}") from error
    except Exception as error:  # onnxruntime's exceptions share no narrower base
        raise InputError(f"{path.name}: onnxruntime can't run it: {first_line(error)}") from error


def _check_normalization(
    path: Path, model: onnx.ModelProto, params: TeacherParams, channels: Channels
) -> None:
    """Refuse to normalize twice, or not at all, unless the config says so."""
    nodes = leading_normalization(model)
    if nodes and channels.zscore is not None and params.zscore == "contract":
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


def _read_model(path: Path) -> tuple[onnx.ModelProto, tuple[Path, ...]]:
    """Parse and check an ONNX file; its weights outside must lie in its own folder."""
    try:
        model = onnx.load(path, load_external_data=False)
    except Exception as error:  # protobuf's DecodeError has no stable home across its versions
        raise InputError(
            f"{path.name} is not a readable ONNX file (truncated?): {first_line(error)}"
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
        raise InputError(f"{path.name} is not a valid ONNX model: {first_line(error)}") from error
    return model, tuple(external)


def _only_input(path: Path, model: onnx.ModelProto) -> onnx.ValueInfoProto:
    inputs = graph_inputs(model)
    for kind, values in (("inputs", inputs), ("outputs", list(model.graph.output))):
        if len(values) != 1:
            names = ", ".join(value.name for value in values) or "none"
            raise InputError(f"{path.name} has {len(values)} {kind} ({names}); a teacher has one")
    return inputs[0]
