"""Train the three teachers of the example and write everything that comes with them.

    python examples/landsat/make_teachers.py

Writes preprocessing.json (statistics of the patches that taught them), labels.txt, teachers/*.onnx
and teachers/measured.json (top-1 of each). They learn from the labels of all patches that
kdpipe.yaml gives the student, also of those whose labels it hides from it; its validation and test
patches are never trained on. Takes about eight minutes on two cores.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import timm
import torch
from timm.models.densenet import DenseNet
from torch import nn

from metis.graph.sessions import open_session
from pipeline.data.splits import Split, open_splits
from pipeline.run.config import load_config
from pipeline.stages import load_stages
from pipeline.tasks.metrics import top1
from preprocessing.apply import teacher_tensor
from preprocessing.contract import load_contract

if TYPE_CHECKING:
    from pipeline.params.sources import DataParams

HERE = Path(__file__).resolve().parent
SIZE = 32
EPOCHS = 20
BATCH = 64
LEARNING_RATE = 3e-3


def main() -> None:
    """Write the contract, train, export, measure."""
    settings = load_config(HERE / "kdpipe.yaml", load_stages())
    params = settings.params["ingest"]
    with np.load(HERE / "landsat_satellite.npz") as archive:
        labels = [str(name) for name in archive["classes"]]
    splits = taught_splits(params.data, labels)
    write_contract(splits["train"], labels)
    contract = load_contract(HERE / "preprocessing.json")

    measured = {}
    for number, teacher in enumerate(params.teachers):
        tensors = {
            name: teacher_tensor(
                split.source.read(teacher.modality, split.rows, teacher.bands),
                contract.bind(teacher.modality, teacher.bands, 4),
                (SIZE, SIZE),
                interpolation=teacher.resize,
            )
            for name, split in splits.items()
        }
        torch.manual_seed(number)
        network = DenseNet(
            growth_rate=16,
            block_config=(3, 4, 4),
            num_classes=len(labels),
            in_chans=len(teacher.bands),
            drop_rate=0.1,
        )
        train(network, tensors["train"], splits["train"].labels)
        path = HERE / teacher.path
        export(network, len(teacher.bands), path)
        session = open_session(path)
        measured[path.name] = {
            "bands": list(teacher.bands),
            **{
                f"top1_{name}": top1(
                    session.run(None, {"input": tensors[name]})[0], splits[name].labels
                )
                for name in ("val", "test")
            },
        }
        print(path.name, measured[path.name], f"{path.stat().st_size} bytes", flush=True)
    text = json.dumps(
        {"made_with": f"torch {torch.__version__}, timm {timm.__version__}", **measured}, indent=1
    )
    (HERE / "teachers" / "measured.json").write_text(text + "\n")


def taught_splits(data: DataParams, labels: list[str]) -> dict[str, Split]:
    """Train, val and test; the patches that the student has no labels of are in train here."""
    files = {}
    for name, split in data.splits.items():
        files[f"data.{name}"] = HERE / split.path
        if split.indices:
            files[f"data.{name}.indices"] = HERE / split.indices
    splits = open_splits(data, files, labels, seed=0)
    rows = np.union1d(splits["train"].rows, splits.pop("unlabeled").rows)
    return {**splits, "train": Split("train", splits["train"].source, rows)}


def write_contract(train_split: Split, labels: list[str]) -> None:
    """preprocessing.json with the training split's mean and standard deviation per band."""
    patches = train_split.source.read("optical", train_split.rows, range(4)).astype(np.float64)
    contract = {
        "input": {"layout": "NCHW", "dtype": "float32", "shape": [1, 4, SIZE, SIZE]},
        # The stored values are 8-bit radiances already: the scaling leaves them as they are.
        "scaling": {"optical": {"type": "linear", "src_range": [0, 255], "dst_range": [0, 255]}},
        "zscore": {
            "enabled": True,
            "mu": [round(v, 4) for v in patches.mean(axis=(0, 1, 2))],
            "sigma": [round(v, 4) for v in patches.std(axis=(0, 1, 2))],
        },
        "labels": labels,
        "note": "Statlog (Landsat Satellite): bands green, red, near infrared 1, near infrared 2",
    }
    (HERE / "preprocessing.json").write_text(json.dumps(contract, indent=1) + "\n")
    (HERE / "labels.txt").write_text("".join(f"{label}\n" for label in labels))


def train(network: nn.Module, tensors: np.ndarray, labels: np.ndarray) -> None:
    """AdamW on a one-cycle schedule, with the eight flips and rotations of a square."""
    images, targets = torch.from_numpy(tensors), torch.from_numpy(labels)
    optimizer = torch.optim.AdamW(network.parameters(), lr=LEARNING_RATE, weight_decay=0.05)
    steps = EPOCHS * (len(images) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps)
    criterion = nn.CrossEntropyLoss(label_smoothing=0.05)
    network.train()
    for _ in range(EPOCHS):
        order = torch.randperm(len(images))
        for i in range(len(images) // BATCH):
            chosen = order[i * BATCH : (i + 1) * BATCH]
            batch = torch.rot90(images[chosen], int(torch.randint(4, ())), (2, 3))
            batch = batch.flip(3) if torch.rand(()) < 0.5 else batch
            loss = criterion(network(batch), targets[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()


def export(network: nn.Module, channels: int, path: Path) -> None:
    """ONNX, opset 17, free batch size, logits."""
    network.eval()
    path.parent.mkdir(exist_ok=True)
    torch.onnx.export(
        network,
        (torch.zeros(1, channels, SIZE, SIZE),),
        str(path),
        opset_version=17,
        dynamo=False,
        input_names=["input"],
        output_names=["logits"],
        dynamic_axes={"input": {0: "batch"}, "logits": {0: "batch"}},
    )


if __name__ == "__main__":
    main()
