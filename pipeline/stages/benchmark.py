"""Assemble the bundle, run its own program on it, and report."""

from __future__ import annotations

from typing import TYPE_CHECKING

from metis.backend import CompiledModel, open_backend, runtime_versions
from pipeline.delivery.device_run import RemoteHost, run_local, run_remote
from pipeline.facts import BenchmarkFacts, LatencyFacts, PngLeg, YamlLeg
from pipeline.params.benchmark import BUNDLED, BenchmarkParams
from pipeline.parity.legs import judge
from pipeline.reports.report import parse_measurement
from pipeline.run.environment import installed_version
from pipeline.run.stage import Gate, Job, Stage

if TYPE_CHECKING:
    from pathlib import Path


def run(job: Job, params: BenchmarkParams) -> BenchmarkFacts:
    """Prove parity, write the bundle, start kdbench.py from it, write the report."""
    from pipeline.delivery.bundle import write_bundle
    from pipeline.parity.verify import prove_parity
    from pipeline.reports.build import report_benchmark

    legs = prove_parity(job)
    write_bundle(job, params)
    folder = job.outputs.benchmark_report
    folder.mkdir()
    samples = folder / "samples.npz"
    measurement = parse_measurement(start_kdbench(job, params, samples))
    report_benchmark(job, params, measurement, legs, samples)
    latency = next(row for row in measurement.latency if row.scope == "tensor to logits")
    assert measurement.throughput is not None  # both scenarios were asked for
    return BenchmarkFacts(
        measured_on=measurement.measured_on,
        runtime=measurement.runtime_version,
        score=measurement.score_test.value,
        n_test=measurement.score_test.n,
        latency_ms=LatencyFacts(latency.p50, latency.p90, latency.p99),
        throughput_fps=measurement.throughput.value,
        verdict=measurement.verdict,
        parity=tuple(legs),
    )


def start_kdbench(job: Job, params: BenchmarkParams, samples: Path) -> str:
    """Measure here or on the host that was named; the document that kdbench prints.

    Raises:
        KdbenchError: see `pipeline.delivery.device_run`.
    """
    bundle, limit = job.outputs.bundle, params.time_limit
    if params.host:
        remote = RemoteHost(params.host, params.ssh_options, params.remote_python)
        return run_remote(remote, bundle, params.kdbench_arguments, samples, limit)
    backend = open_backend(CompiledModel.load(job.inputs.compiled_model).backend, params.sdk)
    python = backend.runtime_python()
    return run_local(bundle, params.kdbench_arguments, samples, limit, python)


def gates(params: BenchmarkParams, facts: BenchmarkFacts) -> list[Gate]:
    """Images and YAML give the training tensor; the measurement may be used, or is a smoke run.

    The legs export and int8 are in the table, but their own stages judge them.
    """
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
    versions = {"onnxruntime": installed_version("onnxruntime")}
    return versions if params.host else versions | runtime_versions(str(params.backend), params.sdk)


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
