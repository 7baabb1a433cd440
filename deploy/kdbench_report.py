"""What one run of kdbench amounts to: the JSON document, the raw samples, the table. numpy only."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from kdbench_audit import Repetition, caching, caching_faults
from kdbench_figures import accuracy, judge, per_interval, stability, summary, throughput
from kdbench_load import WARM_UP_SECONDS, Minima
from kdbench_machine import machine_faults

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from kdbench_bundle import Bundle
    from kdbench_heat import Watch
    from kdbench_load import OfflineResult, SingleStreamResult
    from kdbench_runtime import Runtime

SCHEMA = 3


@dataclass
class RawResults:
    """Raw results of one run of this program."""

    watch: Watch
    begin_ns: int = 0  # of time.perf_counter_ns; zero of all times in the document
    load_ms: float = 0.0
    first_ms: float = 0.0
    checks: list[dict[str, Any]] = field(default_factory=list)
    streams: list[SingleStreamResult] = field(default_factory=list)
    #: By double buffering.
    offline_runs: dict[bool, list[OfflineResult]] = field(default_factory=dict)
    repetition: Repetition | None = None
    soak: OfflineResult | None = None
    classes: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))
    expected: NDArray[np.float32] = field(default_factory=lambda: np.empty(0, np.float32))


def describe(
    bundle: Bundle,
    runtime: Runtime,
    args: argparse.Namespace,
    result: RawResults,
    conditions: dict[str, Any],
) -> dict[str, Any]:
    """The document: identity, figures with their origin, what was around, verdict."""
    on, test = runtime.measured_on, bundle.arrays("test.npz")
    task = bundle.index["task"]
    score, loss = accuracy(task, result.classes, test["labels"], test["float_classes"])
    latency = []
    if result.streams:
        run_ns, all_ns = (
            np.concatenate([getattr(s, name) for s in result.streams])
            for name in ("run_ns", "all_ns")
        )
        latency = [
            summary(run_ns, "runtime call", on),
            summary(all_ns, "tensor to logits", on),
            summary(all_ns - run_ns, "around the runtime call", on),
        ]
    ways = [throughput(offline_runs, on) for offline_runs in result.offline_runs.values()]
    best = max(result.offline_runs.values(), key=lambda f: throughput(f, on)["value"], default=[])
    audit, watched = _audit(result), result.watch.describe()
    assert result.repetition is not None
    repeated = caching(result.repetition, on)
    heat = (conditions["heat_before"], watched, conditions["heat_after"])
    faults = [
        *machine_faults(conditions["link"], *heat),
        *_accuracy_faults(loss, bundle.index["limits"]["accuracy_loss_points"]),
        *(
            f"{a['different']} of {a['kept']} kept answers of {a['scope']} differ from those of an "
            "idle instance; their times are of no use, measure with another release of the runtime"
            for a in audit
            if a["different"]
        ),
        *caching_faults(repeated),
    ]
    minima = Minima(args.min_seconds, args.min_queries, args.min_samples)
    all_offline_runs = [
        offline_run for offline_runs in result.offline_runs.values() for offline_run in offline_runs
    ]
    return {
        "schema": SCHEMA,
        "contract": bundle.index["contract"],
        "bundle": hashlib.sha256((bundle.folder / "bundle.json").read_bytes()).hexdigest(),
        "test_set": bundle.index["files"]["test.npz"],
        "model": bundle.index["model_digest"],
        "runtime": bundle.index["runtime"],
        "runtime_version": runtime.version,
        "compiled_by": bundle.index["backend"],
        "measured_on": on,
        "device": runtime.device,
        "instance_options": runtime.options,
        "aipu_cores": bundle.index["aipu_cores"],
        "batch": bundle.batch,
        "instances": runtime.instances,
        "host_graphs": {end: bool(bundle.index[end]) for end in ("preamble", "postamble")},
        "rules": {
            "name": "MLPerf-style" if args.mlperf else "kdpipe",
            "scenario": args.scenario,
            "min_seconds": args.min_seconds,
            "min_queries": args.min_queries,
            "min_samples": args.min_samples,
            "warm_up_seconds": min(WARM_UP_SECONDS, args.min_seconds),
            "repeats": args.repeats,
        },
        **conditions,
        "heat_during": watched,
        "checks": result.checks,
        "load_ms": _figure(result.load_ms, "ms", on, 1, "load"),
        "first_inference_ms": _figure(result.first_ms, "ms", on, 1, "first call, tensor to logits"),
        "latency": latency,
        "overhead_share": _figure(
            latency[2]["p50"] / latency[0]["p50"], "fraction", on, len(all_ns),
            "p50 around the runtime call / p50 of the runtime call",
        ) if latency else None,
        "passes": _passes(result, on),
        "throughput": throughput(best, on) if best else None,
        "throughput_modes": ways,
        "stability": stability(result.streams, best),
        "audit": audit,
        "repetition": repeated,
        "top1_test": _figure(
            score.value, "fraction", on, score.n, "8-bit image to class, whole test split"
        ),
        "accuracy": {
            **loss,
            "limit_points": bundle.index["limits"]["accuracy_loss_points"],
            "measured_on": on,
        },
        "soak": _minutes(result, on),
        "verdict": judge(minima, result.streams, all_offline_runs, faults),
    }  # fmt: skip


def _figure(value: float, unit: str, measured_on: str, n: int, scope: str) -> dict[str, Any]:
    return {"value": value, "unit": unit, "measured_on": measured_on, "n": n, "scope": scope}


def _passes(result: RawResults, measured_on: str) -> list[dict[str, Any]]:
    """Every scenario that ran, in time's order: when, how much, how hot, at which power."""
    rows = []
    scenarios: list[tuple[str, Sequence[SingleStreamResult | OfflineResult]]] = [
        ("SingleStream", result.streams)
    ]
    for double, offline_runs in result.offline_runs.items():
        scenarios.append((f"Offline, {'double' if double else 'single'} buffering", offline_runs))
    for scenario, runs in scenarios:
        for repeat, run in enumerate(runs):
            start, end = run.start_ns, run.start_ns + int(run.seconds * 1e9)
            heat = result.watch.between(start, end)
            watts = heat["power_w"]
            rows.append(
                {
                    "scenario": scenario,
                    "repeat": repeat,
                    "start_s": (start - result.begin_ns) / 1e9,
                    "seconds": run.seconds,
                    "frames": run.frames,
                    "warm_up_queries": run.warm_up,
                    **heat,
                    "energy_mj": None if watts is None else 1e3 * watts * run.seconds / run.frames,
                    "measured_on": measured_on,
                }
            )
    return sorted(rows, key=lambda row: float(row["start_s"]))


