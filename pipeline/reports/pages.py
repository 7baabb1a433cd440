"""The benchmark report's faces for people: report.md, report.html, latency.svg."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

import jinja2
import matplotlib as mpl
import msgspec
import numpy as np
from matplotlib.figure import Figure

from pipeline.reports.report import BenchmarkReport, DeviceReadings, in_ms

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    from pipeline.facts import EstimateFigure


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
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("pipeline.reports", "templates"),
        autoescape=name.endswith(".html"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {
        "ms": in_ms,
        "unit": _unit,
        "ratio": lambda value: "null" if value is None else f"{value:.3f}",
        "percent": lambda value: "null" if value is None else f"{100 * value:.1f} %",
        "figure": _figure,
        "words": _words,
        "readings": _readings_text,
    }
    return environment.get_template(f"{name}.j2").render(
        report=report, measured=report.measurement, picture=picture
    )


def _unit(value: float | None, unit: str) -> str:
    return "null" if value is None else f"{value:.1f} {unit}"


def _readings_text(readings: DeviceReadings) -> str:
    if not readings.n or readings.cpu_share is None:
        return f"null: {readings.reason}"
    words = f"{readings.n} readings of {readings.source}, at most {_unit(readings.hottest_c, 'C')}"
    cost = f"asking took {100 * readings.cpu_share:.1f} % of one core of the host"
    return "; ".join(filter(None, (words, cost, readings.reason)))


def _figure(figure: EstimateFigure) -> str:
    """An estimated figure with its band, where it has one."""
    values = [figure.value, figure.low, figure.high]
    texts = [f"{v:,.0f}" if v is not None and v >= 100 else f"{v:.3g}" for v in values if v]
    text = f"{texts[0]} {figure.unit}"
    return f"{text} ({texts[1]} to {texts[2]})" if len(texts) == 3 else text


def _words(value: Any) -> str:  # noqa: ANN401 - a JSON tree
    """A tree of facts as one line for people."""
    if isinstance(value, dict):
        return ", ".join(f"{key} {_words(item)}" for key, item in value.items()) or "none"
    if isinstance(value, list | tuple):
        return "; ".join(map(_words, value)) or "none"
    return "null" if value is None else str(value)


def _latency_svg(samples: Path, report: BenchmarkReport) -> str:
    """The latency from tensor to logits: its histogram with percentiles, and its course in time.

    With the device's temperature, where it was read. Empty when SingleStream was not measured.
    """
    rows = [row for row in report.measurement.latency if row.scope == "tensor to logits"]
    if not rows:
        return ""
    (latency,) = rows
    with np.load(samples) as archive:
        raw = {**archive}
    ms = raw["all_ns"] / 1e6
    drawn_ms = ms[ms <= np.quantile(ms, 0.999)]
    with mpl.rc_context({"svg.hashsalt": "kdpipe", "font.size": 9}):
        figure = Figure(figsize=(9.6, 2.6), layout="constrained")
        histogram, course = figure.subplots(1, 2)
        histogram.hist(drawn_ms, bins=80, color="#4c78a8")
        for name, color in (("p50", "#222222"), ("p90", "#e45756"), ("p99", "#b279a2")):
            value = getattr(latency, name)
            if value is not None:
                histogram.axvline(value, color=color, linewidth=1.2, label=f"{name} {value:.3f} ms")
        histogram.set_xlabel(
            f"ms, {latency.scope} ({latency.measured_on}); slowest 0.1 % not drawn"
        )
        histogram.set_ylabel("queries")
        histogram.legend()
        _draw_course(course, raw)
        course.set_xlabel(f"seconds of the measurement ({latency.measured_on})")
        out = io.StringIO()
        figure.savefig(out, format="svg", metadata={"Date": None})
    text = out.getvalue()
    return text[text.index("<svg") :]


def _draw_course(axes: Any, raw: dict[str, NDArray[Any]]) -> None:  # noqa: ANN401 - matplotlib's
    """Percentiles over time, a line for each repeat; the temperature, on an axis of its own."""
    ends = raw["repeat_ends"]
    # At most 300 points, each of 50 queries in a row or more.
    queries_per_point = max(50, len(raw["all_ns"]) // 300)
    for number, all_ns in enumerate(np.split(raw["all_ns"], ends[:-1])):
        parts = np.array_split(all_ns / 1e6, max(1, len(all_ns) // queries_per_point))
        seconds = raw["repeat_starts_ns"][number] / 1e9 + np.cumsum([p.sum() for p in parts]) / 1e3
        for quantile, color in ((0.5, "#222222"), (0.9, "#e45756")):
            label = f"p{100 * quantile:.0f} of {len(parts[0])} queries" if number == 0 else None
            points = [np.quantile(part, quantile) for part in parts]
            axes.plot(seconds, points, color=color, linewidth=0.9, label=label)
    axes.set_ylim(bottom=0)
    axes.set_ylabel("ms")
    degrees = raw["heat_c"]
    if not np.isnan(degrees).all():
        warm = axes.twinx()
        warm.plot(raw["heat_ns"] / 1e9, degrees, color="#f58518", linewidth=0.9)
        axes.plot([], [], color="#f58518", label="device, C")
        warm.set_ylabel("device, C")
    axes.legend()
