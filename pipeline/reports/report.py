"""The benchmark report, report.json: its schema, and its lines for a terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import msgspec

from pipeline.facts import (
    CalibrationSetFacts,
    ComparisonFacts,
    ConstantsFacts,
    EncodingFacts,
    EnsembleFacts,
    EstimateFacts,
    Int8Facts,
    LayerFacts,
    MeasuredOn,
    RewriteFacts,
    SchemeFacts,
    SplitFacts,
    VariantFacts,
    Verdict,
)

if TYPE_CHECKING:
    from collections.abc import Iterator


SCHEMA = 3


class ReportError(ValueError):
    """A report that does not say what it must, or says what it can't know."""


class Quantity(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
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
    p999: float | None
    max: float
    bounds: dict[str, float | None]  # per percentile, not exceeded at 99 % confidence (LoadGen)


class Accuracy(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What was measured against the float student's answers to the same images."""

    agreement: float  # same class, as a fraction
    loss_points: float  # of top-1
    loss_low: float  # ends of its 95 % interval
    loss_high: float
    limit_points: float
    measured_on: MeasuredOn


class Audit(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Answers kept while measuring, compared with those of an idle instance."""

    scope: str
    kept: int
    different: int


class Link(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """PCIe, negotiated and possible; null with the reason where it can't be read."""

    width: int | None
    max_width: int | None
    speed: str | None
    max_speed: str | None
    reason: str


class Heat(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The device at one moment; null with the reason where it can't be read."""

    temperature_c: float | None
    power_w: float | None
    clocks: dict[str, str]
    reason: str


class DeviceReadings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The device each second of the measurement; null with the reason where it can't be read."""

    source: str | None
    n: int  # readings
    coolest_c: float | None
    hottest_c: float | None
    throttling: bool | None  # as hot as where the chip throttles
    cpu_share: float | None  # of one core of the host, for reading
    clocks: str
    reason: str


class Pass(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One scenario, from its start to its last answer; the device's power in the same window."""

    scenario: str
    repeat: int
    start_s: float  # since the measurement began
    seconds: float
    frames: int
    warm_up_queries: int  # before the start
    hottest_c: float | None
    power_w: float | None  # mean, of the whole card
    energy_mj: float | None  # per frame
    measured_on: MeasuredOn


class RepetitionCheck(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Time of distinct samples / time of one sample repeated; the idea of MLPerf's TEST04."""

    scope: str
    value: float  # median over rounds
    low: float  # ends of its 98.8 % interval
    high: float
    limit: float
    unit: Literal["ratio"]
    measured_on: MeasuredOn
    n: int  # repeated queries


class Minute(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One minute of a soak."""

    minute: int
    value: float
    unit: Literal["frames/s"]
    measured_on: MeasuredOn
    hottest_c: float | None
    power_w: float | None  # mean


class Rules(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What was asked for."""

    name: Literal["kdpipe", "MLPerf-style"]
    scenario: Literal["single-stream", "offline", "both"]
    min_seconds: float
    min_queries: int
    min_samples: int
    warm_up_seconds: float
    repeats: int


class Stability(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How even the run was; null where it has too few queries or repeats to tell."""

    drift: float | None  # median of a repeat's last tenth / of its first, where it is largest
    slow_queries: int  # slower than the limit; never dropped
    slow_limit_ms: float | None
    repeats: int
    spread_p90: float | None  # (largest - smallest) / median over the repeats
    spread_throughput: float | None


class Check(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Something kdbench proved before it measured."""

    name: str
    passed: bool
    detail: str


class Measurement(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The document that kdbench prints."""

    schema: int
    contract: str
    bundle: str
    test_set: str
    model: str
    runtime: str
    runtime_version: str
    compiled_by: str
    measured_on: Literal["device", "host-emulation"]
    device: dict[str, Any] | None
    instance_options: dict[str, int] | None  # how the runtime loads the model
    aipu_cores: int
    batch: int
    instances: int
    host_graphs: dict[str, bool]  # preamble, postamble: part of the network runs on the host
    rules: Rules
    started: str
    host: dict[str, Any]
    driver: str | None
    link: Link
    heat_before: Heat
    heat_during: DeviceReadings
    heat_after: Heat
    checks: list[Check]
    load_ms: Quantity
    first_inference_ms: Quantity
    latency: list[Latency]
    overhead_share: Quantity | None
    passes: list[Pass]
    throughput: Quantity | None  # of the faster way of buffering
    throughput_modes: list[Quantity]
    stability: Stability
    audit: list[Audit]
    repetition: RepetitionCheck
    score_test: Quantity = msgspec.field(name="top1_test")
    accuracy: Accuracy
    soak: list[Minute]
    verdict: Verdict


class AccuracyRow(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One line of the accuracy table."""

    name: str
    figure: Quantity
    interval95: tuple[float, float]  # of the figure, as a fraction


class LegRow(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One line of the parity table."""

    source: str
    target: str
    n: int
    found: str
    limit: str
    passed: bool | None  # null: does not apply


class StudentSummary(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The student, as distill made it."""

    name: str
    parameters: int
    size_bytes: int  # of the ONNX file
    loss: str  # as it is added up


class Int8Summary(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How the student was quantized, and what it cost on the validation split."""

    loss_points: float
    loss_interval95_points: tuple[float, float]
    agreement: float = msgspec.field(name="top1_agreement")  # fraction
    logits_sqnr_db: float | None
    scheme: str
    schemes: tuple[SchemeFacts, ...]
    samples: int  # training patches that calibrated
    calibration: CalibrationSetFacts
    arithmetic: str
    baked: Int8Facts
    variants: tuple[VariantFacts, ...]
    suggestions: tuple[str, ...]
    host_operators: tuple[str, ...]
    worst_layers: tuple[LayerFacts, ...]
    measured_on: MeasuredOn


class DeviceSummary(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The pipeline YAML, or why there is none; the device pipe's constants."""

    pipeline_yaml: str | None
    pipeline_yaml_obstacle: str
    device_constants: ConstantsFacts | None


class DataSummary(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Splits, 8-bit encoding, teachers, and whether the data are synthetic."""

    synthetic: tuple[str, ...]
    splits: dict[str, SplitFacts]
    encoding: tuple[EncodingFacts, ...]
    teachers: EnsembleFacts


class BenchmarkReport(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a run amounts to."""

    schema: int
    run: str
    contract: str
    student: StudentSummary
    accuracy: list[AccuracyRow]
    int8: Int8Summary
    parity: list[LegRow]
    device: DeviceSummary
    data: DataSummary
    measurement: Measurement
    # What is known only after some ways of calibrating, compiling and estimating.
    int8_emulator: ComparisonFacts | None = None  # the emulator's figures beside the SDK's own
    rewrites: tuple[RewriteFacts, ...] = ()  # made for the chip
    estimate: EstimateFacts | None = None  # what the cost model says of cards


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
    _check_rest(report)
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
    if not emulated and measurement.device is None:
        raise ReportError(f"runtime {measurement.runtime} has a device, but the report names none")
    for heat in (measurement.heat_before, measurement.heat_after) if emulated else ():
        if heat.temperature_c is not None or heat.power_w is not None or heat.clocks:
            raise ReportError("runtime onnxruntime has no device to read heat, power or clocks of")
    degrees = [
        measurement.heat_during.hottest_c,
        *(run.hottest_c for run in measurement.passes),
        *(minute.hottest_c for minute in measurement.soak),
    ]
    watts = [
        *(run.power_w for run in measurement.passes),
        *(minute.power_w for minute in measurement.soak),
    ]
    if emulated and (measurement.driver or {*degrees, *watts} - {None}):
        raise ReportError("runtime onnxruntime has no device to read heat, power or a driver of")
    if emulated and measurement.link.width is not None:
        raise ReportError("runtime onnxruntime has no device to read a PCIe link of")
    for path, measured_on in _origins(msgspec.to_builtins(measurement), "measurement"):
        if measured_on != truth:
            raise ReportError(
                f"{path} says measured_on {measured_on}, but runtime {measurement.runtime} "
                f"measures {truth}"
            )


def _check_rest(report: BenchmarkReport) -> None:
    """Beside the measurement and its own row of top-1, no figure came from a device."""
    measured = report.measurement.score_test
    for number, row in enumerate(report.accuracy):
        is_measured = (row.figure.value, row.figure.n) == (measured.value, measured.n)
        if row.figure.measured_on == "device" and not (
            is_measured and measured.measured_on == "device"
        ):
            raise ReportError(
                f"accuracy[{number}] says measured_on device, but kdbench measured another top-1"
            )
    tree = msgspec.to_builtins(report)
    del tree["accuracy"], tree["measurement"]
    for path, measured_on in _origins(tree, "report"):
        if measured_on == "device":
            raise ReportError(f"{path} says measured_on device, but it is the host's")


def _origins(tree: Any, path: str) -> Iterator[tuple[str, str]]:  # noqa: ANN401 - a JSON tree
    """Every `measured_on`, and where it stands."""
    if isinstance(tree, dict):
        if "measured_on" in tree:
            yield path, tree["measured_on"]
        for name, value in tree.items():
            yield from _origins(value, f"{path}.{name}")
    elif isinstance(tree, list | tuple):
        for number, value in enumerate(tree):
            yield from _origins(value, f"{path}[{number}]")


def summary_lines(report: BenchmarkReport) -> list[str]:
    """The report in a few lines for a terminal."""
    measured = report.measurement
    lines = [
        f"{row.name:<34} top-1 {row.figure.value:.4f}  n {row.figure.n}  "
        f"[{row.figure.scope}; {row.figure.measured_on}]"
        for row in report.accuracy
    ]
    for row in measured.latency:
        percentiles = "  ".join(
            f"{name} {in_ms(getattr(row, name))}" for name in ("p50", "p90", "p99")
        )
        lines.append(f"{'latency, ' + row.scope:<34} {percentiles}  n {row.n}  [{row.measured_on}]")
    lines += [
        f"{'throughput':<34} {rate.value:.1f} {rate.unit}  [{rate.scope}; {rate.measured_on}]"
        for rate in measured.throughput_modes
    ]
    judged = [leg.passed for leg in report.parity if leg.passed is not None]
    lines.append(f"{'parity':<34} {sum(judged)} of {len(judged)} legs passed")
    lines.append(f"{'verdict':<34} {measured.verdict.word}: {'; '.join(measured.verdict.reasons)}")
    return lines


def in_ms(value: float | None) -> str:
    """Milliseconds with their unit, or the word null."""
    return "null" if value is None else f"{value:.3f} ms"
