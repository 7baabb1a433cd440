"""Check a bundle on the machine that runs it, then measure it there.

    python kdbench.py [BUNDLE] [--min-seconds S] [--min-queries N] [--samples FILE] [--json]

In this order: digests of every file; the contract applied to the golden images gives the golden
tensors; the model gives the host's int8 logits; warm-up; latency (SingleStream: the next query
starts after the answer); throughput (Offline: as many instances as fit); accuracy over the whole
test split. Prints a table and, as the very last line, one JSON document.

Needs Python 3.10, numpy, one runtime, and the folder preprocessing/ beside it. Nothing of kdpipe.

Exit status: 0 done; 3 a file is damaged or missing; 4 the tensors or the logits differ; 5 the
runtime is not installed; 7 the measurement is INVALID.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import platform
import sys
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

try:
    from preprocessing.apply import student_tensor
    from preprocessing.contract import StudentInput, load_contract
    from preprocessing.int8 import TensorSpec, from_device, to_device
except (ImportError, SyntaxError) as error:
    print(
        f"Error: the folder preprocessing/ beside kdbench.py is damaged: {error}", file=sys.stderr
    )
    sys.exit(3)

SCHEMA = 1

#: What a run needs to be VALID; a shorter one is a SMOKE run, never compared.
VALID_SECONDS = 60.0
VALID_QUERIES = 1024

#: A percentile of a shorter run is null. Source: MLPerf LoadGen's early stopping at 99 % confidence
#: with one slower query allowed.
PERCENTILES = {"p50": (0.50, 1), "p90": (0.90, 64), "p95": (0.95, 130), "p99": (0.99, 662)}

#: Cores of one Metis chip; a model compiled for n of them leaves room for 4 // n instances.
AIPU_CORES = 4

#: How far logits may be from the host's int8 logits, in steps of the output's scale.
LOGIT_STEPS = 1.0


class CheckError(Exception):
    """The bundle can't be measured; `status` is the exit status."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class OnnxRuntime:
    """Emulation on a host: the model's integer graph in onnxruntime, on one thread."""

    measured_on = "host-emulation"
    device = None

    def __init__(self, model: Path) -> None:
        try:
            import onnxruntime
        except ImportError as error:
            raise CheckError("onnxruntime is not installed:  pip install onnxruntime", 5) from error
        self.version = f"onnxruntime {onnxruntime.__version__}"
        self._library = onnxruntime
        self._model = model

    def open(self) -> None:
        """Load one instance."""
        options = self._library.SessionOptions()
        options.intra_op_num_threads = 1  # one instance is one core, as on the device
        options.log_severity_level = 3
        # Without this, CPUs that lack VNNI saturate 16-bit sums and compute other logits.
        options.add_session_config_entry("session.x64quantprecision", "1")
        self._session = self._library.InferenceSession(
            str(self._model), options, providers=["CPUExecutionProvider"]
        )
        self._input = self._session.get_inputs()[0].name

    def run(self, codes: np.ndarray) -> np.ndarray:
        """One call: int8 in, int8 out, NHWC, padded."""
        return self._session.run(None, {self._input: codes})[0]

    def close(self) -> None:
        """Release the instance."""
        del self._session


RUNTIMES = {"onnxruntime": OnnxRuntime}


@dataclass(frozen=True)
class Bundle:
    """The files of a bundle, read and checked."""

    folder: Path
    index: dict
    given: StudentInput
    inputs: TensorSpec
    outputs: TensorSpec

    @property
    def batch(self) -> int:
        """Frames per call."""
        return self.inputs.shape[0]


