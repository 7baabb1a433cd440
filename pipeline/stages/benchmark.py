"""Assemble the bundle, run its own program on it, and report."""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from msgspec import Meta

from metis.backend import CompiledModel, QuantizedModel, open_backend
from pipeline.stage import Facts, Gate, Job, Stage, StageError

if TYPE_CHECKING:
    from pathlib import Path

    from pipeline.report import BenchmarkReport, Row

#: Exit statuses of kdbench that are results; the gates judge them.
_RESULTS = (0, 7)

log = logging.getLogger("kdpipe")


@dataclass(frozen=True)
class BenchmarkParams:
    """How long to measure."""

    min_seconds: Annotated[float, Meta(gt=0)] = 60.0  # per scenario; a shorter run is a SMOKE run
    min_queries: Annotated[int, Meta(ge=1)] = 1024  # of SingleStream; fewer is a SMOKE run
    golden_samples: Annotated[int, Meta(ge=1)] = 32  # validation patches that prove the bundle


def run(job: Job, params: BenchmarkParams) -> Facts:
    """Write the bundle, start kdbench.py from it, write the report."""
    from pipeline.report import parse_measurement, write_report

    compiled = CompiledModel.load(job.inputs["compiled_model"])
    _write_bundle(job, params, compiled)
    folder = job.outputs["benchmark_report"]
    folder.mkdir()
    text = _run_kdbench(job.outputs["bundle"], params, folder / "samples.npz")
    measurement = parse_measurement(text)
    report = _report(job, measurement)
    write_report(report, folder / "samples.npz", folder)
    latency = {row.scope: row for row in measurement.latency}["tensor to logits"]
    return {
        "measured_on": measurement.measured_on,
        "runtime": measurement.runtime_version,
        "top1_test": measurement.top1_test.value,
        "n_test": measurement.top1_test.n,
        "latency_ms": {"p50": latency.p50, "p90": latency.p90, "p99": latency.p99},
        "throughput_fps": measurement.throughput.value,
        "verdict": {"word": measurement.verdict.word, "reasons": measurement.verdict.reasons},
    }


def _write_bundle(job: Job, params: BenchmarkParams, compiled: CompiledModel) -> None:
    import numpy as np

    from pipeline.bundle import write_bundle
    from pipeline.datasets import DatasetSplit
    from preprocessing.apply import student_tensor
    from preprocessing.contract import StudentInput, load_contract

    given = StudentInput.load(job.inputs["student_input"])
    val = DatasetSplit.load(job.inputs["dataset"], "val")
    test = DatasetSplit.load(job.inputs["dataset"], "test")
    chosen = np.linspace(0, len(val.labels) - 1, min(params.golden_samples, len(val.labels)))
    images = val.images[np.unique(chosen.round().astype(int))]
    tensors = student_tensor(images, given)
    quantized = QuantizedModel.load(job.inputs["quantized_model"])
    logits = open_backend(quantized.backend).infer(quantized, tensors)
    write_bundle(
        job.outputs["bundle"],
        compiled=compiled,
        contract=job.inputs["contract"],
        student_input=job.inputs["student_input"],
        labels=job.inputs["labels"],
        contract_sha256=load_contract(job.inputs["contract"]).sha256,
        golden={"images": images, "tensors": tensors, "logits": logits},
        test={"images": test.images, "labels": test.labels},
    )


def _run_kdbench(bundle: Path, params: BenchmarkParams, samples: Path) -> str:
    """Start the bundle's program as a user on the device would; return its last line.

    Raises:
        StageError: it ended badly; its own words are in the message.
    """
    command = [
        sys.executable,
        str(bundle / "kdbench.py"),
        f"--min-seconds={params.min_seconds}",
        f"--min-queries={params.min_queries}",
        f"--samples={samples}",
    ]
    # A bundle is what was written, no more: Python must not leave its caches in it.
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    with subprocess.Popen(
        command,
        cwd=bundle,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=_die_with_parent,
    ) as child:
        try:
            out, err = child.communicate()
        except BaseException:
            os.killpg(child.pid, signal.SIGKILL)
            raise
    log.info("kdbench ended with %d\n%s%s", child.returncode, out, err)
    if child.returncode not in _RESULTS:
        words = err.strip().splitlines()
        last = words[-1].removeprefix("Error: ") if words else "it said nothing"
        raise StageError(f"kdbench.py ended with {child.returncode}: {last}")
    return out.rstrip().rpartition("\n")[2]


