"""Teachers, ensemble, student and baseline of one or more runs in one table."""

from __future__ import annotations

import csv
import json
import statistics
import time
from collections import Counter
from dataclasses import dataclass
from functools import reduce
from importlib.util import find_spec
from operator import add
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import numpy as np
import onnx
from matplotlib.figure import Figure

from metis.graph.ends import external_files, graph_inputs
from metis.graph.sessions import open_session
from metis.operators.report import count_macs
from pipeline.data.dataset import BLOCK, StudentData
from pipeline.facts import CalibrateFacts, DistillFacts
from pipeline.networks.inference import reference_network
from pipeline.reports.confusion import (
    Confusion,
    first_decisions,
    write_confusions,
    write_decisions,
)
from pipeline.run.errors import InputError, nearest
from pipeline.run.manifest import load_manifest
from pipeline.teachers.ensemble import combine
from pipeline.teachers.soft_targets import SoftTargets

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from numpy.typing import NDArray

    from pipeline.artifacts import Artifacts
    from pipeline.reports.confusion import Decision
    from pipeline.run.manifest import Manifest
    from pipeline.tasks.task import Table, Task
    from pipeline.teachers.ensemble import Member
    from preprocessing.contract import Contract

    #: Positions in the validation split, and a network's logits of them.
    LogitBlocks = Iterable[tuple[slice, NDArray[np.float32]]]


#: Columns whose values differ by chance between seeds: mean and standard deviation are shown.
SCORES = ("score", "macro_f1", "balanced_accuracy", "ece", "score_int8")

#: Columns in the order of the table, with their headings; the task has a name for the score.
COLUMNS = {
    "parameters": "parameters",
    "macs": "MACs",
    "score": "score",
    "macro_f1": "macro F1",
    "balanced_accuracy": "balanced accuracy",
    "ece": "ECE",
    "latency_ms": "latency, ms",
    "onnx_bytes": "ONNX bytes",
    "score_int8": "score int8",
    "int8_bytes": "int8 bytes",
}

_WARM_UP = 5

_QUERIES = 50


def compare_runs(names: Iterable[str], root: Path, folder: Path) -> str:
    """Measure every network of some runs, and write the tables; return the Markdown table.

    Args:
        names: of the runs.
        root: of the project; its folder runs/ has them.
        folder: to write into.

    Raises:
        InputError: there is no such run, it has no student, or the folder can't be written.
    """
    rows = []
    for name in names:
        if not (root / "runs" / name).is_dir():
            runs = sorted(p.parent.name for p in (root / "runs").glob("*/manifest.json"))
            raise InputError(f"there is no run {name!r}{nearest(name, runs)}")
        rows += read_run(root / "runs" / name, root)
    try:
        return write_comparison(summarize(rows), folder)
    except OSError as error:
        raise InputError(f"can't write {folder}: {error.strerror or error}") from error


@dataclass(frozen=True)
class NetworkRow:
    """One network of one run; a value that is not known is None."""

    group: str  # runs that differ in their seed alone have the same
    name: str
    run: str
    seed: int
    task: Task
    n: int  # validation patches
    values: dict[str, float | None]
    confusion: Confusion
    first: tuple[Decision, ...]  # of the split's first patches


