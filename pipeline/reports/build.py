"""The benchmark report, put together from what was measured."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from pipeline.data.dataset import StudentData
from pipeline.parity.legs import judge
from pipeline.reports.pages import write_report
from pipeline.reports.report import (
    SCHEMA,
    AccuracyRow,
    BenchmarkReport,
    DataSummary,
    DeviceSummary,
    Int8Summary,
    LegRow,
    Quantity,
    StudentSummary,
)
from pipeline.tasks.metrics import proportion_interval

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from pipeline.facts import CalibrateFacts, Leg, MeasuredOn
    from pipeline.params.benchmark import BenchmarkParams
    from pipeline.parity.legs import JudgedLeg
    from pipeline.reports.report import Measurement
    from pipeline.run.stage import Job


def report_benchmark(
    job: Job,
    params: BenchmarkParams,
    measurement: Measurement,
    legs: Sequence[Leg],
    samples: Path,
) -> None:
    """Write the report of a measurement into the folder of its samples.

    Args:
        job: of benchmark, with the bundle written.
        params: of benchmark.
        measurement: what kdbench printed.
        legs: of parity.
        samples: the .npz with every latency; the report's pages lie beside it.
    """
    write_report(build_report(job, params, measurement, legs), samples, samples.parent)


def build_report(
    job: Job, params: BenchmarkParams, measurement: Measurement, legs: Sequence[Leg]
) -> BenchmarkReport:
    """The report of a measurement, with what the earlier stages reported beside it."""
    ingest, distill, calibrate = job.facts.ingest, job.facts.distill, job.facts.calibrate
    compiled = job.facts.compile
    return BenchmarkReport(
        schema=SCHEMA,
        run=job.run,
        contract=StudentData(job.inputs).contract.sha256,
        student=StudentSummary(
            distill.student, distill.parameters, distill.size_bytes, distill.loss
        ),
        accuracy=list(_accuracy(job, measurement)),
        int8=_int8_summary(calibrate),
        parity=[_leg_row(judge(leg, params.limits)) for leg in legs],
        device=DeviceSummary(
            compiled.pipeline_yaml, compiled.pipeline_yaml_obstacle, compiled.device_constants
        ),
        data=DataSummary(ingest.synthetic, ingest.splits, ingest.encoding, ingest.teachers),
        measurement=measurement,
        int8_emulator=calibrate.emulator,
        rewrites=distill.operators.rewrites,
        estimate=compiled.estimate,
    )


def _int8_summary(calibrate: CalibrateFacts) -> Int8Summary:
    return Int8Summary(
        loss_points=calibrate.int8_loss_points,
        loss_interval95_points=calibrate.int8_loss_interval95_points,
        agreement=calibrate.agreement,
        logits_sqnr_db=calibrate.logits_sqnr_db,
        scheme=calibrate.scheme,
        schemes=calibrate.schemes,
        samples=calibrate.calibration.samples,
        calibration=calibrate.calibration,
        arithmetic=calibrate.arithmetic,
        baked=calibrate.baked,
        variants=calibrate.variants,
        suggestions=calibrate.suggestions,
        host_operators=calibrate.host_operators,
        worst_layers=calibrate.worst_layers or (),
        measured_on=calibrate.measured_on,
    )


def _leg_row(row: JudgedLeg) -> LegRow:
    leg = row.leg
    return LegRow(leg.source, leg.target, leg.n, row.message, row.limit, row.passed)


def _accuracy(job: Job, measurement: Measurement) -> Iterator[AccuracyRow]:
    """Teachers, float student, int8 on the host, int8 where it was measured."""
    teachers, student = job.facts.ingest.teachers, job.facts.distill.student
    int8, test = job.facts.calibrate, measurement.score_test

    def row(name: str, value: float, measured_on: MeasuredOn, n: int, split: str) -> AccuracyRow:
        figure = Quantity(value, "fraction", measured_on, n, f"{split} split")
        return AccuracyRow(name, figure, proportion_interval(value, n))

    n_val = teachers.n_val
    for member in teachers.members:
        yield row(f"teacher {member.name}", member.score, "host-float", n_val, "validation")
    yield row("teacher ensemble", teachers.score, "host-float", n_val, "validation")
    yield row(f"{student} float", int8.score_float, "host-float", n_val, "validation")
    yield row(f"{student} int8", int8.score_int8, int8.measured_on, n_val, "validation")
    if emulator := int8.emulator:
        value = emulator.score_int8
        yield row(f"{student} int8, emulator", value, emulator.measured_on, n_val, "validation")
    yield row(f"{student} float", _float_score(job), "host-float", test.n, "test")
    yield row(f"{student} int8", test.value, measurement.measured_on, test.n, "test")


def _float_score(job: Job) -> float:
    """Of the float student on the test split, whose answers the bundle holds."""
    metric = StudentData(job.inputs).task.metric()
    with np.load(job.outputs.bundle / "test.npz") as test:
        metric.add(test["float_classes"], test["labels"])
    return metric.score().value
