"""Assemble the bundle, run its own program on it, and report."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

from msgspec import Meta

from metis.backend import CompiledModel
from metis.sdk_child import find_interpreter, python_with_runtime
from pipeline.bundle import BUNDLED, BundleLimits, assemble_bundle
from pipeline.device_run import Elsewhere, run_here, run_there
from pipeline.environment import installed
from pipeline.legs import Leg, Limits, export_leg, int8_leg
from pipeline.stage import Facts, Gate, Job, Stage, same_as_field, unkeyed_field

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pipeline.report import BenchmarkReport, Measurement, Row


@dataclass(frozen=True)
class BenchmarkParams:
    """Where and how long to measure."""

    min_seconds: Annotated[float, Meta(gt=0)] = 60.0  # per scenario; a shorter run is a SMOKE run
    min_queries: Annotated[int, Meta(ge=1)] = 1024  # of SingleStream; fewer is a SMOKE run
    min_samples: Annotated[int, Meta(ge=1)] = 24_576  # of Offline; fewer is a SMOKE run
    repeats: Annotated[int, Meta(ge=1)] = 1  # 3 or more give a spread
    max_logit_steps: Annotated[float, Meta(gt=0)] = 1.0  # int8 steps to the host's int8 logits
    max_device_loss: Annotated[float, Meta(gt=0)] = 1.0  # points of top-1 below the float student
    device: str = ""  # its name, as axdevice shows it; empty: the first one
    host: str = ""  # user@box that ssh reaches without a password; empty: this machine
    ssh_options: tuple[str, ...] = unkeyed_field(())  # words for ssh before the host
    remote_python: str = unkeyed_field("python3")  # with numpy and the runtime, on that host
    time_limit: Annotated[float, Meta(gt=0)] = unkeyed_field(14_400.0)  # seconds, in all
    backend: Literal["emulator", "voyager"] | None = same_as_field("compile.backend", unkeyed=True)
    golden_samples: Annotated[int, Meta(ge=1)] = 32  # validation patches that prove the bundle
    max_png_levels: Annotated[float, Meta(ge=0)] = unkeyed_field(1.0)  # grey levels, when bilinear
    max_yaml_difference: Annotated[float, Meta(ge=0)] = unkeyed_field(1e-5)  # standard deviations
    max_export_difference: float | None = same_as_field(
        "distill.max_export_difference", unkeyed=True
    )
    max_int8_loss: float | None = same_as_field("calibrate.max_int8_loss", unkeyed=True)

    @property
    def limits(self) -> Limits:
        """Of the legs of parity."""
        return Limits(
            max_png_levels=self.max_png_levels,
            max_yaml_difference=self.max_yaml_difference,
            max_export_difference=self.max_export_difference or 0.0,
            max_int8_loss=self.max_int8_loss or 0.0,
        )

    @property
    def bundle_limits(self) -> BundleLimits:
        """Of what kdbench accepts."""
        return BundleLimits(self.max_logit_steps, self.max_device_loss)

    @property
    def words(self) -> list[str]:
        """For kdbench's command line."""
        return [
            f"--min-seconds={self.min_seconds}",
            f"--min-queries={self.min_queries}",
            f"--min-samples={self.min_samples}",
            f"--repeats={self.repeats}",
            *([f"--device={self.device}"] if self.device else []),
        ]


