"""What int8 keeps of a network, and what calibration costs, against onnxruntime, NNCF and Quark.

    python benchmarks/calibration.py [--samples 16,64,256] [--crops 512] [--only METHOD,...]
        [--nncf-python PATH] [--quark-python PATH] [--students]

EfficientNet-Lite0 with its ImageNet weights on photographs (`calibration_photos.py` says what to
install). Every method calibrates in a process of its own, on one core, from crops that it reads one
by one; all int8 files are run by the same onnxruntime session, whose integer sums do not saturate,
on crops of other photographs. "dB" is the logits' signal to quantization noise ratio against float,
"agreement" how often int8 and float choose the same class. It has no labels: it asks how well int8
repeats float, not how well the network sees. `--students` trains students on real Landsat patches
and compares top-1. NNCF and Quark need environments of their own:

    python -m venv nncf; nncf/bin/pip install nncf==3.4.0 onnx==1.23.2 onnxruntime==1.31.1
    python -m venv quark
    quark/bin/pip install amd-quark==0.13 torch "onnx<1.22" onnxruntime==1.31.1

Linux only (memory is read from /proc). Takes about fifteen minutes on two cores.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path

import numpy as np
import onnx
from calibration_methods import METHODS
from calibration_photos import CALIBRATION, EVALUATION, crops, save_lite0
from scipy.special import rel_entr, softmax

from metis.emulator.kernels import EXACT, kernels_are_exact
from metis.graph.sessions import open_session
from metis.quantize.folding import prepare
from preprocessing.scores import Comparison, decide

CHILD = Path(__file__).with_name("calibration_methods.py")
HEADER = """| method | samples | dB | agreement | KL | CPU s | MB above a float session |
|---|---|---|---|---|---|---|"""

#: A bar compares the CPU seconds of these two: they are measured in turns, and the median counts.
TIMED = ("kdpipe", "onnxruntime MinMax")
TURNS = 3
SPEED_TURNS = 25

#: Methods with an interpreter of their own, and the option that names it.
FOREIGN = {"NNCF": "nncf_python", "Quark MinMax": "quark_python"}


@dataclass(frozen=True)
class Row:
    """One method after one number of samples."""

    method: str
    samples: int
    cpu_s: float
    extra_mb: float = float("nan")
    stopped: str = ""  # why there is no int8 file
    db: float = float("nan")
    agreed: float = float("nan")  # 0..1
    kl: float = float("nan")

    def __str__(self) -> str:
        start = f"| {self.method} | {self.samples} |"
        if self.stopped:
            return f"{start} {self.stopped} | | | {self.cpu_s:.1f} | |"
        fidelity = f"{self.db:.1f} | {100 * self.agreed:.1f} % | {self.kl:.4f}"
        return f"{start} {fidelity} | {self.cpu_s:.1f} | {self.extra_mb:.0f} |"


@dataclass(frozen=True)
class Bar:
    """Something that is promised, and whether it was so."""

    promise: str
    found: str
    kept: bool

    def __str__(self) -> str:
        return f"{'yes' if self.kept else 'NO '} {self.promise}: {self.found}"


def main() -> None:
    """Measure and print."""
    given = options()
    samples = [int(number) for number in given.samples.split(",")]
    wanted = given.only.split(",") if given.only else list(METHODS)
    if unknown := set(wanted) - set(METHODS):
        sys.exit(f"--only: no method {', '.join(unknown)}; there are: {', '.join(METHODS)}")
    print(f"onnxruntime {version('onnxruntime')}, int8 kernels exact: {kernels_are_exact()}")
    with tempfile.TemporaryDirectory(prefix="kdpipe-") as folder:
        root = Path(folder)
        model = root / "lite0.onnx"
        save_lite0(model)
        save_crops(root / "crops", max(samples))
        frames = list(crops(EVALUATION, given.crops, seed=1))
        exact = answers(model, frames)
        print(f"\nEfficientNet-Lite0, {len(frames)} crops of other photographs\n\n{HEADER}")
        rows = []
        for method in wanted:
            if method in FOREIGN and not getattr(given, FOREIGN[method]):
                print(f"| {method} | not asked for: --{FOREIGN[method].replace('_', '-')} PATH |")
                continue
            python = getattr(given, FOREIGN[method]) if method in FOREIGN else sys.executable
            for count in samples:
                into = root / f"{method}-{count}.onnx".replace(" ", "-")
                row = calibrated(python, method, model, root / "crops", count, into)
                rows.append(judged(row, into, frames, exact))
                print(rows[-1], flush=True)
        found = bars(timed(rows, model, root))
        if (int8 := root / f"kdpipe-{samples[0]}.onnx").is_file():
            print_speed(model, int8)
    if given.students:
        from calibration_students import measure_students

        found += [Bar(*bar) for bar in measure_students()]
    print("\n" + "\n".join(map(str, found)))


def options() -> argparse.Namespace:
    """What was asked for."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--samples", default="16,64,256")
    parser.add_argument("--crops", type=int, default=512)
    parser.add_argument("--only", help=", ".join(METHODS))
    parser.add_argument("--nncf-python", help="interpreter of an environment with NNCF")
    parser.add_argument("--quark-python", help="interpreter of an environment with AMD Quark")
    parser.add_argument("--students", action="store_true")
    return parser.parse_args()