def read_run(folder: Path, root: Path) -> list[NetworkRow]:
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
    paths = manifest.paths(folder)
    data = StudentData(paths)
    seed = manifest.stages["distill"].seed

    def measure(
        group: str, name: str, blocks: LogitBlocks, values: dict[str, float | None]
    ) -> NetworkRow:
        table, first = _count(data, blocks)
        confusion = Confusion(data.labels, table.confusion)
        figures = {**table.figures(), **values}
        return NetworkRow(
            group, name, folder.name, seed, data.task, len(data.val), figures, confusion, first
        )

    def run_network(path: Path) -> LogitBlocks:
        network = reference_network(path)
        return ((rows, network(tensors)) for rows, tensors in data.blocks(data.val))

    ingest_group = _group(manifest, "ingest")
    rows = [
        measure(ingest_group, *teacher)
        for teacher in _teachers(manifest, paths, data.contract, root)
    ]
    group = _group(manifest, "ingest", "distill")
    facts = manifest.facts("distill", DistillFacts)
    student = facts.student
    shape = (len(data.student_input.bands), *data.student_input.size_hw)
    values = {**_network(paths.student, shape), **_int8(manifest, paths)}
    rows.append(measure(group, f"{student}, distilled", run_network(paths.student), values))
    for baseline in facts.baselines:
        path = paths.training / f"{baseline}.onnx"
        words = baseline.replace("_", " ").replace("no teacher", "without teacher")
        rows.append(measure(group, f"{student}, {words}", run_network(path), _network(path, shape)))
    return rows


def _count(data: StudentData, blocks: LogitBlocks) -> tuple[Table, tuple[Decision, ...]]:
    """What the table says of a network, and its decisions on the first patches of validation."""
    table, val = data.task.table(data.classes), data.val
    first: tuple[Decision, ...] = ()
    for rows, logits in blocks:
        table.add(logits, val.labels[rows])
        first = first or first_decisions(logits, val.labels[rows], val.rows[rows], data.labels)
    return table, first


def _group(manifest: Manifest, *stages: str) -> str:
    """What runs with the same files and parameters in some stages share, whatever their seed."""
    records = [manifest.stages[name] for name in stages]
    files = [{name: s.sha256 for name, s in record.sources.items()} for record in records]
    return json.dumps([files, [record.params for record in records]], sort_keys=True)


def _teachers(
    manifest: Manifest, paths: Artifacts, contract: Contract, root: Path
) -> Iterator[tuple[str, LogitBlocks, dict[str, float | None]]]:
    """Each member, then their ensemble; costs of files that are no longer there are None."""
    teaching = SoftTargets(paths.teaching, paths.contract)
    ensemble, members = teaching.ensemble, teaching.val_members()
    files = {
        source.path.rpartition("/")[2]: root / source.path
        for source in manifest.stages["ingest"].sources.values()
    }
    costs = []
    for member, logits in zip(ensemble.members, members, strict=True):
        file = files.get(member.params.path or "")
        costs.append(_costs(file, member, contract) if file and file.exists() else {})
        yield f"teacher {member.name}", _blocks(logits), costs[-1]
    totals: dict[str, float | None] = {}
    for name in ("parameters", "macs", "latency_ms", "onnx_bytes"):
        values = [cost.get(name) for cost in costs]
        numbers = [value for value in values if value is not None]
        totals[name] = sum(numbers) if len(numbers) == len(values) else None
    weights = [m.params.weight for m in ensemble.members]
    temperatures = [m.temperature for m in ensemble.members]
    blocks = (
        (rows, combine(list(logits.swapaxes(0, 1)), weights, ensemble.rule, temperatures))
        for rows, logits in _blocks(members.swapaxes(0, 1))
    )
    yield "teacher ensemble", blocks, totals


def _blocks(logits: NDArray[np.float32]) -> LogitBlocks:
    """Memory-mapped logits (N, ...), some at a time."""
    for start in range(0, len(logits), BLOCK):
        rows = slice(start, start + BLOCK)
        yield rows, logits[rows]


def _costs(path: Path, member: Member, contract: Contract) -> dict[str, float | None]:
    """What a teacher takes; a torch teacher's graph is exported for it."""
    if member.params.timm is None:
        channels, sizes = len(member.params.bands), contract.size_hw
        wanted = (channels, *sizes) if contract.layout == "NCHW" else (*sizes, channels)
        return _network(path, wanted)
    if find_spec("timm") is None:
        return {}
    from pipeline.teachers.torch_teacher import write_onnx

    with TemporaryDirectory() as folder:
        graph = Path(folder) / "teacher.onnx"
        parameters = write_onnx(path, member.params, contract, graph)
        costs = _network(graph, (len(member.params.bands), *contract.size_hw))
    return {**costs, "parameters": float(parameters), "onnx_bytes": None}


