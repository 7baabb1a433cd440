"""How fast distillation trains, against a bare PyTorch loop and against asking the teacher anew.

    python benchmarks/training.py

Everything runs on one core, by turns, and is measured in CPU seconds, so that other programs on
the machine disturb little. Takes about twenty minutes of that core. The data are synthetic and the
teachers untrained: only time is measured. What caching saves depends on the teachers' size beside
the student's, and on how many patches share what a run costs once (12 s), so several cases are
measured.
"""

from __future__ import annotations

import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import timm
import torch
import yaml
from timm.models.densenet import DenseNet
from tqdm import tqdm

from pipeline.data.dataset import StudentData
from pipeline.data.synthetic import write_so2sat
from pipeline.run.config import load_config
from pipeline.run.manifest import load_manifest
from pipeline.stages import load_stages
from pipeline.training.job import TrainingJob
from pipeline.training.loop import train

KDPIPE = Path(sys.executable).parent / "kdpipe"
PATCHES = 2048
MANY = 4 * PATCHES
EPOCHS = 16
RUNS = 3
TEACHERS = {
    "small": lambda: DenseNet(12, (3, 4, 4), num_classes=17, in_chans=10),
    "resnet18": lambda: timm.create_model("resnet18", num_classes=17, in_chans=10),
}
#: Teachers, training patches, student.
CASES = (
    ("small", PATCHES, "tiny CNN"),
    ("small", PATCHES, "MobileNet-like"),
    ("resnet18", PATCHES, "tiny CNN"),
    ("resnet18", PATCHES, "MobileNet-like"),
    ("resnet18", MANY, "tiny CNN"),
)
STUDENTS = {"tiny CNN": "test_byobnet", "MobileNet-like": "mobilenetv3_small_050"}


def main() -> None:
    """Measure everything and print the table."""
    torch.set_num_threads(1)
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_project(root)
        print("| what | measured | bar |\n|---|---|---|")
        for teachers, count, kind in CASES:
            cached, live = (
                whole_run(root, mode, STUDENTS[kind], teachers, count)
                for mode in ("cached", "live")
            )
            print(
                f"| {EPOCHS} epochs with the cache pass, {count} patches, three teachers "
                f"({teachers}), {kind} ({STUDENTS[kind]}): live / cached | "
                f"{live:.1f} s / {cached:.1f} s = {live / cached:.2f} | "
                f">= {3 if kind == 'tiny CNN' else 1.5} |",
                flush=True,
            )
        job = last_job(root)
        for kind, name in STUDENTS.items():
            params = msgspec.structs.replace(job.params, student=name)
            given = replace(job, params=params)
            ways = {
                "taught": lambda given=given: epoch_seconds(given),
                "alone": lambda given=given: epoch_seconds(replace(given, with_teacher=False)),
                "bare": lambda given=given: bare_epoch_seconds(given),
            }
            found = [{name: way() for name, way in ways.items()} for _ in range(RUNS)]
            t, a, b = (statistics.median(turn[name] for turn in found) for name in ways)
            print(f"| epoch with cached teacher / without, {kind} | {t / a:.2f} | <= 1.15 |")
            print(
                f"| throughput / bare loop over tensors in RAM, {kind} | "
                f"{PATCHES / t:.0f} / {PATCHES / b:.0f} patches per CPU s = {b / t:.2f} "
                "| >= 0.85 |",
                flush=True,
            )


def write_project(root: Path) -> None:
    """Synthetic patches, three teachers of each kind that see ten bands, and a config."""
    write_so2sat(root / "train.h5", MANY + 256, seed=1)
    write_so2sat(root / "test.h5", 170, seed=2)
    contract = {
        "input": {"layout": "NCHW", "dtype": "float32", "shape": [1, 10, 32, 32]},
        "scaling": {"optical": {"type": "linear", "src_range": [0, 2.8], "dst_range": [0, 255]}},
        "zscore": {"enabled": False},
        "labels": [f"LCZ_{i}" for i in range(1, 18)],
    }
    (root / "preprocessing.json").write_text(json.dumps(contract))
    (root / "teachers").mkdir()
    for kind, number in itertools.product(TEACHERS, range(3)):
        torch.manual_seed(number)
        torch.onnx.export(
            TEACHERS[kind]().eval(),
            (torch.zeros(1, 10, 32, 32),),
            str(root / "teachers" / f"{kind}-{number}.onnx"),
            opset_version=17,
            dynamo=False,
            input_names=["input"],
            dynamic_axes={"input": {0: "batch"}},
        )
    config = {
        "run": "speed",
        "ingest": {
            "data": {
                "format": "so2sat-h5",
                "modalities": {"optical": "sen2"},
                "train": {"path": "train.h5", "rows": [0, PATCHES]},
                "val": {"path": "train.h5", "rows": [MANY, MANY + 256]},
                "test": {"path": "test.h5"},
            },
            "doubtful_top1": 0.0,
            "teachers": [{"path": "teachers/small-*.onnx", "bands": list(range(10))}],
            "student": {"bands": [2, 1, 0], "size": 32},
        },
        "distill": {"epochs": EPOCHS, "batch_size": 64, "loggers": []},
    }
    (root / "kdpipe.yaml").write_text(yaml.safe_dump(config))


