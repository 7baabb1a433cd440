"""A tiny project that is real in every part: patches, contract, teachers, config."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import yaml
from onnx import TensorProto, helper, numpy_helper

from pipeline.run.digests import Digests

CLASSES = 3
BANDS = 4
LABELS = ["water", "forest", "town"]
#: How far logits of `make_teacher` may lie apart when they are computed in another order: a mean of
#: 256 float32 values is off by at most 256 * 2^-24 of the mean of their absolute values, which is
#: below 2, and the weights of a class are below 8 in all; twice, for two orders.
TEACHER_ROUNDING = 2 * 8 * 2 * 256 * 2.0**-24
#: Mean of each class in each band, stored units.
MEANS = np.array([[0.2, 0.5, 0.9, 1.2], [0.5, 0.9, 0.4, 0.7], [0.9, 0.3, 0.6, 0.3]])


def make_patches(count: int, seed: int, size: int = 4) -> tuple[np.ndarray, np.ndarray]:
    """Float patches (N, size, size, 4) in [0, 2.8], and class indices; every class is there."""
    random = np.random.default_rng(seed)
    labels = np.arange(count) % CLASSES
    patches = MEANS[labels][:, None, None, :] + random.normal(0, 0.12, (count, size, size, BANDS))
    return np.clip(patches, 0, 2.8).astype(np.float32), labels.astype(np.int64)


def make_contract(patches: np.ndarray, size: int = 16) -> dict[str, Any]:
    """A preprocessing.json that fits the patches: [0, 2.8] to [0, 255], then z-score."""
    scaled = patches.astype(np.float64) * 255 / 2.8
    return {
        "input": {"layout": "NCHW", "dtype": "float32", "shape": [1, 3, size, size]},
        "scaling": {"optical": {"type": "linear", "src_range": [0, 2.8], "dst_range": [0, 255]}},
        "zscore": {
            "enabled": True,
            "mu": scaled.mean(axis=(0, 1, 2)).tolist(),
            "sigma": scaled.std(axis=(0, 1, 2)).tolist(),
        },
        "labels": LABELS,
        "note": "made for a test",
        "exporter": {"an": "extra key"},
    }


def make_teacher(
    path: Path,
    bands: tuple[int, ...],
    contract: dict[str, Any],
    *,
    classes: int = CLASSES,
    batch: int | str = "N",
    size: int | str = 16,
    softmax: bool | str = False,
    inputs: int = 1,
    opset: int = 17,
    external: str = "",
    dtype: int = TensorProto.FLOAT,
    before: str = "",
    centers: np.ndarray | None = None,
) -> None:
    """A linear classifier on band means, as ONNX; right for nearly every patch of make_patches.

    `centers` are the means of the classes (classes, bands), in standard deviations; `before` puts
    an operator with constants between the input and the rest; softmax "hidden" puts one behind the
    softmax.
    """
    if centers is None:
        mu, sigma = (np.array(contract["zscore"][k])[list(bands)] for k in ("mu", "sigma"))
        centers = (MEANS[:, list(bands)] * 255 / 2.8 - mu) / sigma
        centers = np.resize(centers, (classes, len(bands)))
    kind = helper.tensor_dtype_to_np_dtype(dtype)
    weights = [
        numpy_helper.from_array((2 * centers).astype(kind), "weight"),
        numpy_helper.from_array((-(centers**2).sum(axis=1)).astype(kind), "bias"),
    ]
    scores = "scores" if softmax else "logits"
    nodes = [
        helper.make_node("GlobalAveragePool", ["normalized" if before else "input"], ["pooled"]),
        helper.make_node("Flatten", ["pooled"], ["features"]),
        helper.make_node("Gemm", ["features", "weight", "bias"], [scores], transB=1),
    ]
    if before:
        per_channel = np.full((1, len(bands), 1, 1), 2.0, kind)
        weights.append(numpy_helper.from_array(per_channel, "per_channel"))
        flat = numpy_helper.from_array(per_channel.reshape(-1), "flat")
        constants = ["flat"] * 4 if before == "BatchNormalization" else ["per_channel"]
        weights.append(flat)
        nodes.insert(0, helper.make_node(before, ["input", *constants], ["normalized"]))
    if softmax:
        end = "probabilities" if softmax == "hidden" else "logits"
        nodes.append(helper.make_node("Softmax", ["scores"], [end], axis=1))
    if softmax == "hidden":
        nodes.append(helper.make_node("Abs", ["probabilities"], ["logits"]))
    shape = [batch, len(bands), size, size]
    sources = [helper.make_tensor_value_info("input", dtype, shape)]
    for extra in range(1, inputs):
        sources.append(helper.make_tensor_value_info(f"other{extra}", dtype, [1]))
    graph = helper.make_graph(
        nodes,
        "teacher",
        sources,
        [helper.make_tensor_value_info("logits", dtype, [batch, len(centers)])],
        weights,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    if external:
        onnx.save(model, path, save_as_external_data=True, location=external, size_threshold=0)
    else:
        onnx.save(model, path)


class Project:
    """A project folder, its config as a tree, and the command line run in it."""

    def __init__(self, root: Path) -> None:
        self.root = root

    @property
    def config(self) -> dict[str, Any]:
        return yaml.safe_load((self.root / "kdpipe.yaml").read_text())

    def edit(self, *path: str | int, to: Any) -> None:
        """Change one value of kdpipe.yaml."""
        tree = here = self.config
        for key in path[:-1]:
            here = here[key]
        here[path[-1]] = to
        (self.root / "kdpipe.yaml").write_text(yaml.safe_dump(tree, sort_keys=False))

    @property
    def contract(self) -> dict[str, Any]:
        return json.loads((self.root / "preprocessing.json").read_text())

    def edit_contract(self, *path: str | int, to: Any) -> None:
        """Change one value of preprocessing.json."""
        tree = here = self.contract
        for key in path[:-1]:
            here = here[key]
        here[path[-1]] = to
        (self.root / "preprocessing.json").write_text(json.dumps(tree, indent=1))

    @property
    def folder(self) -> Path:
        return self.root / "runs" / "tiny"

    @property
    def manifest(self) -> dict[str, Any]:
        return json.loads((self.folder / "manifest.json").read_text())

    def artifact(self, name: str) -> Path:
        return self.folder / self.manifest["artifacts"][name]["path"]

    def redo_digest(self, name: str) -> None:
        """Make the manifest believe that an artifact, edited by hand, is what a stage wrote."""
        digests = Digests(self.root / "unused.json")
        path = self.artifact(name)
        if path.is_dir():
            path.with_name(path.name + ".digests").write_text(digests.listing(path))
        manifest = self.manifest
        manifest["artifacts"][name]["sha256"] = digests.path(path)[0]
        (self.folder / "manifest.json").write_text(json.dumps(manifest))

    def kdpipe(self, *words: str, **options: Any) -> subprocess.CompletedProcess[str]:
        """Run the installed command in the project, as a user would."""
        return subprocess.run(
            [Path(sys.executable).parent / "kdpipe", *words],
            cwd=self.root,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
            **options,
        )

    def states(self) -> dict[str, str]:
        """State of every stage, by `kdpipe status --json`."""
        stages = json.loads(self.kdpipe("status", "--json").stdout)["stages"]
        return {name: entry["state"] for name, entry in stages.items()}


def write_project(root: Path) -> Project:
    """Patches, contract, two teachers and a config whose whole run takes seconds."""
    root.mkdir(parents=True, exist_ok=True)
    train, train_labels = make_patches(240, seed=1)
    test, test_labels = make_patches(90, seed=2)
    np.savez(root / "train.npz", images=train, labels=train_labels)
    np.savez(root / "test.npz", images=test, labels=test_labels)
    contract = make_contract(train)
    (root / "preprocessing.json").write_text(json.dumps(contract, indent=1))
    (root / "labels.txt").write_text("".join(f"{label}\n" for label in LABELS))
    make_teacher(root / "teachers" / "dense_a.onnx", (0, 1, 2), contract)
    make_teacher(root / "teachers" / "dense_b.onnx", (3, 2, 1), contract, batch=1)
    config = {
        "run": "tiny",
        "seed": 3,
        "ingest": {
            "labels": "labels.txt",
            "data": {
                "train": {"path": "train.npz"},
                "val": {"fraction": 0.25},
                "test": {"path": "test.npz"},
            },
            "teachers": [
                {"path": "teachers/dense_a.onnx", "bands": [0, 1, 2]},
                {"path": "teachers/dense_b.onnx", "bands": [3, 2, 1]},
            ],
            "student": {"bands": [2, 1, 0], "size": 16},
        },
        "distill": {"student": "test_byobnet", "epochs": 2, "batch_size": 32},
        "calibrate": {"samples": 32, "max_int8_loss": 50.0},
        "benchmark": {
            "min_seconds": 0.3,
            "min_queries": 70,
            "min_samples": 200,
            "golden_samples": 8,
            "max_device_loss": 50.0,
        },
    }
    (root / "kdpipe.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    return Project(root)
