"""What ingest costs beyond reading the user's file, and how its memory grows with the patches.

    python benchmarks/ingest.py

The file has the form of So2Sat LCZ42 and 100,000 patches; the teacher has no weight to speak of (a
pooling and a matrix of 10 x 17). The peer is a plain h5py pass: the same 30,000 patches in blocks
of the same size, the bands that teacher and student see, cast to float32. CPU seconds of ingest are
user and system of `kdpipe run --to ingest`, less those of the same command on 340 patches, which is
what starting costs. The digest of the file is known before: kdpipe takes it once per file. By
turns, medians; memory is the peak of the process as the operating system counts it. Needs 9 GB of
disk and takes about three minutes.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import h5py
import numpy as np
import onnx
import yaml
from onnx import TensorProto, helper, numpy_helper

from pipeline.data.blocks import BLOCK
from pipeline.data.synthetic import CLASSES, write_so2sat

DIFFERENT = 2000
PATCHES = 100_000  # in the file
FEW, TIMED = 340, 30_000
TURNS = 3
BANDS = 10
MAX_RATIO = 5.0
SMALL = 10_000  # memory is compared between these and all patches
MAX_GROWTH_MB = 100.0
KDPIPE = str(Path(sys.executable).with_name("kdpipe"))


def main() -> None:
    """Measure and print both tables."""
    with tempfile.TemporaryDirectory(prefix="kdpipe-") as folder:
        root = Path(folder)
        write_patches(root / "lcz.h5")
        write_project(root)
        ingest(root, FEW, "digest")  # the file's digest is remembered from here on
        seconds: dict[str, list[float]] = {"start": [], "ingest": [], "peer": []}
        for turn in range(TURNS):
            seconds["start"].append(ingest(root, FEW, f"few{turn}")[0])
            seconds["ingest"].append(ingest(root, TIMED, f"timed{turn}")[0])
            seconds["peer"].append(plain_pass(root / "lcz.h5"))
        start, whole, peer = (statistics.median(some) for some in seconds.values())
        memory = {count: ingest(root, count, f"memory{count}")[1] for count in (SMALL, PATCHES)}
    ours = whole - start
    print(
        f"{TIMED:,} patches | CPU seconds\n--- | ---\nplain h5py pass | {peer:.2f}\n"
        f"ingest, less {start:.2f} of starting | {ours:.2f}\n"
        f"ratio | {judged(ours / peer, MAX_RATIO, '')}\n"
    )
    growth = memory[PATCHES] - memory[SMALL]
    print("patches | peak memory\n--- | ---")
    for count, peak in memory.items():
        print(f"{count:,} | {peak:.0f} MB")
    print(f"growth | {judged(growth, MAX_GROWTH_MB, ' MB')}")


def judged(value: float, bar: float, unit: str) -> str:
    """A figure beside its bar."""
    return f"{value:.1f}{unit} (bar <= {bar:g}{unit}: {'met' if value <= bar else 'MISSED'})"


def write_patches(path: Path) -> None:
    """Synthetic patches many times over, each time a little brighter; sen1 is there, all zero."""
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        write_so2sat(Path(folder) / "some.h5", DIFFERENT, seed=1)
        with h5py.File(Path(folder) / "some.h5") as some:
            patches, labels = some["sen2"][()], some["label"][()]
    times = PATCHES // DIFFERENT
    with h5py.File(path, "w") as file:
        file.create_dataset("sen1", (PATCHES, 32, 32, 8), np.float64)  # nobody looks at it
        file["label"] = np.tile(labels, (times, 1))
        target = file.create_dataset("sen2", (PATCHES, *patches.shape[1:]), np.float64)
        for number in range(times):
            target[number * DIFFERENT : (number + 1) * DIFFERENT] = patches * (1 + number * 1e-4)


def write_project(root: Path) -> None:
    """A contract that fits, and a teacher that does next to nothing."""
    with h5py.File(root / "lcz.h5") as file:
        scaled = file["sen2"][:: PATCHES // 500] * (255 / 2.8)
    contract = {
        "input": {"layout": "NCHW", "dtype": "float32", "shape": [1, BANDS, 32, 32]},
        "scaling": {"optical": {"type": "linear", "src_range": [0, 2.8], "dst_range": [0, 255]}},
        "zscore": {
            "enabled": True,
            "mu": scaled.mean(axis=(0, 1, 2)).tolist(),
            "sigma": scaled.std(axis=(0, 1, 2)).tolist(),
        },
        "labels": [f"LCZ {number}" for number in range(1, CLASSES + 1)],
    }
    (root / "preprocessing.json").write_text(json.dumps(contract))
    weight = np.random.default_rng(0).normal(size=(BANDS, CLASSES)).astype(np.float32)
    graph = helper.make_graph(
        [
            helper.make_node("ReduceMean", ["input"], ["pooled"], axes=[2, 3], keepdims=0),
            helper.make_node("MatMul", ["pooled", "weight"], ["logits"]),
        ],
        "teacher",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["N", BANDS, 32, 32])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["N", CLASSES])],
        [numpy_helper.from_array(weight, "weight")],
    )
    opset = [helper.make_opsetid("", 17)]
    onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=8), root / "teacher.onnx")


def ingest(root: Path, count: int, run: str) -> tuple[float, float]:
    """CPU seconds and peak memory in MB of `kdpipe run --to ingest` on so many patches."""
    train = count * 9 // 10
    config = {
        "run": run,
        "ingest": {
            "data": {
                "format": "so2sat-h5",
                "train": {"path": "lcz.h5", "rows": [0, train]},
                "val": {"fraction": 0.15},
                "test": {"path": "lcz.h5", "rows": [train, count]},
            },
            "teachers": [{"path": "teacher.onnx", "bands": list(range(BANDS))}],
            "student": {"bands": [2, 1, 0]},
            "doubtful_top1": 0.0,
        },
        "distill": {"student": "test_byobnet"},
    }
    (root / "kdpipe.yaml").write_text(yaml.safe_dump(config))
    child = subprocess.Popen(
        [KDPIPE, "run", "--to", "ingest"],
        cwd=root,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert child.stdout is not None
    said = child.stdout.read()
    _, status, used = os.wait4(child.pid, 0)
    if status:
        sys.exit(said)
    return used.ru_utime + used.ru_stime, used.ru_maxrss / 1024


def plain_pass(path: Path) -> float:
    """CPU seconds to read the same bands of the same patches and cast them."""
    begin = time.process_time()
    with h5py.File(path) as file:
        patches = file["sen2"]
        for start in range(0, TIMED, BLOCK):
            patches[start : start + BLOCK].astype(np.float32)
    return time.process_time() - begin


if __name__ == "__main__":
    main()
