"""The benchmark report, put together from what was measured."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pipeline.params.benchmark import BenchmarkParams
from pipeline.parity.legs import Leg
from pipeline.run.stage import Job

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pipeline.reports.report import BenchmarkReport, Measurement, Row


def build_report(
    job: Job, params: BenchmarkParams, measurement: Measurement, legs: list[Leg]
) -> BenchmarkReport:
    """The report of a measurement, with what the earlier stages reported beside it."""
    from pipeline.data.dataset import StudentData
    from pipeline.reports.report import SCHEMA, BenchmarkReport, LegRow

    distill, calibrate = job.facts["distill"], job.facts["calibrate"]
    return BenchmarkReport(
        schema=SCHEMA,
        run=job.run,
        contract=StudentData(job.inputs).contract.sha256,
        student={
            "name": distill["student"],
            "parameters": distill["parameters"],
            "size_bytes": distill["size_bytes"],
            "loss": distill["loss"],
        },
        accuracy=list(_accuracy(job, measurement)),
        int8={
            "loss_points": calibrate["int8_loss_points"],
            "loss_interval95_points": calibrate["int8_loss_interval95_points"],
            "top1_agreement": calibrate["top1_agreement"],
            "logits_sqnr_db": calibrate["logits_sqnr_db"],
            "scheme": calibrate["scheme"],
            "schemes": calibrate.get("schemes", []),
            "samples": calibrate["calibration"]["samples"],
            **{
                key: calibrate[key]
                for key in ("calibration", "arithmetic", "baked", "variants", "suggestions")
            },
            "host_operators": calibrate["host_operators"],
            "worst_layers": calibrate.get("worst_layers", []),
            "measured_on": calibrate["measured_on"],
        },
        parity=[
            LegRow(leg.source, leg.target, leg.n, leg.words(), *leg.judge(params.limits))
            for leg in legs
        ],
        device={
            key: job.facts["compile"][key]
            for key in ("pipeline_yaml", "pipeline_yaml_obstacle", "device_constants")
        },
        data={
            key: job.facts["ingest"][key] for key in ("synthetic", "splits", "encoding", "teachers")
        },
        measurement=measurement,
        int8_emulator=calibrate.get("emulator"),
        rewrites=distill["operators"].get("rewrites", []),
        estimate=job.facts["compile"].get("estimate"),
    )


def _accuracy(job: Job, measurement: Measurement) -> Iterator[Row]:
    """Teachers, float student, int8 on the host, int8 where it was measured."""
    from pipeline.reports.report import Figure, Row
    from pipeline.tasks.metrics import proportion_interval

    teachers, student = job.facts["ingest"]["teachers"], job.facts["distill"]["student"]
    int8, test = job.facts["calibrate"], measurement.top1_test

    def row(name: str, value: float, on: Any, n: int, split: str) -> Row:  # noqa: ANN401 - a Literal
        figure = Figure(value, "fraction", on, n, f"{split} split")
        return Row(name, figure, proportion_interval(value, n))

    n_val = teachers["n_val"]
    for member in teachers["members"]:
        name = f"teacher {member['name']}"
        yield row(name, member["top1_val"], "host-float", n_val, "validation")
    yield row("teacher ensemble", teachers["top1_val"], "host-float", n_val, "validation")
    yield row(f"{student} float", int8["top1_val_float"], "host-float", n_val, "validation")
    yield row(f"{student} int8", int8["top1_val_int8"], int8["measured_on"], n_val, "validation")
    if beside := int8.get("emulator"):
        value = beside["top1_val_int8"]
        yield row(f"{student} int8, emulator", value, beside["measured_on"], n_val, "validation")
    yield row(f"{student} float", _float_top1(job), "host-float", test.n, "test")
    yield row(f"{student} int8", test.value, measurement.measured_on, test.n, "test")


def _float_top1(job: Job) -> float:
    """Of the float student on the test split, whose answers the bundle holds."""
    import numpy as np

    with np.load(job.outputs.bundle / "test.npz") as test:
        return float((test["float_classes"] == test["labels"]).mean())