def _die_with_parent() -> None:
    """Ask Linux to end this process when kdpipe is killed; else it would measure on, unseen."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)


def _report(job: Job, measurement: Any) -> BenchmarkReport:  # noqa: ANN401 - a lazily imported type
    import numpy as np

    from pipeline.datasets import DatasetSplit
    from pipeline.metrics import top1
    from pipeline.reference import reference_logits
    from pipeline.report import SCHEMA, BenchmarkReport
    from preprocessing.apply import student_tensor
    from preprocessing.contract import StudentInput, load_contract

    given = StudentInput.load(job.inputs["student_input"])
    test = DatasetSplit.load(job.inputs["dataset"], "test")
    with job.progress("float student on test", len(test.labels)) as bar:
        parts = []
        for start in range(0, len(test.labels), 256):
            tensors = student_tensor(test.images[start : start + 256], given)
            parts.append(reference_logits(job.inputs["student"], tensors))
            bar.update(len(tensors))
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
        accuracy=_accuracy(job, top1(np.concatenate(parts), test.labels), measurement),
        int8={
            "loss_points": calibrate["int8_loss_points"],
            "loss_interval95_points": calibrate["int8_loss_interval95_points"],
            "top1_agreement": calibrate["top1_agreement"],
            "logits_sqnr_db": calibrate["logits_sqnr_db"],
            "scheme": calibrate["scheme"],
            "samples": calibrate["calibration"]["samples"],
            "measured_on": calibrate["measured_on"],
        },
        measurement=measurement,
    )


def _accuracy(job: Job, float_top1: float, measurement: Any) -> list[Row]:  # noqa: ANN401 - as above
    from pipeline.report import Figure, Row

    teachers, student = job.facts["ingest"]["teachers"], job.facts["distill"]["student"]
    int8 = job.facts["calibrate"]

    def row(name: str, value: float, on: Any, n: int, split: str) -> Row:  # noqa: ANN401 - a Literal
        return Row(name, Figure(value, "fraction", on, n, f"{split} split"))

    n_val = teachers["n_val"]
    members = [
        row(f"teacher {m['name']}", m["top1_val"], "host-float", n_val, "validation")
        for m in teachers["members"]
    ]
    return [
        *members,
        row("teacher ensemble", teachers["top1_val"], "host-float", n_val, "validation"),
        row(f"{student} float", int8["top1_val_float"], "host-float", n_val, "validation"),
        row(f"{student} int8", int8["top1_val_int8"], int8["measured_on"], n_val, "validation"),
        row(f"{student} float", float_top1, "host-float", measurement.top1_test.n, "test"),
        row(
            f"{student} int8",
            measurement.top1_test.value,
            measurement.measured_on,
            measurement.top1_test.n,
            "test",
        ),
    ]


def gates(params: BenchmarkParams, facts: Facts) -> list[Gate]:
    """The measurement may be used; a smoke run says it is one and passes."""
    verdict = facts["verdict"]
    reasons = "; ".join(verdict["reasons"]) or "all minima reached"
    return [
        Gate("verdict", verdict["word"] != "INVALID", f"{verdict['word']}: {reasons}", status=7)
    ]


STAGE = Stage(
    inputs=(
        "contract",
        "labels",
        "student_input",
        "dataset",
        "student",
        "quantized_model",
        "compiled_model",
    ),
    outputs={"bundle": "bundle", "benchmark_report": "report"},
    params=BenchmarkParams,
    run=run,
    gates=gates,
    tools=lambda params: ("onnxruntime", "axelera-rt"),
)