class Instance:
    """One loaded copy of the model, from float tensors to logits."""

    def __init__(self, bundle: Bundle) -> None:
        kind = RUNTIMES.get(bundle.index["runtime"])
        if kind is None:
            raise CheckError(f"this kdbench has no runtime {bundle.index['runtime']!r}", 5)
        self._bundle = bundle
        self.runtime = kind(bundle.folder / bundle.index["model"])

    def __enter__(self) -> Instance:
        self.runtime.open()
        return self

    def __exit__(self, *error: object) -> None:
        self.runtime.close()

    def logits(self, tensor: np.ndarray) -> np.ndarray:
        """float32 (batch, C, H, W) -> float32 (batch, classes)."""
        codes = self.runtime.run(to_device(tensor, self._bundle.inputs))
        return from_device(codes, self._bundle.outputs).reshape(len(tensor), -1)

    def timed(self, tensor: np.ndarray) -> tuple[int, int]:
        """Nanoseconds of the runtime's call alone, and from tensor to logits."""
        start = time.perf_counter_ns()
        codes = to_device(tensor, self._bundle.inputs)
        before = time.perf_counter_ns()
        result = self.runtime.run(codes)
        after = time.perf_counter_ns()
        from_device(result, self._bundle.outputs)
        return after - before, time.perf_counter_ns() - start

    def all_logits(self, tensors: np.ndarray) -> np.ndarray:
        """Logits of any number of frames; what fills up the last batch is thrown away."""
        batch = self._bundle.batch
        parts = []
        for start in range(0, len(tensors), batch):
            part = tensors[start : start + batch]
            filled = np.concatenate([part, np.repeat(part[-1:], batch - len(part), axis=0)])
            parts.append(self.logits(filled)[: len(part)])
        return np.concatenate(parts)


def open_bundle(folder: Path) -> Bundle:
    """Read bundle.json, verify the digest of every file it lists, and read the rest."""
    try:
        index = json.loads((folder / "bundle.json").read_text())
    except (OSError, ValueError) as error:
        raise CheckError(f"{folder} is not a bundle: {error}", 3) from error
    for name, expected in index["files"].items():
        path = folder / name
        if not path.is_file():
            raise CheckError(f"{name} is missing from the bundle", 3)
        found = hashlib.sha256(path.read_bytes()).hexdigest()
        if found != expected:
            raise CheckError(f"{name} is damaged: expected sha256 {expected}, found {found}", 3)
    contract = load_contract(folder / "preprocessing.json")
    given = StudentInput.load(folder / "student_input.json")
    for name, digest in (
        ("preprocessing.json", contract.sha256),
        ("student_input.json", given.contract),
    ):
        if digest != index["contract"]:
            raise CheckError(f"{name} is of another contract: {digest}, not {index['contract']}", 3)
    return Bundle(
        folder=folder,
        index=index,
        given=given,
        inputs=TensorSpec.from_json(index["inputs"][0]),
        outputs=TensorSpec.from_json(index["outputs"][0]),
    )


def check_golden(bundle: Bundle, instance: Instance) -> list[dict]:
    """The golden images must give the host's tensors, bit for bit, and the host's logits."""
    golden = np.load(bundle.folder / "golden.npz")
    tensors = student_tensor(golden["images"], bundle.given)
    if tensors.shape != golden["tensors"].shape:
        raise CheckError(f"tensors are {tensors.shape}, on the host {golden['tensors'].shape}", 4)
    difference = float(np.abs(tensors - golden["tensors"]).max())
    if difference > 0:
        raise CheckError(f"preprocessing differs from the host's by up to {difference:g}", 4)
    logits = instance.all_logits(tensors)
    steps = float(np.abs(logits - golden["logits"]).max() / bundle.outputs.scale)
    agreed = float((logits.argmax(1) == golden["logits"].argmax(1)).mean())
    if steps > LOGIT_STEPS:
        permuted = np.allclose(np.sort(logits, 1), np.sort(golden["logits"], 1), atol=1e-6)
        raise CheckError(
            f"logits differ from the host's int8 logits by up to {steps:.1f} steps of "
            f"{bundle.outputs.scale:g} (limit {LOGIT_STEPS:g}), top-1 agreement {agreed:.1%}"
            + ("; they are the same numbers in another order: a layout error" if permuted else ""),
            4,
        )
    count = len(tensors)
    return [
        {"name": "digests", "passed": True, "detail": f"{len(bundle.index['files'])} files"},
        {"name": "preprocessing", "passed": True, "detail": f"{count} golden images, equal bits"},
        {
            "name": "logits",
            "passed": True,
            "detail": f"within {steps:g} steps of the host's int8 logits, agreement {agreed:.1%}",
        },
    ]