def run(job: Job, params: BenchmarkParams) -> Facts:
    """Prove parity, write the bundle, start kdbench.py from it, write the report."""
    from pipeline.report import parse_measurement
    from pipeline.report_pages import write_report

    legs = _parity(job)
    bundle, folder = job.outputs["bundle"], job.outputs["benchmark_report"]
    with job.progress(
        "float student on test", job.facts["ingest"]["splits"]["test"]["patches"]
    ) as bar:
        assemble_bundle(
            job.inputs,
            bundle,
            golden_samples=params.golden_samples,
            limits=params.bundle_limits,
            progress=bar.update,
        )
    folder.mkdir()
    samples = folder / "samples.npz"
    if params.host:
        there = Elsewhere(params.host, params.ssh_options, params.remote_python)
        text = run_there(there, bundle, params.words, samples, params.time_limit)
    else:
        compiled = CompiledModel.load(job.inputs["compiled_model"])
        python = python_with_runtime(compiled.runtime)
        text = run_here(bundle, params.words, samples, params.time_limit, python)
    measurement = parse_measurement(text)
    write_report(_report(job, params, measurement, legs), samples, folder)
    return _facts(measurement, legs)


def _facts(measurement: Measurement, legs: list[Leg]) -> Facts:
    latency = {row.scope: row for row in measurement.latency}["tensor to logits"]
    assert measurement.throughput is not None  # both scenarios were asked for
    return {
        "measured_on": measurement.measured_on,
        "runtime": measurement.runtime_version,
        "top1_test": measurement.top1_test.value,
        "n_test": measurement.top1_test.n,
        "latency_ms": {"p50": latency.p50, "p90": latency.p90, "p99": latency.p99},
        "throughput_fps": measurement.throughput.value,
        "verdict": {"word": measurement.verdict.word, "reasons": measurement.verdict.reasons},
        "parity": [asdict(leg) for leg in legs],
    }


def _parity(job: Job) -> list[Leg]:
    """The legs from training tensor to int8; the last two as their own stages recorded them."""
    from pipeline.parity import SAMPLES, image_legs

    with job.progress("parity", SAMPLES) as bar:
        legs = image_legs(job.inputs, job.run, bar.update)
    return [*legs, export_leg(job.facts["distill"]), int8_leg(job.facts["calibrate"])]


def _report(
    job: Job, params: BenchmarkParams, measurement: Measurement, legs: list[Leg]
) -> BenchmarkReport:
    from pipeline.report import SCHEMA, BenchmarkReport, LegRow
    from preprocessing.contract import load_contract

    distill, calibrate = job.facts["distill"], job.facts["calibrate"]
    return BenchmarkReport(
        schema=SCHEMA,
        run=job.run,
        contract=load_contract(job.inputs["contract"]).sha256,
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
    from pipeline.metrics import proportion_interval
    from pipeline.report import Figure, Row

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

    with np.load(job.outputs["bundle"] / "test.npz") as test:
        return float((test["float_classes"] == test["labels"]).mean())


def gates(params: BenchmarkParams, facts: Facts) -> list[Gate]:
    """Images and YAML give the training tensor; the measurement may be used, or is a smoke run.

    The legs export and int8 are in the table, but their own stages judge them.
    """
    verdict = facts["verdict"]
    reasons = "; ".join(verdict["reasons"]) or "all minima reached"
    legs = [Leg(**values) for values in facts["parity"] if values["name"] in ("png", "yaml")]
    failed = [leg for leg in legs if leg.judge(params.limits)[1] is False]
    return [
        Gate(
            "parity",
            not failed,
            "; ".join(f"{leg.name}: {leg.words()}" for leg in failed or legs),
        ),
        Gate("verdict", verdict["word"] != "INVALID", f"{verdict['word']}: {reasons}", status=7),
    ]


def tools(params: BenchmarkParams) -> dict[str, str | None]:
    """What computes and measures here; a runtime on another host is only known by measuring."""
    found = {"onnxruntime": installed("onnxruntime")}
    if params.backend == "voyager" and not params.host:
        found["axelera-rt"] = find_interpreter().versions.get("axelera-rt")
    return found


STAGE = Stage(
    inputs=BUNDLED,
    outputs={"bundle": "bundle", "benchmark_report": "report"},
    params=BenchmarkParams,
    run=run,
    gates=gates,
    gate_names=("parity", "verdict"),
    tools=tools,
    code_version=2,
)