def save_crops(folder: Path, count: int) -> None:
    """Write calibration crops, one file each."""
    folder.mkdir()
    for number, crop in enumerate(crops(CALIBRATION, count, seed=0)):
        np.save(folder / f"{number:05d}.npy", crop)


def calibrated(python: str, method: str, model: Path, folder: Path, count: int, into: Path) -> Row:
    """Calibrate in a process; what it says about itself."""
    command = [python, CHILD, method, model, folder, str(count), into]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder.parent)
    if done.returncode:
        sys.exit(f"{method}, {count} samples: {done.stderr[-2000:]}")
    return Row(method, count, **json.loads(done.stdout.splitlines()[-1]))


def answers(model: Path, frames: list[np.ndarray]) -> np.ndarray:
    """Logits (N, classes) with integer sums that do not saturate."""
    session = open_session(model, options=EXACT)
    name = session.get_inputs()[0].name
    return np.concatenate([session.run(None, {name: frame})[0] for frame in frames])


def judged(row: Row, int8: Path, frames: list[np.ndarray], exact: np.ndarray) -> Row:
    """The row with what its int8 file keeps of the float logits."""
    if row.stopped:
        return row
    logits = answers(int8, frames)
    comparison = Comparison("classification", len(exact))
    comparison.add(exact, logits, decide(exact))
    kl = rel_entr(softmax(exact, axis=1), softmax(logits, axis=1)).sum(axis=1).mean()
    db = comparison.sqnr_db()
    return replace(
        row, db=np.inf if db is None else db, agreed=comparison.agreement(), kl=float(kl)
    )


def timed(rows: list[Row], model: Path, root: Path) -> list[Row]:
    """The rows, with the median CPU seconds of runs in turns for the two that a bar compares."""
    both = [row for row in rows if row.method in TIMED]
    if {row.method for row in both} != set(TIMED):
        return rows
    taken: dict[tuple[str, int], list[float]] = {(r.method, r.samples): [r.cpu_s] for r in both}
    for _ in range(TURNS - 1):
        for count in sorted({row.samples for row in both}):
            for method in TIMED:
                again = calibrated(
                    sys.executable, method, model, root / "crops", count, root / "again.onnx"
                )
                taken[method, count].append(again.cpu_s)
    medians = {key: statistics.median(times) for key, times in taken.items()}
    print(f"\nCPU seconds, median of {TURNS} in turns")
    for (method, count), median in medians.items():
        print(f"| {method} | {count} | {median:.2f} |")
    return [replace(r, cpu_s=medians.get((r.method, r.samples), r.cpu_s)) for r in rows]


def bars(rows: list[Row]) -> list[Bar]:
    """What is promised of Lite0, for every number of samples that was measured."""
    by = {
        method: {row.samples: row for row in rows if row.method == method and not row.stopped}
        for method in METHODS
    }
    ours, minmax = by["kdpipe"], by["onnxruntime MinMax"]
    baked = by["baked + onnxruntime MinMax"]
    found = []
    for count, row in sorted(ours.items()):
        agreed = 100 * row.agreed
        found.append(Bar(f"{count} samples: at least 21 dB", f"{row.db:.1f} dB", row.db >= 21))
        words = f"{count} samples: at least 90 % agreement"
        found.append(Bar(words, f"{agreed:.1f} %", agreed >= 90))
    for count in sorted({*minmax} & {*baked}):
        db, gain = baked[count].db, baked[count].db - minmax[count].db
        words = f"{count} samples: baked through onnxruntime's MinMax at least 20 dB, +5 dB"
        found.append(Bar(words, f"{db:.1f} dB, {gain:+.1f} dB", db >= 20 and gain >= 5))
    for count in sorted({*minmax} & {*ours}):
        ratio = ours[count].cpu_s / minmax[count].cpu_s
        words = f"{count} samples: CPU seconds at most onnxruntime MinMax's"
        found.append(Bar(words, f"{ratio:.2f} times", ratio <= 1))
    if ours:
        memory = [ours[count].extra_mb for count in sorted(ours)]
        words = "at most 260 MB above a float session"
        found.append(Bar(words, f"{max(memory):.0f} MB", max(memory) <= 260))
        growth = 100 * (memory[-1] / memory[0] - 1)
        words = f"memory grows less than 10 % from {min(ours)} to {max(ours)} samples"
        found.append(Bar(words, f"{growth:+.0f} %", growth < 10))
    return found


def print_speed(model: Path, int8: Path) -> None:
    """How fast the int8 graph runs beside the float network, on all cores: the fastest of turns."""
    float_core = model.with_name("float-core.onnx")
    onnx.save(prepare(onnx.load(model)).core, float_core)
    sessions = [open_session(path, options=EXACT) for path in (float_core, int8)]
    name = sessions[0].get_inputs()[0].name
    print("\n| frames at a time | float, ms per frame | int8, ms per frame | int8 is faster by |")
    print("|---|---|---|---|")
    for batch in (1, 16):
        frames = np.concatenate(list(crops(EVALUATION, batch, seed=2)))
        took: tuple[list[float], list[float]] = [], []
        for _ in range(SPEED_TURNS):
            for session, times in zip(sessions, took, strict=True):
                start = time.perf_counter()
                session.run(None, {name: frames})
                times.append(1000 * (time.perf_counter() - start) / batch)
        plain, ours = map(min, took)
        print(f"| {batch} | {plain:.1f} | {ours:.1f} | {plain / ours:.2f} |")


if __name__ == "__main__":
    main()
