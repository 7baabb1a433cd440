"""Teachers, ensemble, student and baseline of one or more runs in one table."""

from __future__ import annotations

import csv
import json
import statistics
import time
from dataclasses import dataclass
from functools import reduce
from operator import add
from typing import TYPE_CHECKING

import numpy as np
import onnx

from metis.operators import count_macs
from pipeline.confusion import (
    confusion,
    first_decisions,
    write_confusions,
    write_decisions,
)
from pipeline.ensemble import combine
from pipeline.manifest import load_manifest
from pipeline.metrics import balanced_accuracy, expected_calibration_error, macro_f1, top1
from pipeline.reference import answers, open_session, reference_network
from pipeline.splits import DatasetSplit
from pipeline.stage import InputError
from pipeline.teaching import Teaching
from preprocessing.contract import StudentInput, load_contract

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from pipeline.confusion import Confusion, Decision
    from pipeline.manifest import Manifest

#: Columns whose values differ by chance between seeds: mean and standard deviation are shown.
SCORES = ("top1", "macro_f1", "balanced_accuracy", "ece", "top1_int8")

#: Columns in the order of the table, with their headings.
COLUMNS = {
    "parameters": "parameters",
    "macs": "MACs",
    "top1": "top-1",
    "macro_f1": "macro F1",
    "balanced_accuracy": "balanced accuracy",
    "ece": "ECE",
    "latency_ms": "latency, ms",
    "onnx_bytes": "ONNX bytes",
    "top1_int8": "top-1 int8",
    "int8_bytes": "int8 bytes",
}

_WARM_UP = 5
_QUERIES = 50


@dataclass(frozen=True)
class Row:
    """One network of one run; a value that is not known is None."""

    group: str  # runs that differ in their seed alone have the same
    name: str
    seed: int
    n: int  # validation patches
    values: dict[str, float | None]
    confusion: Confusion
    first: tuple[Decision, ...]  # of the split's first patches


def read_run(folder: Path, root: Path) -> list[Row]:
    """Every network of a run, measured on its validation split by onnxruntime on this host.

    Args:
        folder: of the run.
        root: of the project, which the manifest's paths of sources start from.

    Raises:
        InputError: the run has no student yet.
    """
    manifest = load_manifest(folder)
    if manifest is None or "student" not in manifest.artifacts:
        raise InputError(f"run {folder.name} has no student; `kdpipe run --to distill` makes one")
    paths = {name: folder / artifact.path for name, artifact in manifest.artifacts.items()}
    val = DatasetSplit.load(paths["dataset"] / "val")
    given = StudentInput.load(paths["student_input"])
    group = _group(manifest)
    seed = manifest.stages["distill"].seed
    labels = np.asarray(val.labels)
    classes = load_contract(paths["contract"]).labels

    def row(name: str, logits: NDArray[np.float32], values: dict[str, float | None]) -> Row:
        scores = {**_scores(logits, labels), **values}
        counts = confusion(logits, labels, classes)
        first = first_decisions(logits, labels, val.rows, classes)
        return Row(group, name, seed, len(labels), scores, counts, first)

    rows = [row(name, logits, values) for name, logits, values in _teachers(manifest, paths, root)]
    facts = manifest.stages["distill"].facts
    student = facts["student"]
    int8 = _int8(manifest, paths)
    shape = (1, len(given.bands), *given.size_hw)
    (logits,) = answers(val.images, given, reference_network(paths["student"]))
    rows.append(row(f"{student}, distilled", logits, {**_network(paths["student"], shape), **int8}))
    for baseline in facts["baselines"]:
        path = paths["training"] / f"{baseline}.onnx"
        words = baseline.replace("_", " ").replace("no teacher", "without teacher")
        (logits,) = answers(val.images, given, reference_network(path))
        rows.append(row(f"{student}, {words}", logits, _network(path, shape)))
    return rows


def _group(manifest: Manifest) -> str:
    """What all runs with the same parameters have in common, whatever their seed."""
    keyed = {name: manifest.stages[name].params for name in ("ingest", "distill")}
    return json.dumps(keyed, sort_keys=True)