def _minutes(result: RawResults, measured_on: str) -> list[dict[str, Any]]:
    """The soak, minute by minute."""
    if result.soak is None:
        return []
    minute_ns = 60 * 10**9
    start = result.soak.start_ns
    return [
        {
            "minute": n + 1,
            "value": rate,
            "unit": "frames/s",
            "measured_on": measured_on,
            **result.watch.between(start + n * minute_ns, start + (n + 1) * minute_ns),
        }
        for n, rate in enumerate(per_interval(result.soak.done_ns, result.soak.batch, 60.0))
    ]


def _audit(result: RawResults) -> list[dict[str, Any]]:
    """Answers kept while measuring against those of an instance that did nothing else."""
    answers_by_scope = [("SingleStream", [stream.answers]) for stream in result.streams]
    for double, offline_runs in result.offline_runs.items():
        scope = f"Offline, {'double' if double else 'single'} buffering"
        answers_by_scope += [(scope, offline_run.answers) for offline_run in offline_runs]
    rows: dict[str, dict[str, Any]] = {}
    for scope, runs in answers_by_scope:
        row = rows.setdefault(scope, {"scope": scope, "kept": 0, "different": 0})
        row["kept"] += sum(len(answers.kept) for answers in runs)
        row["different"] += sum(answers.different(result.expected) for answers in runs)
    return list(rows.values())


def _accuracy_faults(loss: dict[str, float], limit: float) -> list[str]:
    if loss["loss_low"] <= limit:
        return []
    return [
        f"accuracy: {loss['loss_points']:.2f} points of top-1 below the float student, at least "
        f"{loss['loss_low']:.2f} (limit {limit:g}); calibrate with more patches or another scheme"
    ]