def single_stream(instance: Instance, tensors: np.ndarray, seconds: float, queries: int) -> dict:
    """One frame after the other, until both minima are reached."""
    warm = time.perf_counter() + min(1.0, seconds)
    warm_up = 0
    while time.perf_counter() < warm:
        instance.timed(tensors[warm_up % len(tensors)])
        warm_up += 1
    run_ns, all_ns = [], []
    start = time.perf_counter()
    while len(all_ns) < queries or time.perf_counter() - start < seconds:
        run, whole = instance.timed(tensors[len(all_ns) % len(tensors)])
        run_ns.append(run)
        all_ns.append(whole)
    return {
        "run_ns": np.array(run_ns, np.int64),
        "all_ns": np.array(all_ns, np.int64),
        "seconds": time.perf_counter() - start,
        "warm_up": warm_up,
    }


def offline(bundle: Bundle, tensors: np.ndarray, seconds: float, instances: int) -> dict:
    """All instances at once, each with its own thread, for the given time."""
    counts = [0] * instances
    opened = [Instance(bundle) for _ in range(instances)]
    begin = threading.Barrier(instances + 1)
    stop = threading.Event()
    failures: list[Exception] = []

    def work(number: int) -> None:
        try:
            with opened[number] as instance:
                instance.logits(tensors[0])
                begin.wait()
                while not stop.is_set():
                    instance.logits(tensors[counts[number] % len(tensors)])
                    counts[number] += 1
        except Exception as error:  # noqa: BLE001 - raised again in the main thread
            failures.append(error)
            begin.abort()

    threads = [threading.Thread(target=work, args=(n,)) for n in range(instances)]
    for thread in threads:
        thread.start()
    with suppress(threading.BrokenBarrierError):  # an instance failed; its error is raised below
        begin.wait()
    start = time.perf_counter()
    while time.perf_counter() - start < seconds and not failures:
        time.sleep(0.01)
    stop.set()
    elapsed = time.perf_counter() - start
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
    return {"frames": sum(counts) * bundle.batch, "seconds": elapsed, "instances": instances}


def summary(ns: np.ndarray, scope: str, measured_on: str) -> dict:
    """Statistics of latencies in ms; a percentile is sorted[floor(q n)], as MLPerf LoadGen's."""
    ms = np.sort(ns) / 1e6
    figures = {
        name: float(ms[math.floor(q * len(ms))]) if len(ms) >= least else None
        for name, (q, least) in PERCENTILES.items()
    }
    return {
        "scope": scope,
        "unit": "ms",
        "measured_on": measured_on,
        "n": len(ms),
        "min": float(ms[0]),
        "mean": float(ms.mean()),
        "std": float(ms.std()),
        **figures,
        "max": float(ms[-1]),
    }


def verdict(seconds: float, queries: int, stream: dict) -> dict:
    """VALID, or SMOKE when less was asked for, or INVALID when less was reached."""
    if seconds < VALID_SECONDS or queries < VALID_QUERIES:
        return {
            "word": "SMOKE",
            "reasons": [
                f"asked for {seconds:g} s and {queries} queries; "
                f"VALID needs {VALID_SECONDS:g} s and {VALID_QUERIES}"
            ],
        }
    reasons = []
    if stream["seconds"] < seconds:
        reasons.append(f"measured {stream['seconds']:.1f} s of {seconds:g} s")
    if len(stream["all_ns"]) < queries:
        reasons.append(f"measured {len(stream['all_ns'])} of {queries} queries")
    return {"word": "INVALID" if reasons else "VALID", "reasons": reasons}


