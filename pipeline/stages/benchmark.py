"""Assemble the bundle, run its own program on it, and report."""

from __future__ import annotations

from typing import TYPE_CHECKING

from metis.backend import CompiledModel
from metis.voyager.process import find_interpreter, python_with_runtime
from pipeline.facts import BenchmarkFacts, LatencyFacts, PngLeg, YamlLeg
from pipeline.params.benchmark import BUNDLED, BenchmarkParams
from pipeline.run.environment import installed
from pipeline.run.stage import Gate, Job, Stage

if TYPE_CHECKING:
    from pipeline.facts import Leg
    from pipeline.reports.report import Measurement


def run(job: Job, params: BenchmarkParams) -> BenchmarkFacts:
    """Prove parity, write the bundle, start kdbench.py from it, write the report."""
    from pipeline.delivery.bundle import assemble_bundle
    from pipeline.delivery.device_run import Elsewhere, run_here, run_there
    from pipeline.reports.build import build_report
    from pipeline.reports.pages import write_report
    from pipeline.reports.report import parse_measurement

    legs = _parity(job)
    bundle, folder = job.outputs.bundle, job.outputs.benchmark_report
    with job.progress("float student on test", job.facts.ingest.splits["test"].patches) as bar:
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
        compiled = CompiledModel.load(job.inputs.compiled_model)
        python = python_with_runtime(compiled.runtime)
        text = run_here(bundle, params.words, samples, params.time_limit, python)
    measurement = parse_measurement(text)
    write_report(build_report(job, params, measurement, legs), samples, folder)
    return _facts(measurement, legs)


def _facts(measurement: Measurement, legs: list[Leg]) -> BenchmarkFacts:
    latency = {row.scope: row for row in measurement.latency}["tensor to logits"]
    assert measurement.throughput is not None  # both scenarios were asked for
    return BenchmarkFacts(
        measured_on=measurement.measured_on,
        runtime=measurement.runtime_version,
        top1_test=measurement.top1_test.value,
        n_test=measurement.top1_test.n,
        latency_ms=LatencyFacts(latency.p50, latency.p90, latency.p99),
        throughput_fps=measurement.throughput.value,
        verdict=measurement.verdict,
        parity=tuple(legs),
    )


def _parity(job: Job) -> list[Leg]:
    """The legs from training tensor to int8; the last two as their own stages recorded them."""
    from pipeline.data.dataset import StudentData
    from pipeline.parity.images import SAMPLES, image_legs
    from pipeline.parity.legs import export_leg, int8_leg

    with job.progress("parity", SAMPLES) as bar:
        legs = image_legs(StudentData(job.inputs), job.inputs.device_pipeline, job.run, bar.update)
    return [*legs, export_leg(job.facts.distill), int8_leg(job.facts.calibrate)]


def gates(params: BenchmarkParams, facts: BenchmarkFacts) -> list[Gate]:
    """Images and YAML give the training tensor; the measurement may be used, or is a smoke run.

    The legs export and int8 are in the table, but their own stages judge them.
    """
    from pipeline.parity.legs import judge

    verdict = facts.verdict
    reasons = "; ".join(verdict.reasons) or "all minima reached"
    legs = [judge(leg, params.limits) for leg in facts.parity if isinstance(leg, PngLeg | YamlLeg)]
    failed = [row for row in legs if row.passed is False]
    return [
        Gate(
            "parity",
            not failed,
            "; ".join(f"{row.leg.name}: {row.message}" for row in failed or legs),
        ),
        Gate("verdict", verdict.word != "INVALID", f"{verdict.word}: {reasons}", status=7),
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
    facts=BenchmarkFacts,
    run=run,
    gates=gates,
    gate_names=("parity", "verdict"),
    tools=tools,
    code_version=2,
)