def raw_samples(bundle: Bundle, result: RawResults) -> dict[str, NDArray[Any]]:
    """Every time, reading and answer that a printed figure comes from.

    Times of the device's heat and of each start are in ns since the measurement began.
    """
    test, readings = bundle.arrays("test.npz"), result.watch.readings()
    assert result.repetition is not None
    samples: dict[str, NDArray[Any]] = {
        "test_classes": result.classes,
        "test_labels": test["labels"],
        "test_float_classes": test["float_classes"],
        "repetition_distinct_ns": result.repetition.distinct_ns,
        "repetition_same_ns": result.repetition.same_ns,
        "heat_ns": np.array([r.at_ns - result.begin_ns for r in readings], np.int64),
        "heat_c": np.array([r.temperature_c for r in readings], np.float64),  # None becomes NaN
        "heat_w": np.array([r.power_w for r in readings], np.float64),
    }
    for name in ("run_ns", "all_ns") if result.streams else ():
        samples[name] = np.concatenate([getattr(stream, name) for stream in result.streams])
    if result.streams:
        samples["repeat_ends"] = np.cumsum([len(stream.all_ns) for stream in result.streams])
        starts = [stream.start_ns - result.begin_ns for stream in result.streams]
        samples["repeat_starts_ns"] = np.array(starts, np.int64)
    for double, offline_runs in result.offline_runs.items():
        for repeat, offline_run in enumerate(offline_runs):
            name = f"offline_{'double' if double else 'single'}_{repeat}_done_ns"
            samples[name] = offline_run.done_ns
    if result.soak is not None:
        samples["soak_done_ns"] = result.soak.done_ns
    return samples


def table(document: dict[str, Any]) -> str:
    """The document for people."""
    on = document["measured_on"]
    lines = [f"{c['name']:<14} ok    {c['detail']}" for c in document["checks"]]
    for row in document["latency"]:
        words = "  ".join(
            f"{name} {format_value(row[name], '', 3)}" for name in ("p50", "p90", "p99")
        )
        bound = format_value(row["bounds"]["p99"], "", 3)
        lines.append(
            f"latency        {words} (99 % sure: below {bound}) ms  n {row['n']}  "
            f"[{row['scope']}; {on}]"
        )
    for rate in document["throughput_modes"]:
        lines.append(
            f"throughput     {rate['value']:.1f} frames/s  n {rate['n']}  [{rate['scope']}; {on}]"
        )
    for row in document["soak"]:
        lines.append(
            f"soak           minute {row['minute']:>3}  {row['value']:.1f} frames/s  "
            f"{format_value(row['hottest_c'], ' C')}  [{on}]"
        )
    right, loss = document["top1_test"], document["accuracy"]
    lines.append(f"top-1 (test)   {right['value']:.4f}  n {right['n']}  [{right['scope']}; {on}]")
    lines.append(
        f"               {loss['loss_points']:+.2f} points below the float student, 95 % interval "
        f"{loss['loss_low']:+.2f} to {loss['loss_high']:+.2f}, agreement {loss['agreement']:.4f}"
    )
    same = document["repetition"]
    lines.append(
        f"same sample    distinct ones take {same['value']:.2f} times its time, {same['low']:.2f} "
        f"to {same['high']:.2f}, limit {same['limit']:g}  n {same['n']}  [{on}]"
    )
    heat, link = document["heat_during"], document["link"]
    watts = [row["power_w"] for row in document["passes"] if row["power_w"] is not None]
    lines.append(
        f"device         {(document['device'] or {}).get('name', 'none')}, at most "
        f"{format_value(heat['hottest_c'], ' C')} and "
        f"{format_value(max(watts, default=None), ' W')}"
        + (f" ({heat['reason']})" if heat["reason"] else "")
        + (", link null" if link["width"] is None else f", link x{link['width']}")
        + (f" ({link['reason']})" if link["reason"] else "")
    )
    word = document["verdict"]
    lines.append(f"verdict        {word['word']}  {'; '.join(word['reasons'])}".rstrip())
    return "\n".join(lines)


def format_value(value: float | None, unit: str, digits: int = 1) -> str:
    """A number with its unit, or the word null."""
    return "null" if value is None else f"{value:.{digits}f}{unit}"