def whole_run(root: Path, mode: str, student: str, teachers: str, count: int) -> float:
    """CPU seconds of ingest and distill as a user runs them, from nothing."""
    asked = [{"path": f"teachers/{teachers}-*.onnx", "bands": list(range(10))}]
    words = [f"ingest.teacher_mode={mode}", f"distill.student={student}"]
    words.append(f"ingest.teachers={json.dumps(asked)}")
    words.append(f"ingest.data.train.rows=[0, {count}]")
    run = f"{mode}-{student}-{teachers}-{count}"
    changes = [word for change in words for word in ("--set", change)]
    before = os.times()
    done = subprocess.run(
        [KDPIPE, "run", "--to", "distill", "--run", run, *changes],
        cwd=root,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    after = os.times()
    if done.returncode:
        sys.exit(done.stderr)
    seconds = after.children_user + after.children_system
    seconds -= before.children_user + before.children_system
    if mode == "cached":
        for block in (root / "runs" / ".cache" / "labels").rglob("*.npz"):
            block.unlink()  # the next run shall ask its teachers again
    return seconds


def last_job(root: Path) -> TrainingJob:
    """A training on what the last cached run ingested."""
    folder = root / "runs" / f"cached-{STUDENTS['tiny CNN']}-small-{PATCHES}"
    manifest = load_manifest(folder)
    assert manifest is not None
    paths = manifest.paths(folder)
    params = load_config(root / "kdpipe.yaml", load_stages()).params["distill"]
    return TrainingJob(
        params=params,
        dataset=str(paths.dataset),
        teaching=str(paths.teaching),
        contract=str(paths.contract),
        student_input=str(paths.student_input),
        init=None,
        classes=StudentData(paths).classes,
        seed=0,
        with_teacher=True,
        folder=str(root / "scratch"),
        logs=str(root / "logs"),
    )


def epoch_seconds(job: TrainingJob) -> float:
    """CPU seconds of one more epoch: a training of five against one of a single epoch."""
    seconds = []
    for epochs in (1, 5):
        params = msgspec.structs.replace(job.params, epochs=epochs, warmup_epochs=0.5)
        given = replace(job, params=params)
        start = time.process_time()
        train(given, lambda what, total: tqdm(total=total, disable=True))
        seconds.append(time.process_time() - start)
    return (seconds[1] - seconds[0]) / 4


def bare_epoch_seconds(job: TrainingJob) -> float:
    """The same network, batches, optimizer and losses in the shortest loop there is, validated."""
    splits = [job.data.train, job.data.val]
    tensors, val = (torch.from_numpy(job.data.tensors(split)) for split in splits)
    labels = torch.from_numpy(np.array(splits[0].labels))
    teacher = torch.from_numpy(np.load(Path(job.teaching) / "train-logits.npy")[0])
    network = timm.create_model(job.params.student, num_classes=job.classes, in_chans=3).train()
    optimizer = torch.optim.AdamW(network.parameters(), 1e-3)
    size = job.params.batch_size
    seconds = []
    for _ in range(4):
        start = time.process_time()
        order = torch.randperm(len(tensors))
        for step in range(len(tensors) // size):
            chosen = order[step * size : (step + 1) * size]
            logits = network(tensors[chosen])
            hard = torch.nn.functional.cross_entropy(logits, labels[chosen])
            soft = torch.nn.functional.kl_div(
                (logits / 2).log_softmax(1),
                (teacher[chosen] / 2).log_softmax(1),
                reduction="batchmean",
                log_target=True,
            )
            loss = 0.7 * hard + 0.3 * 4 * soft
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()
        with torch.no_grad():
            network.eval()
            for i in range(0, len(val), size):
                network(val[i : i + size])
            network.train()
        seconds.append(time.process_time() - start)
    return statistics.median(seconds[1:])


if __name__ == "__main__":
    main()
