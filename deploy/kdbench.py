"""Check a bundle on the machine that runs it, then measure it there.

    python kdbench.py [BUNDLE] [--scenario single-stream|offline|both] [--min-seconds S] [--mlperf]
                      [--soak] [--device NAME] [--samples FILE] [--json]

In this order: digests of every file; the contract applied to the golden images gives the golden
tensors; the model gives the host's int8 logits; accuracy over the whole test split; the same sample
repeated against samples never seen; warm-up; latency (SingleStream: the next query starts after the
answer); throughput (Offline: as many instances as fit, single and, where the device has it, double
buffering). Prints a table and, as the very last line, one JSON document.

Needs Python 3.10, numpy, one runtime, and what lies beside it in the bundle. Nothing of kdpipe.

Exit status: 0 done; 1 the model does not load; 2 wrong words; 3 a file is damaged or missing; 4 the
tensors or the logits differ; 5 the runtime is not installed; 6 no device, or it is busy or unwell;
7 the measurement is INVALID.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.dont_write_bytecode = True  # a bundle stays what was written, no more

try:
    import numpy as np
except ImportError as error:
    print(f"Error: numpy does not load ({error}):  pip install numpy", file=sys.stderr)
    sys.exit(5)

try:
    from kdbench_audit import repeat_samples
    from kdbench_bundle import CheckError, open_bundle
    from kdbench_figures import VALID_QUERIES, VALID_SAMPLES, VALID_SECONDS
    from kdbench_heat import Watch, read_heat
    from kdbench_instance import Instance, batches
    from kdbench_load import Minima, offline, single_stream
    from kdbench_machine import describe_host, read_driver, read_link
    from kdbench_report import RawResults, describe, format_value, raw_samples, table
    from kdbench_runtime import open_runtime
    from preprocessing.apply import student_tensor
    from preprocessing.scores import decide
except (ImportError, SyntaxError) as error:
    print(f"Error: what lies beside kdbench.py is damaged: {error}", file=sys.stderr)
    sys.exit(3)

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from kdbench_bundle import Bundle
    from kdbench_load import OfflineResult
    from kdbench_runtime import Runtime

#: MLPerf Inference's minimum since 1.0; 60 s before.
MLPERF_SECONDS = 600.0

#: What a box in the field does: load that does not end.
SOAK_MINUTES = 30.0

#: Different frames in the load.
_FRAMES = 256


def check_golden(bundle: Bundle, instance: Instance, limit: float) -> list[dict[str, Any]]:
    """The golden images must give the host's tensors, bit for bit, and the host's logits.

    Raises:
        CheckError: status 4.
    """
    golden = bundle.arrays("golden.npz")
    tensors = student_tensor(golden["images"], bundle.given)
    if tensors.shape != golden["tensors"].shape:
        raise CheckError(f"tensors are {tensors.shape}, on the host {golden['tensors'].shape}", 4)
    difference = float(np.abs(tensors - golden["tensors"]).max())
    if difference > 0:
        raise CheckError(f"preprocessing differs from the host's by up to {difference:g}", 4)
    logits, wanted = instance.all_logits(tensors), golden["logits"]
    if logits.shape != wanted.shape:
        raise CheckError(f"logits are {logits.shape}, on the host {wanted.shape}", 4)
    steps = float(np.abs(logits - wanted).max() / bundle.outputs.scale)
    agreed = float((decide(logits) == decide(wanted)).mean())
    if not steps <= limit:
        permuted = np.allclose(np.sort(logits, 1), np.sort(wanted, 1), atol=1e-6)
        raise CheckError(
            f"logits differ from the host's int8 logits by up to {steps:.1f} steps of "
            f"{bundle.outputs.scale:g} (limit {limit:g}), top-1 agreement {agreed:.1%}"
            + ("; they are the same numbers in another order: a layout error" if permuted else ""),
            4,
        )
    equal = float((logits == wanted).mean())
    details = {
        "digests": f"{len(bundle.index['files'])} files",
        "preprocessing": f"{len(tensors)} golden images, equal bits",
        "logits": f"within {steps:g} steps of the host's int8 logits (limit {limit:g}), "
        f"{equal:.1%} of them equal, agreement {agreed:.1%}",
    }
    return [{"name": n, "passed": True, "detail": detail} for n, detail in details.items()]


def measure(bundle: Bundle, runtime: Runtime, args: argparse.Namespace, watch: Watch) -> RawResults:
    """Everything, in the order that the docstring of this program tells.

    Raises:
        CheckError: a check failed, or the device did.
    """
    result = RawResults(watch, begin_ns=time.perf_counter_ns())
    test = bundle.arrays("test.npz")
    minima = Minima(args.min_seconds, args.min_queries, args.min_samples, args.max_seconds)
    clock = time.perf_counter()
    with Instance(bundle, runtime) as instance:
        result.load_ms = (time.perf_counter() - clock) * 1e3
        groups = batches(student_tensor(test["images"][:_FRAMES], bundle.given), bundle.batch)
        clock = time.perf_counter()
        instance.query(groups[0])
        result.first_ms = (time.perf_counter() - clock) * 1e3
        result.checks = check_golden(bundle, instance, args.max_steps)
        result.expected = np.stack([instance.query(group).copy() for group in groups])
        parts = []
        for start in range(0, len(test["labels"]), 1024):
            tensors = student_tensor(test["images"][start : start + 1024], bundle.given)
            parts.append(decide(instance.all_logits(tensors)))
        result.classes = np.concatenate(parts)
        result.repetition = repeat_samples(instance, groups, minima.seconds)
    for repeat in range(args.repeats):
        if args.scenario != "offline":
            _say(f"SingleStream, {minima.seconds:g} s")
            with Instance(bundle, runtime) as instance:
                result.streams.append(single_stream(instance, groups, minima))
        if args.scenario != "single-stream":
            ways = [False, True] if runtime.double_buffer else [False]
            # In mirrored order, so that a drift of the machine hits both alike.
            for double in ways[:: -1 if repeat % 2 else 1]:
                _say(f"Offline, {minima.seconds:g} s, {'double' if double else 'single'} buffering")
                offline_run = offline(bundle, runtime, groups, minima, double_buffer=double)
                result.offline_runs.setdefault(double, []).append(offline_run)
    if args.soak:
        result.soak = soak(bundle, runtime, groups, args.soak, watch)
    return result


def soak(
    bundle: Bundle, runtime: Runtime, groups: NDArray[np.float32], minutes: float, watch: Watch
) -> OfflineResult:
    """Offline load for a long time; a line per minute."""
    said = 0

    def tick(seconds: float, frames: int) -> None:
        nonlocal said
        if seconds >= 60.0 * (said + 1):
            said += 1
            degrees = [r.temperature_c for r in watch.readings()[-1:]]
            _say(
                f"soak, minute {said}: {frames / seconds:.1f} frames/s so far, "
                f"{format_value(degrees[0] if degrees else None, ' C')}  [{runtime.measured_on}]"
            )

    minima = Minima(60.0 * minutes, 1, 1)
    return offline(bundle, runtime, groups, minima, double_buffer=runtime.double_buffer, tick=tick)


def _say(words: str) -> None:
    print(f"kdbench: {words}", file=sys.stderr, flush=True)


def parse(words: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("bundle", nargs="?", type=Path, default=Path(__file__).resolve().parent)
    add("--scenario", choices=("single-stream", "offline", "both"), default="both")
    add("--min-seconds", type=_positive, default=VALID_SECONDS, help="per scenario")
    add("--min-queries", type=int, default=VALID_QUERIES, help="of SingleStream")
    add("--min-samples", type=int, default=VALID_SAMPLES, help="of Offline, in frames")
    add("--max-seconds", type=_positive, help="give up on a scenario that takes longer")
    add("--mlperf", action="store_true", help=f"--min-seconds {MLPERF_SECONDS:g}, as MLPerf asks")
    add("--repeats", type=int, default=1, help="measure this often; 3 or more give a spread")
    add("--soak", nargs="?", type=_positive, const=SOAK_MINUTES, default=0.0, metavar="MINUTES")
    add("--device", help="name of the device, as axdevice shows it")
    add("--max-steps", type=_positive, help="how far logits may be from the host's, in int8 steps")
    add("--samples", type=Path, help="write every time and answer to this .npz")
    add("--sysfs", type=Path, default=Path("/sys"), help="where the host's /sys is mounted")
    add("--json", action="store_true", help="print the JSON document only")
    args = parser.parse_args(words)
    if min(args.min_queries, args.min_samples, args.repeats) < 1:
        parser.error("--min-queries, --min-samples and --repeats are at least 1")
    if args.mlperf:
        args.min_seconds = max(args.min_seconds, MLPERF_SECONDS)
        args.min_queries = max(args.min_queries, VALID_QUERIES)
        args.min_samples = max(args.min_samples, VALID_SAMPLES)
    return args


def _positive(word: str) -> float:
    value = float(word)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{word} is not above 0")
    return value


def main() -> int:
    """Parse, measure, print."""
    args = parse()
    started = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    try:
        bundle = open_bundle(args.bundle)
        if args.max_steps is None:
            args.max_steps = bundle.index["limits"]["logit_steps"]
        runtime = open_runtime(bundle, args.device)
        try:
            name = runtime.device["name"] if runtime.device else None
            conditions: dict[str, Any] = {
                "started": started,
                "host": describe_host(args.sysfs),
                "driver": read_driver(name),
                "link": read_link(name, args.sysfs),
                "heat_before": read_heat(name, runtime.configuration()),
            }
            with Watch(name, conditions["heat_before"]) as watch:
                result = measure(bundle, runtime, args, watch)
            conditions["heat_after"] = read_heat(name, runtime.configuration())
            document = describe(bundle, runtime, args, result, conditions)
        finally:
            runtime.close()
    except CheckError as error:
        print(f"Error: {error}", file=sys.stderr)
        return error.status
    except KeyboardInterrupt:
        print("Error: interrupted", file=sys.stderr)
        return 130
    if args.samples:
        np.savez(args.samples, allow_pickle=False, **raw_samples(bundle, result))
    if not args.json:
        print(table(document))
    print(json.dumps(document))
    return 7 if document["verdict"]["word"] == "INVALID" else 0


if __name__ == "__main__":
    sys.exit(main())