def _network(path: Path, shape: tuple[int, ...]) -> dict[str, float | None]:
    """Parameters, MACs of one patch, size with weights outside, median latency of one call.

    Args:
        path: an ONNX classifier.
        shape: of one patch, where the graph leaves it open; its batch is 1 where that is open.
    """
    model = onnx.load(path, load_external_data=False)
    files = [path, *(path.parent / name for name in external_files(model))]
    size = sum(file.stat().st_size for file in files)
    model = onnx.load(path)
    source = graph_inputs(model)[0].type.tensor_type
    dims = [dim.dim_value for dim in source.shape.dim]
    fixed = tuple(dim or default for dim, default in zip(dims, (1, *shape), strict=True))
    for dim, value in zip(source.shape.dim, fixed, strict=True):
        dim.dim_value = value
    for output in model.graph.output:
        output.type.tensor_type.ClearField("shape")
    del model.graph.value_info[:]
    weights = (np.prod(i.dims) for i in model.graph.initializer if i.data_type in _FLOATS)
    return {
        "parameters": float(sum(weights)),
        "onnx_bytes": float(size),
        "macs": count_macs(model) / fixed[0],
        "latency_ms": _latency_ms(path, fixed, source.elem_type),
    }


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


def _int8(manifest: Manifest, paths: Artifacts) -> dict[str, float | None]:
    """What calibrate made of this student, if it did."""
    if "quantized_model" not in paths or not paths.quantized_model.exists():
        return {}
    if manifest.stages["calibrate"].inputs.get("student") != manifest.artifacts["student"].sha256:
        return {}
    files = [p for p in paths.quantized_model.iterdir() if p.suffix == ".onnx"]
    return {
        "score_int8": manifest.facts("calibrate", CalibrateFacts).score_int8,
        "int8_bytes": float(sum(p.stat().st_size for p in files)) if files else None,
    }


@dataclass(frozen=True)
class Summary:
    """The same network of runs that differ in their seed alone."""

    task: Task
    name: str  # with those of the runs where others have a network of this name
    runs: int  # of different seeds
    of: tuple[str, ...]  # names of the runs
    n: int
    mean: dict[str, float | None]
    sd: dict[str, float | None]  # None for a single run
    confusion: Confusion  # of all runs together
    first: tuple[tuple[int, tuple[Decision, ...]], ...]  # per run: its seed, its first decisions


def summarize(rows: Iterable[NetworkRow]) -> list[Summary]:
    """Rows of several runs; those of one group and name become mean and standard deviation."""
    grouped: dict[tuple[str, str], list[NetworkRow]] = {}
    for row in rows:
        grouped.setdefault((row.group, row.name), []).append(row)
    times = Counter(name for _, name in grouped)
    summaries = []
    for (_, name), members in grouped.items():
        runs = tuple(row.run for row in members)
        distinct = list({row.seed: row for row in members}.values())  # one seed says the same twice
        label = name if times[name] == 1 else f"{name} [{', '.join(runs)}]"
        mean: dict[str, float | None] = {}
        sd: dict[str, float | None] = {}
        for column in COLUMNS:
            values = [row.values.get(column) for row in distinct]
            numbers = [value for value in values if value is not None]
            mean[column] = statistics.mean(numbers) if len(numbers) == len(values) else None
            sd[column] = statistics.stdev(numbers) if len(numbers) == len(values) > 1 else None
        confusion = reduce(add, (row.confusion for row in distinct))
        first = tuple((row.seed, row.first) for row in distinct)
        summaries.append(
            Summary(
                task=distinct[0].task,
                name=label,
                runs=len(distinct),
                of=runs,
                n=distinct[0].n,
                mean=mean,
                sd=sd,
                confusion=confusion,
                first=first,
            )
        )
    return summaries


