"""How fast the teachers' answers are made, against the bare onnxruntime session.

    python benchmarks/labelling.py

The peer is `session.run` of the same model with the same threads on one ready batch, over and over.
Ours reads patches from HDF5, scales, z-scores, resizes, asks, and keeps every block on disk. Prints
patches per second of both and the ratio, the median of interleaved runs; takes about a minute.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from timm.models.densenet import DenseNet

from pipeline.datasets import open_so2sat
from pipeline.labelling import Labelling
from pipeline.reference import open_session
from pipeline.sources import TeacherParams, ViewParams
from pipeline.splits import Split
from pipeline.synthetic import write_so2sat
from pipeline.teachers import BATCH, choose_threads, open_teacher
from preprocessing.contract import parse_contract

PATCHES = 2048
RUNS = 3
CONTRACT = {
    "input": {"layout": "NCHW", "dtype": "float32", "shape": [1, 10, 32, 32]},
    "scaling": {"optical": {"type": "linear", "src_range": [0, 2.8], "dst_range": [0, 255]}},
    "zscore": {"enabled": True, "mu": [15.0] * 10, "sigma": [7.0] * 10},
    "labels": [f"LCZ_{i}" for i in range(1, 18)],
}


def main() -> None:
    """Measure and print the table."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_so2sat(root / "x.h5", PATCHES, seed=1)
        torch.manual_seed(0)
        torch.onnx.export(
            DenseNet(12, (3, 4, 4), num_classes=17, in_chans=10).eval(),
            (torch.zeros(1, 10, 32, 32),),
            str(root / "t.onnx"),
            opset_version=17,
            dynamo=False,
            input_names=["input"],
            dynamic_axes={"input": {0: "batch"}},
        )
        contract = parse_contract(json.dumps(CONTRACT).encode())
        params = TeacherParams(path="t.onnx", bands=tuple(range(10)))
        threads = choose_threads(open_teacher(root / "t.onnx", params, contract, 10))
        teacher = open_teacher(root / "t.onnx", params, contract, 10, threads)
        source = open_so2sat(root / "x.h5", {"optical": "sen2"}, "label")
        split = Split("train", source, np.arange(PATCHES))
        session = open_session(root / "t.onnx", threads)
        tensor = teacher.prepare(source.read("optical", np.arange(BATCH), range(10)))
        ours, peer = [], []
        for run in range(RUNS):
            asked = Labelling([teacher], [f"{run:032d}"], ViewParams(), 0, root / "labels")
            start = time.perf_counter()
            asked.label(split, "x", 1)
            ours.append(PATCHES / (time.perf_counter() - start))
            start = time.perf_counter()
            for _ in range(PATCHES // BATCH):
                session.run(None, {"input": tensor})
            peer.append(PATCHES / (time.perf_counter() - start))
        rates = statistics.median(ours), statistics.median(peer)
        print(f"three-block DenseNet, {PATCHES} patches, {threads}")
        print("| labelling, patches per s | bare session, patches per s | ratio | bar |")
        print("|---|---|---|---|")
        print(f"| {rates[0]:.0f} | {rates[1]:.0f} | {rates[0] / rates[1]:.2f} | >= 0.9 |")


if __name__ == "__main__":
    main()