def _scores(logits: NDArray[np.float32], labels: NDArray[np.int64]) -> dict[str, float | None]:
    return {
        "top1": top1(logits, labels),
        "macro_f1": macro_f1(logits, labels),
        "balanced_accuracy": balanced_accuracy(logits, labels),
        "ece": expected_calibration_error(logits, labels),
    }


def _teachers(
    manifest: Manifest, paths: dict[str, Path], root: Path
) -> Iterator[tuple[str, NDArray[np.float32], dict[str, float | None]]]:
    """Each member, then their ensemble; costs of torch teachers and of files that went are None."""
    teaching = Teaching(paths["teaching"], paths["contract"])
    ensemble, members = teaching.ensemble, teaching.val_members()
    files = {
        source.path.rpartition("/")[2]: root / source.path
        for source in manifest.stages["ingest"].sources.values()
    }
    costs = []
    for member, logits in zip(ensemble.members, members, strict=True):
        file = files.get(member.params.path or "")
        known = file is not None and file.suffix == ".onnx" and file.exists()
        costs.append(_network(file, None) if known and file else {})
        yield f"teacher {member.name}", logits, costs[-1]
    together: dict[str, float | None] = {}
    for name in ("parameters", "macs", "latency_ms", "onnx_bytes"):
        values = [cost.get(name) for cost in costs]
        known_values = [value for value in values if value is not None]
        together[name] = sum(known_values) if len(known_values) == len(values) else None
    logits = combine(
        list(members),
        [m.params.weight for m in ensemble.members],
        ensemble.rule,
        [m.temperature for m in ensemble.members],
    )
    yield "teacher ensemble", logits, together


def _network(path: Path, shape: tuple[int, ...] | None) -> dict[str, float | None]:
    """Parameters, MACs, size and median latency of batch 1."""
    model = onnx.load(path)
    source = model.graph.input[0].type.tensor_type
    dims = [d.dim_value for d in source.shape.dim]
    fixed = shape or (1, *dims[1:])
    found: dict[str, float | None] = {
        "parameters": float(
            sum(np.prod(i.dims) for i in model.graph.initializer if i.data_type in _FLOATS)
        ),
        "onnx_bytes": float(path.stat().st_size),
    }
    if not all(fixed) or (dims[0] and dims[0] != 1):
        return found
    for dim, value in zip(source.shape.dim, fixed, strict=True):
        dim.dim_value = value
    for output in model.graph.output:
        output.type.tensor_type.ClearField("shape")
    del model.graph.value_info[:]
    found["macs"] = float(count_macs(model))
    found["latency_ms"] = _latency_ms(path, fixed, source.elem_type)
    return found


_FLOATS = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.DOUBLE)


def _latency_ms(path: Path, shape: tuple[int, ...], elem_type: int) -> float:
    session = open_session(path)
    tensor = np.zeros(shape, onnx.helper.tensor_dtype_to_np_dtype(elem_type))
    feed = {session.get_inputs()[0].name: tensor}
    for _ in range(_WARM_UP):
        session.run(None, feed)
    seconds = []
    for _ in range(_QUERIES):
        start = time.perf_counter()
        session.run(None, feed)
        seconds.append(time.perf_counter() - start)
    return 1000 * statistics.median(seconds)


def _int8(manifest: Manifest, paths: dict[str, Path]) -> dict[str, float | None]:
    """What calibrate made of this student, if it did."""
    if "quantized_model" not in paths or not paths["quantized_model"].exists():
        return {}
    if manifest.stages["calibrate"].inputs.get("student") != manifest.artifacts["student"].sha256:
        return {}
    files = [p for p in paths["quantized_model"].iterdir() if p.suffix == ".onnx"]
    return {
        "top1_int8": manifest.stages["calibrate"].facts["top1_val_int8"],
        "int8_bytes": float(sum(p.stat().st_size for p in files)) if files else None,
    }


@dataclass(frozen=True)
class Summary:
    """The same network of runs that differ in their seed alone."""

    name: str
    runs: int
    n: int
    mean: dict[str, float | None]
    sd: dict[str, float | None]  # None for a single run
    confusion: Confusion  # of all runs together
    first: tuple[tuple[int, tuple[Decision, ...]], ...]  # per run: its seed, its first decisions


