"""Two benchmark reports side by side, or the list of reasons why they can't be compared."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.reports.report import BenchmarkReport, ReportError, parse_report
from pipeline.run.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from numpy.typing import NDArray


#: Resamples of the bootstrap.
RESAMPLES = 500

#: Runs of queries in a row that are resampled as one; neighbours in time are not independent.
BLOCKS = 50

#: Degrees that two starts may be apart before it is worth a word.
START_DEGREES = 5.0


class IncomparableError(RuntimeError):
    """Two reports that measured different things; the message lists every difference."""

    status = 4


@dataclass(frozen=True)
class LoadedReport:
    """A report, and the raw times beside it."""

    name: str
    report: BenchmarkReport
    data: bytes  # of report.json
    samples: dict[str, NDArray[Any]]


@dataclass(frozen=True)
class Ratio:
    """Second against first, for one figure."""

    what: str
    unit: str
    measured_on: str
    first: float
    second: float
    low: float  # ends of the 95 % interval of second / first
    high: float
    spread: float | None  # of repeats of the same, relative; None: not measured

    @property
    def ratio(self) -> float:
        """Second / first."""
        return self.second / self.first

    @property
    def words(self) -> str:
        """What the interval allows to say, and the control: repeats of one against each other."""
        if self.low <= 1.0 <= self.high or abs(self.ratio - 1) <= (self.spread or 0.0):
            return "no difference shown"
        return f"the second is {'higher' if self.low > 1.0 else 'lower'}"


def load_report(path: Path) -> LoadedReport:
    """A report.json, with samples.npz beside it.

    Raises:
        InputError: one of them is missing or not what it should be.
    """
    try:
        data = path.read_bytes()
        report = parse_report(data)
        with np.load(path.with_name("samples.npz")) as archive:
            samples = {**archive}
    except (OSError, ReportError, ValueError) as error:
        raise InputError(f"{path} can't be compared: {error}") from error
    return LoadedReport(str(path), report, data, samples)


def compare_reports(first: LoadedReport, second: LoadedReport) -> list[Ratio]:
    """Latencies and throughput of the second report against the first.

    Raises:
        IncomparableError: they measured different things, or one may not be compared at all.
    """
    different = list(differences(first, second))
    if different:
        raise IncomparableError(
            f"{first.name} and {second.name} can't be compared:\n  " + "\n  ".join(different)
        )
    return list(_ratios(first, second))


def differences(first: LoadedReport, second: LoadedReport) -> Iterator[str]:
    """Every reason not to compare, in words with both values."""
    base, candidate = first.report.measurement, second.report.measurement
    fields = {
        "measured_on": (base.measured_on, candidate.measured_on),
        "scenario": (base.rules.scenario, candidate.rules.scenario),
        "scopes": (_scopes(first), _scopes(second)),
        "contract": (base.contract, candidate.contract),
        "dataset (test split)": (base.test_set, candidate.test_set),
        "AIPU cores": (base.aipu_cores, candidate.aipu_cores),
        "batch": (base.batch, candidate.batch),
        "instances": (base.instances, candidate.instances),
    }
    for name, (old, new) in fields.items():
        if old != new:
            yield f"{name}: {old} against {new}"
    # A report with itself is the control, whatever its verdict.
    for measured in (first, second) if first.data != second.data else ():
        verdict = measured.report.measurement.verdict
        if verdict.word != "VALID":
            yield f"verdict of {measured.name}: {verdict.word} ({'; '.join(verdict.reasons)})"


def _scopes(loaded: LoadedReport) -> str:
    measurement = loaded.report.measurement
    scopes = [row.scope for row in measurement.latency] + [
        row.scope for row in measurement.throughput_modes
    ]
    return ", ".join(scopes)


def remarks(first: LoadedReport, second: LoadedReport) -> Iterator[str]:
    """What does not forbid a comparison, but may explain it."""
    base, candidate = first.report.measurement, second.report.measurement
    devices = [m.device or {} for m in (base, candidate)]
    fields = {
        "model": (base.model, candidate.model),
        "compiled by": (base.compiled_by, candidate.compiled_by),
        "runtime": (base.runtime_version, candidate.runtime_version),
        "driver": (base.driver, candidate.driver),
        "firmware": tuple(d.get("firmware_version") for d in devices),
        "board controller": tuple(d.get("board_controller_firmware_version") for d in devices),
        "device": tuple(d.get("name") for d in devices),
        "clocks": (base.heat_before.clocks, candidate.heat_before.clocks),
        "PCIe width": (base.link.width, candidate.link.width),
        "PCIe speed": (base.link.speed, candidate.link.speed),
        "processor": (base.host.get("cpu"), candidate.host.get("cpu")),
        "governor": (base.host.get("governor"), candidate.host.get("governor")),
    }
    for name, (old, new) in fields.items():
        if old != new:
            yield f"{name}: {old} against {new}"
    starts = [m.heat_before.temperature_c for m in (base, candidate)]
    if None not in starts and abs(starts[0] - starts[1]) > START_DEGREES:  # type: ignore[operator]
        yield f"start temperature: {starts[0]} C against {starts[1]} C"
    for name, measured in dict(((first.name, base), (second.name, candidate))).items():
        if measured.stability.spread_p90 is None and measured.stability.spread_throughput is None:
            yield (
                f"{name} has fewer than 3 repeats, so what a restart changes is in no interval; "
                "measure with benchmark.repeats=3"
            )


def _spread(name: str, first: LoadedReport, second: LoadedReport) -> float | None:
    """How far apart repeats of the same lie, in the report where it is further."""
    spreads = [getattr(m.report.measurement.stability, name) for m in (first, second)]
    return max((value for value in spreads if value is not None), default=None)


def _ratios(first: LoadedReport, second: LoadedReport) -> Iterator[Ratio]:
    base, candidate = first.report.measurement, second.report.measurement
    series = [_series(m.samples) for m in (first, second)]
    for base_row, new_row in zip(base.latency, candidate.latency, strict=True):
        for name, quantile in (("p50", 0.5), ("p90", 0.9)):
            values = getattr(base_row, name), getattr(new_row, name)
            if None in values:
                continue
            draws = [
                _resample(by_scope[base_row.scope], partial(_quantile, quantile=quantile), seed)
                for seed, by_scope in enumerate(series)
            ]
            spread = _spread("spread_p90", first, second)
            yield _ratio(
                f"{base_row.scope}, {name}", "ms", base_row.measured_on, values, draws, spread
            )
    for base_rate, new_rate in zip(base.throughput_modes, candidate.throughput_modes, strict=True):
        draws = [
            _resample(_gaps(m.samples, base_rate.scope), lambda part: 1 / float(part.mean()), seed)
            for seed, m in enumerate((first, second))
        ]
        values = base_rate.value, new_rate.value
        spread = _spread("spread_throughput", first, second)
        yield _ratio(base_rate.scope, base_rate.unit, base_rate.measured_on, values, draws, spread)


def _quantile(values: NDArray[np.float64], quantile: float) -> float:
    return float(np.quantile(values, quantile))


def _ratio(
    label: str,
    unit: str,
    measured_on: str,
    values: tuple[float, float],
    draws: list[NDArray[np.float64]],
    spread: float | None,
) -> Ratio:
    low, high = np.quantile(draws[1] / draws[0], (0.025, 0.975))
    return Ratio(label, unit, measured_on, *values, float(low), float(high), spread)


def _series(samples: dict[str, NDArray[Any]]) -> dict[str, NDArray[np.float64]]:
    """Latencies in time's order, by scope."""
    if "all_ns" not in samples:
        return {}
    runtime_call, tensor_to_logits = (
        samples["run_ns"].astype(float),
        samples["all_ns"].astype(float),
    )
    scopes = ("runtime call", "tensor to logits", "around the runtime call")
    return dict(
        zip(scopes, (runtime_call, tensor_to_logits, tensor_to_logits - runtime_call), strict=True)
    )


