"""What one run of kdbench amounts to: the JSON document, the raw samples, the table. numpy only."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from kdbench_figures import accuracy, judge, stability, summary, throughput
from kdbench_load import Minima
from kdbench_machine import machine_faults

if TYPE_CHECKING:
    import argparse

    from numpy.typing import NDArray

    from kdbench_bundle import Bundle
    from kdbench_load import Flood, Stream
    from kdbench_runtime import Runtime

SCHEMA = 2


@dataclass
class Measured:
    """Raw results of one run of this program."""

    load_ms: float = 0.0
    first_ms: float = 0.0
    checks: list[dict[str, Any]] = field(default_factory=list)
    streams: list[Stream] = field(default_factory=list)
    floods: dict[bool, list[Flood]] = field(default_factory=dict)  # by double buffering
    soak: list[dict[str, Any]] = field(default_factory=list)
    classes: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))
    expected: NDArray[np.float32] = field(default_factory=lambda: np.empty(0, np.float32))


def describe(
    bundle: Bundle,
    runtime: Runtime,
    args: argparse.Namespace,
    result: Measured,
    around: dict[str, Any],
) -> dict[str, Any]:
    """The document: identity, figures with their origin, what was around, verdict."""
    on, test = runtime.measured_on, bundle.arrays("test.npz")
    found = accuracy(result.classes, test["labels"], test["float_classes"])
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
    ways = [throughput(floods, on) for floods in result.floods.values()]
    best = max(result.floods.values(), key=lambda f: throughput(f, on)["value"], default=[])
    audit = _audit(result)
    faults = [
        *machine_faults(around["link"], around["heat_before"], around["heat_after"]),
        *_accuracy_faults(found, bundle.index["limits"]["accuracy_loss_points"]),
        *(
            f"{a['different']} of {a['kept']} kept answers of {a['scope']} differ"
            for a in audit
            if a["different"]
        ),
    ]
    minima = Minima(args.min_seconds, args.min_queries, args.min_samples)
    every_flood = [flood for floods in result.floods.values() for flood in floods]
    return {
        "schema": SCHEMA,
        "contract": bundle.index["contract"],
        "bundle": hashlib.sha256((bundle.folder / "bundle.json").read_bytes()).hexdigest(),
        "test_set": bundle.index["files"]["test.npz"],
        "model": bundle.index["model_digest"],
        "runtime": bundle.index["runtime"],
        "runtime_version": runtime.version,
        "measured_on": on,
        "device": runtime.device,
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
            "repeats": args.repeats,
        },
        **around,
        "checks": result.checks,
        "load_ms": _figure(result.load_ms, "ms", on, 1, "load"),
        "first_inference_ms": _figure(result.first_ms, "ms", on, 1, "first call, tensor to logits"),
        "latency": latency,
        "overhead_share": _figure(
            latency[2]["p50"] / latency[0]["p50"], "fraction", on, len(all_ns),
            "p50 around the runtime call / p50 of the runtime call",
        ) if latency else None,
        "warm_up_queries": sum(s.warm_up for s in result.streams),
        "throughput": throughput(best, on) if best else None,
        "throughput_modes": ways,
        "stability": stability(result.streams, best),
        "audit": audit,
        "top1_test": _figure(
            found["top1"],
            "fraction",
            on,
            len(test["labels"]),
            "8-bit image to class, whole test split",

        ),
        "accuracy": {
            **{k: v for k, v in found.items() if k != "top1"},
            "limit_points": bundle.index["limits"]["accuracy_loss_points"],
            "measured_on": on,
        },
        "soak": result.soak,
        "verdict": judge(minima, result.streams, every_flood, faults),
    }  # fmt: skip


def _figure(value: float, unit: str, on: str, n: int, scope: str) -> dict[str, Any]:
    return {"value": value, "unit": unit, "measured_on": on, "n": n, "scope": scope}


def _audit(result: Measured) -> list[dict[str, Any]]:
    """Answers kept while measuring against those of an instance that did nothing else."""
    kept = [("SingleStream", [stream.answers]) for stream in result.streams]
    for double, floods in result.floods.items():
        scope = f"Offline, {'double' if double else 'single'} buffering"
        kept += [(scope, flood.answers) for flood in floods]
    rows: dict[str, dict[str, Any]] = {}
    for scope, some in kept:
        row = rows.setdefault(scope, {"scope": scope, "kept": 0, "different": 0})
        row["kept"] += sum(len(answers.kept) for answers in some)
        row["different"] += sum(answers.different(result.expected) for answers in some)
    return list(rows.values())


def _accuracy_faults(found: dict[str, float], limit: float) -> list[str]:
    if found["loss_low"] <= limit:
        return []
    return [
        f"accuracy: {found['loss_points']:.2f} points of top-1 below the float student, at least "
        f"{found['loss_low']:.2f} (limit {limit:g})"
    ]


def raw_samples(bundle: Bundle, result: Measured) -> dict[str, NDArray[Any]]:
    """Every time and every answer that a printed figure comes from."""
    test = bundle.arrays("test.npz")
    samples: dict[str, NDArray[Any]] = {
        "test_classes": result.classes,
        "test_labels": test["labels"],
        "test_float_classes": test["float_classes"],
    }
    for name in ("run_ns", "all_ns") if result.streams else ():
        samples[name] = np.concatenate([getattr(stream, name) for stream in result.streams])
    if result.streams:
        samples["repeat_ends"] = np.cumsum([len(stream.all_ns) for stream in result.streams])
    for double, floods in result.floods.items():
        for repeat, flood in enumerate(floods):
            name = f"offline_{'double' if double else 'single'}_{repeat}_done_ns"
            samples[name] = flood.done_ns
    return samples


def table(document: dict[str, Any]) -> str:
    """The document for people."""
    on = document["measured_on"]
    lines = [f"{c['name']:<14} ok    {c['detail']}" for c in document["checks"]]
    for row in document["latency"]:
        words = "  ".join(f"{name} {shown(row[name], '', 3)}" for name in ("p50", "p90", "p99"))
        bound = shown(row["bounds"]["p99"], "", 3)
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
            f"{shown(row['temperature_c'], ' C')}  [{on}]"
        )
    right, loss = document["top1_test"], document["accuracy"]
    lines.append(f"top-1 (test)   {right['value']:.4f}  n {right['n']}  [{right['scope']}; {on}]")
    lines.append(
        f"               {loss['loss_points']:+.2f} points below the float student, 95 % interval "
        f"{loss['loss_low']:+.2f} to {loss['loss_high']:+.2f}, agreement {loss['agreement']:.4f}"
    )
    heat, link = document["heat_after"], document["link"]
    lines.append(
        f"device         {(document['device'] or {}).get('name', 'none')}, temperature "
        f"{shown(heat['temperature_c'], ' C')}, power {shown(heat['power_w'], ' W')}, link x"
        f"{shown(link['width'], '', 0)}" + (f" ({link['reason']})" if link["reason"] else "")
    )
    word = document["verdict"]
    lines.append(f"verdict        {word['word']}  {'; '.join(word['reasons'])}".rstrip())
    return "\n".join(lines)


def shown(value: float | None, unit: str, digits: int = 1) -> str:
    """A number with its unit, or the word null."""
    return "null" if value is None else f"{value:.{digits}f}{unit}"