def summarize(rows: Iterable[Row]) -> list[Summary]:
    """Rows of several runs; those of one group and name become mean and standard deviation."""
    grouped: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        grouped.setdefault((row.group, row.name), []).append(row)
    summaries = []
    for (_, name), same in grouped.items():
        mean: dict[str, float | None] = {}
        sd: dict[str, float | None] = {}
        for column in COLUMNS:
            values = [row.values.get(column) for row in same]
            known = [value for value in values if value is not None]
            mean[column] = statistics.mean(known) if len(known) == len(values) else None
            sd[column] = statistics.stdev(known) if len(known) == len(values) > 1 else None
        together = reduce(add, (row.confusion for row in same))
        first = tuple((row.seed, row.first) for row in same)
        summaries.append(Summary(name, len(same), same[0].n, mean, sd, together, first))
    return summaries


def write_comparison(summaries: Sequence[Summary], folder: Path) -> str:
    """Write tables as CSV and Markdown, and pictures; return the Markdown table."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "comparison.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(
            ["network", "runs", "n", "measured_on", *COLUMNS, *(f"{name}_sd" for name in SCORES)]
        )
        for row in summaries:
            values = [row.mean[name] for name in COLUMNS] + [row.sd[name] for name in SCORES]
            writer.writerow([row.name, row.runs, row.n, "host-float", *values])
    text = _markdown(summaries)
    (folder / "comparison.md").write_text(text)
    _picture(summaries, folder / "comparison.png")
    write_confusions([(row.name, row.confusion) for row in summaries], folder)
    write_decisions([(row.name, *some) for row in summaries for some in row.first], folder)
    return text


def _markdown(summaries: Sequence[Summary]) -> str:
    lines = [
        "| network | runs | " + " | ".join(COLUMNS.values()) + " |",
        "|---|" + "---|" * (len(COLUMNS) + 1),
    ]
    for row in summaries:
        cells = [_cell(name, row.mean[name], row.sd[name]) for name in COLUMNS]
        lines.append(f"| {row.name} | {row.runs} | " + " | ".join(cells) + " |")
    counts = ", ".join(sorted({str(row.n) for row in summaries}))
    lines += [
        "",
        f"Scores on {counts} validation patches, mean ± standard deviation over the seeds; latency "
        "of batch 1 in onnxruntime on this host (host-float), not on a device.",
        *_larger_students(summaries),
    ]
    return "\n".join(lines) + "\n"


def _larger_students(summaries: Sequence[Summary]) -> Iterator[str]:
    """Say so where a student costs more than what it was distilled from."""
    ensemble = next((row for row in summaries if row.name == "teacher ensemble"), None)
    for row in summaries:
        own, other = row.mean["macs"], ensemble.mean["macs"] if ensemble else None
        if own and other and not row.name.startswith("teacher") and own > other:
            yield f"{row.name} takes {own / other:.1f} times the MACs of the teacher ensemble."


def _cell(column: str, mean: float | None, sd: float | None) -> str:
    if mean is None:
        return "-"
    if column in SCORES:
        return f"{mean:.4f}" + (f" ± {sd:.4f}" if sd is not None else "")
    return f"{mean:.3f}" if column == "latency_ms" else f"{mean:,.0f}"


def _picture(summaries: Sequence[Summary], path: Path) -> None:
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot as plt

    height = 0.6 + 0.42 * len(summaries)
    figure, axes = plt.subplots(figsize=(8, height), layout="constrained")
    places = range(len(summaries))
    colors = ["#b0b7bf" if row.name.startswith("teacher") else "#4c78a8" for row in summaries]
    scores = [100 * (row.mean["top1"] or 0) for row in summaries]
    errors = [100 * (row.sd["top1"] or 0) for row in summaries]
    bars = axes.barh(list(places), scores, xerr=errors, color=colors)
    axes.bar_label(bars, fmt="%.1f", padding=4)
    axes.set_yticks(list(places), [row.name for row in summaries])
    axes.invert_yaxis()
    axes.set_xlim(0, 108)
    axes.set_xlabel("top-1 on validation, % (host-float)")
    figure.savefig(path, dpi=150)
    plt.close(figure)
