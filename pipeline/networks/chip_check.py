"""Can the chip run this graph, or this network of timm: what `kdpipe check` prints."""

from __future__ import annotations

import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.networks.names import ALIASES
from pipeline.run.errors import (
    ConfigError,
    InputError,
    StageError,
    first_line,
    nearest,
    require_extra,
)

if TYPE_CHECKING:
    from metis.operators.legalizer import Legalized


#: Side of the input of a network that has none of its own, and classes of its head.
DEFAULT_SIZE = 224

_CLASSES = 1000


def check(model: str, *, size: int | None, channels: int) -> Legalized:
    """Legalise an ONNX file, or a network of timm with random weights.

    Args:
        model: a file, or a name.
        size: side of a network's input; None: that of an alias, else 224.
        channels: of a network's input.

    Raises:
        ConfigError: there is no such file and no such network, or it does not take the input.
        InputError: the file is no ONNX graph.
        ExtraMissingError: a network was named, and the extra `train` is not installed.
        StageError: a rewrite is not proven exact.
    """
    path = Path(model)
    if path.exists() or path.suffix == ".onnx":
        return _check_file(path)
    return _check_network(model, size, channels)


def _check_file(path: Path) -> Legalized:
    import onnx

    from metis.operators.legalizer import RewriteError, legalize

    if not path.is_file():
        raise InputError(f"there is no file {path}")
    try:
        graph = onnx.load(path)
        onnx.checker.check_model(graph)
    except Exception as error:  # protobuf, onnx and the system have their own kinds
        raise InputError(f"{path} is no readable ONNX graph: {first_line(error)}") from error
    try:
        return legalize(graph)
    except RewriteError as error:
        raise StageError(f"{path}: {error}") from error


def _check_network(name: str, size: int | None, channels: int) -> Legalized:
    from pipeline.networks.names import timm_networks

    require_extra("train", "torch", "timm", "onnxsim")
    networks = timm_networks()
    if name not in networks:
        raise ConfigError(
            f"there is no file and no network of timm {name!r}{nearest(name, networks)}"
        )
    from pipeline.networks.build import create_network
    from pipeline.networks.export import export_network

    network_name, own_size = ALIASES.get(name, (name, DEFAULT_SIZE))
    side = size or own_size
    shape = (channels, side, side)
    try:
        network = create_network(network_name, shape, _CLASSES, seed=0)
    except InputError as error:
        raise ConfigError(f"{error}; give --size or --channels") from error
    with tempfile.TemporaryDirectory() as folder:
        return export_network(network, shape, Path(folder) / "network.onnx")


def document(model: str, legalized: Legalized) -> dict[str, Any]:
    """The result for programs."""
    report = legalized.report
    return {
        "model": model,
        "runs": not report.refusals,
        "macs": report.macs,
        "share_on_chip": report.share_on_chip,
        "nodes": [asdict(node) for node in report.nodes],
        "graph": [asdict(entry) for entry in report.graph],
        "rewrites": legalized.facts(),
        "max_abs_difference": legalized.max_abs_difference,
        "inputs_tried": legalized.inputs_tried,
        "note": legalized.note,
    }


def lines(legalized: Legalized) -> list[str]:
    """The result for people: what would be rewritten, then the table of what comes out."""
    lines = legalized.lines()
    if lines:
        lines.append(
            f"in all {len(legalized.rewrites)}; over {legalized.inputs_tried} random inputs the "
            "outputs of the first graph and the last differ by at most "
            f"{legalized.max_abs_difference:.2g}"
        )
    if legalized.note:
        lines.append(legalized.note)
    return [*lines, *legalized.report.lines()]


def write(legalized: Legalized, path: Path) -> None:
    """Write the rewritten graph to a new file.

    Raises:
        InputError: the file exists or can't be written.
    """
    import onnx

    if path.exists():
        raise InputError(f"{path} exists; choose another name")
    try:
        onnx.save(legalized.model, path)
    except OSError as error:
        raise InputError(f"can't write {path}: {error.strerror or error}") from error