def write_comparison(summaries: Sequence[Summary], folder: Path) -> str:
    """Write tables as CSV and Markdown, and pictures; return the Markdown table."""
    folder.mkdir(parents=True, exist_ok=True)
    task = summaries[0].task
    with (folder / "comparison.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(
            [
                "network",
                "runs",
                "n",
                "measured_on",
                *(_column(name, task) for name in COLUMNS),
                *(f"{_column(name, task)}_sd" for name in SCORES),
            ]
        )
        for row in summaries:
            values = [row.mean[name] for name in COLUMNS] + [row.sd[name] for name in SCORES]
            writer.writerow([row.name, row.runs, row.n, "host-float", *values])
    text = _markdown(summaries)
    (folder / "comparison.md").write_text(text)
    _picture(summaries, folder / "comparison.png")
    write_confusions([(row.name, row.confusion) for row in summaries], folder)
    write_decisions(
        [(row.name, *decisions) for row in summaries for decisions in row.first], folder
    )
    return text


def _markdown(summaries: Sequence[Summary]) -> str:
    title = summaries[0].task.title
    headings = [heading.replace("score", title) for heading in COLUMNS.values()]
    lines = [
        "| network | runs | " + " | ".join(headings) + " |",
        "|---|" + "---|" * (len(COLUMNS) + 1),
    ]
    for row in summaries:
        cells = [_cell(name, row.mean[name], row.sd[name]) for name in COLUMNS]
        lines.append(f"| {row.name} | {row.runs} | " + " | ".join(cells) + " |")
    counts = ", ".join(sorted({str(row.n) for row in summaries}))
    lines += [
        "",
        f"Scores on {counts} validation patches, mean ± standard deviation over the seeds; latency "
        "of one call in onnxruntime on this host (host-float), not on a device: a batch of 1, or "
        "the batch that a teacher's graph has fixed.",
        *_larger_students(summaries),
    ]
    return "\n".join(lines) + "\n"


def _larger_students(summaries: Sequence[Summary]) -> Iterator[str]:
    """Say so where a student costs more than what it was distilled from."""
    ensembles = [row for row in summaries if row.name.startswith("teacher ensemble")]
    for row in summaries:
        ensemble = next((e for e in ensembles if set(e.of) & set(row.of)), None)
        student_macs, ensemble_macs = row.mean["macs"], ensemble.mean["macs"] if ensemble else None
        if (
            student_macs
            and ensemble_macs
            and not row.name.startswith("teacher")
            and student_macs > ensemble_macs
        ):
            ratio = student_macs / ensemble_macs
            yield f"{row.name} takes {ratio:.1f} times the MACs of the teacher ensemble."


def _column(name: str, task: Task) -> str:
    """What the CSV file calls a column: the score has its own name."""
    return name.replace("score", task.score)


def _cell(column: str, mean: float | None, sd: float | None) -> str:
    if mean is None:
        return "-"
    if column in SCORES:
        return f"{mean:.4f}" + (f" ± {sd:.4f}" if sd is not None else "")
    return f"{mean:.3f}" if column == "latency_ms" else f"{mean:,.0f}"


def _picture(summaries: Sequence[Summary], path: Path) -> None:
    height = 0.6 + 0.42 * len(summaries)
    figure = Figure(figsize=(8, height), layout="constrained")
    axes = figure.subplots()
    places = range(len(summaries))
    colors = ["#b0b7bf" if row.name.startswith("teacher") else "#4c78a8" for row in summaries]
    scores = [100 * (row.mean["score"] or 0) for row in summaries]
    errors = [100 * (row.sd["score"] or 0) for row in summaries]
    bars = axes.barh(list(places), scores, xerr=errors, color=colors)
    axes.bar_label(bars, fmt="%.1f", padding=4)
    axes.set_yticks(list(places), [row.name for row in summaries])
    axes.invert_yaxis()
    axes.set_xlim(0, 108)
    axes.set_xlabel(f"{summaries[0].task.title} on validation, % (host-float)")
    figure.savefig(path, dpi=150)
