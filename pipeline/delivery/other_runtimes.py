"""The student for other runtimes than Metis: TorchScript, TFLite, int8 weights of linear layers.

The chip takes ONNX; these are for whoever runs the same student elsewhere. Every file is run over
the validation split and compared with the ONNX student before anything is written.
"""

from __future__ import annotations

import json
import shutil
import sys
import warnings
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from pipeline.data.dataset import StudentData
from pipeline.facts import ExportedFile
from pipeline.networks.inference import reference_network
from pipeline.run.errors import StageError, first_line, require_extra
from pipeline.run.files import new_folder

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from pathlib import Path

    from numpy.typing import NDArray
    from torch.nn import Module

    from pipeline.networks.inference import Network
    from pipeline.params.distill import DistillParams
    from pipeline.run.state import RunState
    from preprocessing.scores import Comparison


SCHEMA = 1


@dataclass(frozen=True)
class Format:
    """A file format, and who writes and reads it."""

    file: str
    needs: tuple[str, ...]  # the extra and the packages that write it
    tool: str  # the distribution whose version counts
    exact: bool  # float: logits must repeat those of the ONNX student
    write: Callable[[_Source, Path], None]
    open: Callable[[Path], Network]


@dataclass(frozen=True)
class _Source:
    """The student in both forms; the torch network is made once, and only where it is needed."""

    onnx: Path
    network: Callable[[], Module]
    shape: tuple[int, int, int, int]  # (1, C, H, W)


def export_formats(state: RunState, dest: Path, formats: Iterable[str]) -> list[ExportedFile]:
    """Write the student of a run in other formats, with what is needed to feed it.

    Args:
        state: of a run whose distill is done; its artifacts were examined.
        dest: folder to make: the files, preprocessing.json, student_input.json, labels.txt, and
            export.json, which says how to call them and how they compare.
        formats: names in FORMATS.

    Raises:
        ExtraMissingError: a format needs packages that are not here.
        InputError: dest exists, or can't be written.
        StageError: a format does not repeat the ONNX student, or its writer gives up.
    """
    wanted = {name: FORMATS[name] for name in formats}
    for format in wanted.values():
        require_extra(*format.needs)
    paths = state.paths
    data = StudentData(paths)
    student_input = data.student_input
    params = state.config.params["distill"]
    weights = paths.training / "student.safetensors"
    source = _Source(
        paths.student,
        partial(_load_network, params, weights, data),
        (1, len(student_input.bands), *student_input.size_hw),
    )
    limit = state.config.params["benchmark"].limits.max_export_difference
    with new_folder(dest) as folder:
        for name in ("contract", "student_input", "labels"):
            shutil.copyfile(paths[name], folder / paths[name].name)
        exported = []
        for name, format in wanted.items():
            file = folder / format.file
            try:
                format.write(source, file)
                comparison = data.compare(
                    data.val, reference_network(paths.student), format.open(file)
                )
            except Exception as error:  # each writer and reader has exceptions of its own
                raise StageError(
                    f"{name}: {format.tool} gives up on the student: {first_line(error)}"
                ) from error
            exported.append(_describe(name, file, format, comparison))
            if format.exact:
                _demand_equal(name, comparison, limit)
        (folder / "export.json").write_text(_document(source, exported))
    return exported


def _describe(name: str, file: Path, format: Format, comparison: Comparison) -> ExportedFile:
    score = comparison.network.score()
    return ExportedFile(
        format=name,
        file=format.file,
        bytes=file.stat().st_size,
        made_by=f"{format.tool} {version(format.tool)}",
        max_abs_logit_difference=comparison.max_difference,
        agreement=comparison.agreement(),
        score=score.value,
        n_val=score.n,
        measured_on="host",
    )


def _demand_equal(name: str, comparison: Comparison, limit: float) -> None:
    difference = comparison.max_difference
    if difference > limit or comparison.undisputed_agreement() < 1:
        raise StageError(
            f"{name}: logits differ from the ONNX student by up to {difference:.2g}; "
            f"benchmark.max_export_difference is {limit:g}, so nothing was written"
        )


def _document(source: _Source, exported: list[ExportedFile]) -> str:
    document = {
        "schema": SCHEMA,
        "input": {
            "layout": "NCHW",
            "shape": list(source.shape),
            "dtype": "float32",
            "values": "scaled, resized and z-scored as student_input.json says",
        },
        "output": "logits, float32 (1, classes), classes in the order of labels.txt",
        "files": msgspec.to_builtins(exported),
    }
    return json.dumps(document, indent=1) + "\n"


def _load_network(params: DistillParams, weights: Path, data: StudentData) -> Module:
    from pipeline.training.job import load_trained_student  # torch: the format onnx does without

    return load_trained_student(params, weights, data)


def _copy(source: _Source, file: Path) -> None:
    shutil.copyfile(source.onnx, file)


def _trace(source: _Source, file: Path) -> None:
    import torch

    with torch.no_grad(), _without_advice():
        traced: Any = torch.jit.trace(  # type: ignore[no-untyped-call]
            source.network().eval(), torch.zeros(source.shape)
        )
    traced.save(str(file))


def _open_torchscript(file: Path) -> Network:
    import torch

    from pipeline.networks.export import torch_logits

    with _without_advice():
        network: Any = torch.jit.load(str(file))  # type: ignore[no-untyped-call]
    return partial(torch_logits, network)


@contextmanager
def _without_advice() -> Iterator[None]:
    """Torch recommends torch.export to whoever writes TorchScript, which was asked for here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        warnings.simplefilter("ignore", DeprecationWarning)
        yield


def _quantize_linear_layers(source: _Source, file: Path) -> None:
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from onnxruntime.quantization.shape_inference import quant_pre_process

    quant_pre_process(source.onnx, file, skip_optimization=True, skip_symbolic_shape=True)
    quantize_dynamic(file, file, op_types_to_quantize=["MatMul"], weight_type=QuantType.QInt8)


def _convert_to_tflite(source: _Source, file: Path) -> None:
    import litert_torch
    import torch

    network = source.network().eval()
    with redirect_stdout(sys.stderr):  # it tells its progress
        litert_torch.convert(network, (torch.zeros(source.shape),)).export(str(file))


def _open_tflite(file: Path) -> Network:
    from ai_edge_litert.interpreter import Interpreter

    interpreter: Any = Interpreter(model_path=str(file))
    interpreter.allocate_tensors()
    source = interpreter.get_input_details()[0]["index"]
    target = interpreter.get_output_details()[0]["index"]

    def logits(tensors: NDArray[np.float32]) -> NDArray[np.float32]:
        rows = []
        for tensor in tensors:
            interpreter.set_tensor(source, tensor[None])
            interpreter.invoke()
            rows.append(interpreter.get_tensor(target).copy())
        return np.concatenate(rows)

    return logits


_TORCH = ("train", "torch", "timm")

#: What a student can be written as, by the name that `kdpipe export --format` takes.
FORMATS = {
    "onnx": Format("student.onnx", ("train",), "kdpipe", True, _copy, reference_network),
    "torchscript": Format(
        "student.torchscript.pt", _TORCH, "torch", True, _trace, _open_torchscript
    ),
    "tflite": Format(
        "student.tflite",
        ("tflite", "litert_torch", "ai_edge_litert", "torch", "timm"),
        "litert-torch",
        True,
        _convert_to_tflite,
        _open_tflite,
    ),
    "dynamic-int8": Format(
        "student.dynamic-int8.onnx",
        ("train",),
        "onnxruntime",
        False,
        _quantize_linear_layers,
        reference_network,
    ),
}