def measure(bundle: Bundle, args: argparse.Namespace) -> tuple[dict, dict]:
    """Everything; returns the document and the raw samples."""
    started = time.time()
    clock = time.perf_counter()
    with Instance(bundle) as instance:
        load_ms = (time.perf_counter() - clock) * 1e3
        on = instance.runtime.measured_on
        checks = check_golden(bundle, instance)
        test = np.load(bundle.folder / "test.npz")
        frames = student_tensor(test["images"][:256], bundle.given)
        groups = np.stack(
            [
                np.resize(np.roll(frames, -i, 0), (bundle.batch, *frames.shape[1:]))
                for i in range(0, len(frames), bundle.batch)
            ]
        )
        stream = single_stream(instance, groups, args.min_seconds, args.min_queries)
        right = 0
        for start in range(0, len(test["labels"]), 1024):
            tensors = student_tensor(test["images"][start : start + 1024], bundle.given)
            logits = instance.all_logits(tensors)
            right += int((logits.argmax(1) == test["labels"][start : start + 1024]).sum())
        version, device = instance.runtime.version, instance.runtime.device
    fit = max(
        1,
        min(
            AIPU_CORES // bundle.batch,
            len(os.sched_getaffinity(0)) if device is None else AIPU_CORES,
        ),
    )
    many = offline(bundle, groups, args.min_seconds, fit)
    count = len(test["labels"])
    document = {
        "schema": SCHEMA,
        "contract": bundle.index["contract"],
        "bundle": hashlib.sha256((bundle.folder / "bundle.json").read_bytes()).hexdigest(),
        "runtime": bundle.index["runtime"],
        "runtime_version": version,
        "measured_on": on,
        "device": device,
        "aipu_cores": bundle.index["aipu_cores"],
        "batch": bundle.batch,
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(started)),
        "host": {
            "python": platform.python_version(),
            "machine": platform.machine(),
            "system": f"{platform.system()} {platform.release()}",
            "cores": len(os.sched_getaffinity(0)),
            "load_at_start": os.getloadavg()[0],
            "clock": "time.perf_counter_ns",
        },
        "checks": checks,
        "load_ms": {"value": load_ms, "unit": "ms", "measured_on": on, "n": 1, "scope": "load"},
        "latency": [
            summary(stream["run_ns"], "runtime call", on),
            summary(stream["all_ns"], "tensor to logits", on),
        ],
        "warm_up_queries": stream["warm_up"],
        "throughput": {
            "value": many["frames"] / many["seconds"],
            "unit": "frames/s",
            "measured_on": on,
            "n": many["frames"],
            "scope": f"tensor to logits, {many['instances']} instances",
        },
        "top1_test": {
            "value": right / count,
            "unit": "fraction",
            "measured_on": on,
            "n": count,
            "scope": "8-bit image to class, whole test split",
        },
        "verdict": verdict(args.min_seconds, args.min_queries, stream),
    }
    samples = {"run_ns": stream["run_ns"], "all_ns": stream["all_ns"]}
    return document, samples


def table(document: dict) -> str:
    """The document for people."""
    on = document["measured_on"]
    lines = [f"{c['name']:<14} ok    {c['detail']}" for c in document["checks"]]
    for row in document["latency"]:
        shown = "  ".join(
            f"{name} {'null' if row[name] is None else format(row[name], '.3f')}"
            for name in ("p50", "p90", "p99")
        )
        lines.append(f"latency        {shown} ms  n {row['n']}  [{row['scope']}; {on}]")
    rate, right = document["throughput"], document["top1_test"]
    lines.append(
        f"throughput     {rate['value']:.1f} frames/s  n {rate['n']}  [{rate['scope']}; {on}]"
    )
    lines.append(f"top-1 (test)   {right['value']:.4f}  n {right['n']}  [{right['scope']}; {on}]")
    word = document["verdict"]
    lines.append(f"verdict        {word['word']}  {'; '.join(word['reasons'])}".rstrip())
    return "\n".join(lines)


def main() -> int:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle", nargs="?", type=Path, default=Path(__file__).resolve().parent)
    parser.add_argument("--min-seconds", type=float, default=VALID_SECONDS)
    parser.add_argument("--min-queries", type=int, default=VALID_QUERIES)
    parser.add_argument("--samples", type=Path, help="write every latency, in ns, to this .npz")
    parser.add_argument("--json", action="store_true", help="print the JSON document only")
    args = parser.parse_args()
    try:
        document, samples = measure(open_bundle(args.bundle), args)
    except CheckError as error:
        print(f"Error: {error}", file=sys.stderr)
        return error.status
    if args.samples:
        np.savez(args.samples, **samples)
    if not args.json:
        print(table(document))
    print(json.dumps(document))
    return 7 if document["verdict"]["word"] == "INVALID" else 0


if __name__ == "__main__":
    sys.exit(main())
