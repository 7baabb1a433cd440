"""Assemble the bundle, run its own program on it, and report."""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import subprocess
import sys
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated, Any

from msgspec import Meta

from metis.backend import CompiledModel, QuantizedModel, open_backend
from pipeline.legs import Leg, Limits, export_leg, int8_leg
from pipeline.stage import Facts, Gate, Job, Stage, StageError, same_as_field, unkeyed_field

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


def run(job: Job, params: BenchmarkParams) -> Facts:
    """Prove parity, write the bundle, start kdbench.py from it, write the report."""
    from pipeline.report import parse_measurement, write_report

    legs = _parity(job)
    compiled = CompiledModel.load(job.inputs["compiled_model"])
    _write_bundle(job, params, compiled)
    folder = job.outputs["benchmark_report"]
    folder.mkdir()
    text = _run_kdbench(job.outputs["bundle"], params, folder / "samples.npz")
    measurement = parse_measurement(text)
    report = _report(job, params, measurement, legs)
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
        "parity": [asdict(leg) for leg in legs],
    }


def _parity(job: Job) -> list[Leg]:
    """The legs from training tensor to int8; the last two as their own stages recorded them."""
    from pipeline.parity import SAMPLES, image_legs

    with job.progress("parity", SAMPLES) as bar:
        legs = image_legs(job.inputs, job.run, bar.update)
    return [*legs, export_leg(job.facts["distill"]), int8_leg(job.facts["calibrate"])]


def _write_bundle(job: Job, params: BenchmarkParams, compiled: CompiledModel) -> None:
    import numpy as np

    from pipeline.bundle import write_bundle
    from pipeline.splits import DatasetSplit
    from preprocessing.apply import student_tensor
    from preprocessing.contract import StudentInput, load_contract

    given = StudentInput.load(job.inputs["student_input"])
    val = DatasetSplit.load(job.inputs["dataset"] / "val")
    test = DatasetSplit.load(job.inputs["test_set"])
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


def _report(
    job: Job,
    params: BenchmarkParams,
    measurement: Any,  # noqa: ANN401 - a lazily imported type
    legs: list[Leg],
) -> BenchmarkReport:
    import numpy as np

    from pipeline.metrics import top1
    from pipeline.reference import reference_logits
    from pipeline.report import SCHEMA, BenchmarkReport, LegRow
    from pipeline.splits import DatasetSplit
    from preprocessing.apply import student_tensor
    from preprocessing.contract import StudentInput, load_contract

    given = StudentInput.load(job.inputs["student_input"])
    test = DatasetSplit.load(job.inputs["test_set"])
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


STAGE = Stage(
    inputs=(
        "contract",
        "labels",
        "student_input",
        "dataset",
        "test_set",
        "student",
        "quantized_model",
        "compiled_model",
        "device_pipeline",
    ),
    outputs={"bundle": "bundle", "benchmark_report": "report"},
    params=BenchmarkParams,
    run=run,
    gates=gates,
    tools=lambda params: ("onnxruntime", "axelera-rt"),
)