def _gaps(samples: dict[str, NDArray[Any]], scope: str) -> NDArray[np.float64]:
    """Times between the answers of Offline, all repeats one after the other."""
    way = "double" if "double" in scope else "single"
    names = sorted(name for name in samples if name.startswith(f"offline_{way}_"))
    return np.concatenate([np.diff(samples[name], prepend=0) for name in names]).astype(float)


def _resample(
    values: NDArray[np.float64],
    statistic: Callable[[NDArray[np.float64]], float],
    seed: int,
) -> NDArray[np.float64]:
    """A statistic of resampled series, (RESAMPLES,); whole blocks are drawn.

    Source:
        Kunsch 1989, the block bootstrap for stationary observations.
    """
    random = np.random.default_rng(seed)
    length = max(1, len(values) // BLOCKS)
    # A few hundred of a block's values stand for it; a million would change no third digit.
    blocks = values[: len(values) // length * length].reshape(-1, length)
    blocks = blocks[:, :: max(1, length // 400)]
    results = np.empty(RESAMPLES)
    for draw in range(RESAMPLES):
        resample = blocks[random.integers(0, len(blocks), len(blocks))]
        results[draw] = statistic(resample.reshape(-1))
    return results


def compare_files(first: Path, second: Path) -> Iterator[str]:
    """Compare two files report.json; lines for a terminal.

    Raises:
        InputError: one of them, or samples.npz beside it, is missing or not what it should be.
        IncomparableError: they measured different things, or one may not be compared at all.
    """
    base, candidate = load_report(first), load_report(second)
    yield from comparison_lines(base, candidate, compare_reports(base, candidate))


def comparison_lines(
    first: LoadedReport, second: LoadedReport, ratios: list[Ratio]
) -> Iterator[str]:
    """The comparison for a terminal."""
    for row in ratios:
        yield (
            f"{row.what:<50} {row.first:10.3f} {row.second:10.3f} {row.unit:<8} ratio "
            f"{row.ratio:.2f}, 95 % interval {row.low:.2f} to {row.high:.2f}, repeats within "
            f"{'null' if row.spread is None else f'{100 * row.spread:.1f} %'}: {row.words}  "
            f"[{row.measured_on}]"
        )
    for remark in remarks(first, second):
        yield f"note: {remark}"
    verdict = first.report.measurement.verdict.word
    if verdict != "VALID":
        yield f"note: this is a {verdict} run compared with itself; its figures are not a result"
