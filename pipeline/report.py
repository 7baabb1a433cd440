"""The benchmark report: its schema, and its faces for people. report.json is the only source."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import msgspec

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

SCHEMA = 1

MeasuredOn = Literal["device", "host-emulation", "host-float", "estimate", "published"]


class ReportError(ValueError):
    """A report that does not say what it must, or says what it can't know."""


class Figure(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A number, with everything that is needed to know what it is."""

    value: float
    unit: str
    measured_on: MeasuredOn
    n: int  # samples behind it
    scope: str  # what was timed, or on what it was counted


class Latency(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Statistics of one scope; a percentile is null where the samples are too few for it."""

    scope: str
    unit: Literal["ms"]
    measured_on: MeasuredOn
    n: int
    min: float
    mean: float
    std: float
    p50: float | None
    p90: float | None
    p95: float | None
    p99: float | None
    max: float


class Check(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Something kdbench proved before it measured."""

    name: str
    passed: bool
    detail: str


class Verdict(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Whether the timings may be used."""

    word: Literal["VALID", "INVALID", "SMOKE"]
    reasons: list[str]


class Measurement(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The document that kdbench prints."""

    schema: int
    contract: str
    bundle: str
    runtime: str
    runtime_version: str
    measured_on: Literal["device", "host-emulation"]
    device: dict[str, Any] | None
    aipu_cores: int
    batch: int
    started: str
    host: dict[str, Any]
    checks: list[Check]
    load_ms: Figure
    latency: list[Latency]
    warm_up_queries: int
    throughput: Figure
    top1_test: Figure
    verdict: Verdict


class Row(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One line of the accuracy table."""

    name: str
    figure: Figure


class LegRow(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One line of the parity table."""

    source: str
    target: str
    n: int
    found: str
    limit: str
    passed: bool | None  # null: does not apply


class BenchmarkReport(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a run amounts to."""

    schema: int
    run: str
    contract: str
    student: dict[str, Any]
    accuracy: list[Row]
    int8: dict[str, Any]
    parity: list[LegRow]
    device: dict[str, Any]  # the pipeline YAML, or why there is none; the device pipe's constants
    data: dict[str, Any]  # splits, 8-bit encoding, and whether the data are synthetic
    measurement: Measurement


def parse_measurement(text: str) -> Measurement:
    """Read what kdbench printed last.

    Raises:
        ReportError: not such a document, or figures that its runtime can't have measured.
    """
    try:
        measurement = msgspec.json.decode(text, type=Measurement)
    except msgspec.DecodeError as error:
        raise ReportError(f"kdbench's last line is not its report: {error}") from error
    _check_origin(measurement)
    return measurement


def parse_report(data: bytes) -> BenchmarkReport:
    """Read report.json.

    Raises:
        ReportError: a field is missing, unknown or of another kind, or an emulation claims to be a
            device.
    """
    try:
        report = msgspec.json.decode(data, type=BenchmarkReport)
    except msgspec.DecodeError as error:
        raise ReportError(f"not a benchmark report: {error}") from error
    _check_origin(report.measurement)
    if report.contract != report.measurement.contract:
        raise ReportError(
            f"the report's contract is {report.contract}, the measurement's "
            f"{report.measurement.contract}"
        )
    return report


def _check_origin(measurement: Measurement) -> None:
    """An emulation has no device, and none of its figures came from one."""
    emulated = measurement.runtime == "onnxruntime"
    truth = "host-emulation" if emulated else "device"
    if emulated and measurement.device is not None:
        raise ReportError("runtime onnxruntime has no device, but the report describes one")
    for name, measured_on in _origins(measurement):
        if measured_on != truth:
            raise ReportError(
                f"{name} says measured_on {measured_on}, but runtime {measurement.runtime} "
                f"measures {truth}"
            )


def _origins(measurement: Measurement) -> Iterator[tuple[str, str]]:
    yield "the report", measurement.measured_on
    yield "load_ms", measurement.load_ms.measured_on
    yield "throughput", measurement.throughput.measured_on
    yield "top1_test", measurement.top1_test.measured_on
    for latency in measurement.latency:
        yield f"latency ({latency.scope})", latency.measured_on


def summary_lines(report: BenchmarkReport) -> list[str]:
    """The report in a few lines for a terminal."""
    measured = report.measurement
    lines = [
        f"{row.name:<34} top-1 {row.figure.value:.4f}  n {row.figure.n}  "
        f"[{row.figure.scope}; {row.figure.measured_on}]"
        for row in report.accuracy
    ]
    for latency in measured.latency:
        lines.append(
            f"{'latency, ' + latency.scope:<34} p50 {_ms(latency.p50)}  p90 {_ms(latency.p90)}  "
            f"p99 {_ms(latency.p99)}  n {latency.n}  [{latency.measured_on}]"
        )
    rate = measured.throughput
    lines.append(
        f"{'throughput':<34} {rate.value:.1f} {rate.unit}  [{rate.scope}; {rate.measured_on}]"
    )
    judged = [leg.passed for leg in report.parity if leg.passed is not None]
    lines.append(f"{'parity':<34} {sum(judged)} of {len(judged)} legs passed")
    lines.append(f"{'verdict':<34} {measured.verdict.word}: {'; '.join(measured.verdict.reasons)}")
    return lines


def write_report(report: BenchmarkReport, samples: Path, folder: Path) -> None:
    """Write report.json, report.md, report.html and latency.svg.

    Args:
        report: the document.
        samples: the .npz with every latency in ns.
        folder: exists.
    """
    (folder / "report.json").write_bytes(
        msgspec.json.format(msgspec.json.encode(report), indent=1) + b"\n"
    )
    picture = _latency_svg(samples, report)
    (folder / "latency.svg").write_text(picture)
    for name in ("report.md", "report.html"):
        (folder / name).write_text(_render(name, report, picture))


def _render(name: str, report: BenchmarkReport, picture: str) -> str:
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("pipeline", "templates"),
        autoescape=name.endswith(".html"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["ms"] = _ms
    return environment.get_template(f"{name}.j2").render(
        report=report, measured=report.measurement, picture=picture
    )


def _ms(value: float | None) -> str:
    return "null" if value is None else f"{value:.3f} ms"


def _latency_svg(samples: Path, report: BenchmarkReport) -> str:
    """A histogram of the latency from tensor to logits, with its percentiles."""
    import io

    import matplotlib as mpl
    import numpy as np

    mpl.use("svg")
    from matplotlib import pyplot as plt

    with np.load(samples) as raw:
        ms = raw["all_ns"] / 1e6
    latency = next(row for row in report.measurement.latency if row.scope == "tensor to logits")
    shown = ms[ms <= np.quantile(ms, 0.999)]
    with plt.rc_context({"svg.hashsalt": "kdpipe"}):
        figure, axes = plt.subplots(figsize=(7, 2.6), layout="constrained")
        axes.hist(shown, bins=80, color="#4c78a8")
        for name, color in (("p50", "#222222"), ("p90", "#e45756"), ("p99", "#b279a2")):
            value = getattr(latency, name)
            if value is not None:
                axes.axvline(value, color=color, linewidth=1.2, label=f"{name} {value:.3f} ms")
        axes.set_xlabel(f"ms, {latency.scope} ({latency.measured_on}); slowest 0.1 % not drawn")
        axes.set_ylabel("queries")
        axes.legend()
        out = io.StringIO()
        figure.savefig(out, format="svg", metadata={"Date": None})
        plt.close(figure)
    text = out.getvalue()
    return text[text.index("<svg") :]
