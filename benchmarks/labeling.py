"""How fast the teachers' answers are made, against the bare onnxruntime session.

    python benchmarks/labeling.py

The peer is `session.run` of the same model with the same threads on one ready batch, over and over.
Ours reads patches from HDF5, scales, z-scores, resizes, asks, and keeps every block on disk. What
that costs is hidden behind a teacher of the size that public ensembles have, a ResNet-18; a teacher
of 30 thousand parameters shows it. Prints patches per second and per CPU second of both, medians of
runs by turns; only the latter mean something where other programs run. Takes about a minute.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import h5py
import numpy as np
import timm
import torch
from timm.models.densenet import DenseNet

from metis.graph.sessions import Threads, open_session
from pipeline.data.formats.so2sat_h5 import open_so2sat
from pipeline.data.splits import Split
from pipeline.data.synthetic import write_so2sat
from pipeline.params.sources import TeacherParams, ViewParams
from pipeline.teachers.logit_cache import LogitCache
from pipeline.teachers.open import choose_threads, open_teacher
from pipeline.teachers.teacher import BATCH
from preprocessing.contract import parse_contract

if TYPE_CHECKING:
    from collections.abc import Callable

DIFFERENT = 1024
PATCHES = 4 * DIFFERENT
RUNS = 3
CONTRACT = {
    "input": {"layout": "NCHW", "dtype": "float32", "shape": [1, 10, 32, 32]},
    "scaling": {"optical": {"type": "linear", "src_range": [0, 2.8], "dst_range": [0, 255]}},
    "zscore": {"enabled": True, "mu": [15.0] * 10, "sigma": [7.0] * 10},
    "labels": [f"LCZ_{i}" for i in range(1, 18)],
}


def main() -> None:
    """Measure and print the table."""
    torch.manual_seed(0)
    teachers = {
        "ResNet-18": timm.create_model("resnet18", num_classes=17, in_chans=10),
        "DenseNet of 30 thousand parameters": DenseNet(12, (3, 4, 4), num_classes=17, in_chans=10),
    }
    print(
        "| teacher | onnxruntime | labeling / bare session, patches per s "
        "| the same per CPU second | bar |\n|---|---|---|---|---|"
    )
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_patches(root)
        for (name, network), bar in zip(teachers.items(), (">= 0.9", "-"), strict=True):
            path = root / "t.onnx"
            torch.onnx.export(
                network.eval(),
                (torch.zeros(1, 10, 32, 32),),
                str(path),
                opset_version=17,
                dynamo=False,
                input_names=["input"],
                dynamic_axes={"input": {0: "batch"}},
            )
            threads, found = rates(path)
            cells = [f"{ours:.0f} / {peer:.0f} = {ours / peer:.2f}" for ours, peer in found]
            print(f"| {name} | {threads} | {' | '.join(cells)} | {bar} |", flush=True)


def write_patches(root: Path) -> None:
    """Synthetic patches in So2Sat's form, some times over."""
    write_so2sat(root / "some.h5", DIFFERENT, seed=1)
    with h5py.File(root / "some.h5") as some, h5py.File(root / "x.h5", "w") as file:
        for key in ("sen2", "label"):
            file[key] = np.concatenate([some[key][()]] * (PATCHES // DIFFERENT))


def rates(path: Path) -> tuple[Threads, list[tuple[float, float]]]:
    """How onnxruntime runs; patches of ours and of the peer per second, then per CPU second."""
    contract = parse_contract(json.dumps(CONTRACT).encode())
    params = TeacherParams(path=path.name, bands=tuple(range(10)))
    channels = contract.bind(params.modality, params.bands, 10)
    threads = choose_threads(open_teacher(path, params, contract, channels))
    assert threads is not None
    teacher = open_teacher(path, params, contract, channels, threads)
    source = open_so2sat(path.parent / "x.h5", {"optical": "sen2"}, "label")
    split = Split("train", source, np.arange(PATCHES))
    session = open_session(path, threads=threads)
    tensor = teacher.prepare(source.read("optical", np.arange(BATCH), range(10)))

    def peer() -> None:
        for _ in range(PATCHES // BATCH):
            session.run(None, {"input": tensor})

    spent: list[list[tuple[float, float]]] = [[], []]
    for run in range(RUNS):
        with tempfile.TemporaryDirectory(dir=path.parent) as kept:
            cache = LogitCache([teacher], [f"{run:032d}"], ViewParams(), 0, Path(kept))
            spent[0].append(seconds(lambda cache=cache: cache.fill(split, "x", 1)))
        spent[1].append(seconds(peer))
    ours, theirs = (
        [PATCHES / statistics.median(some) for some in zip(*runs, strict=True)] for runs in spent
    )
    return threads, list(zip(ours, theirs, strict=True))


def seconds(work: Callable[[], object]) -> tuple[float, float]:
    """By the clock, and of the processor."""
    clock, processor = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - clock, time.process_time() - processor


if __name__ == "__main__":
    main()
