import csv

import numpy as np
import pytest
import torch
from tqdm import tqdm

from pipeline.splits import DatasetSplit
from pipeline.stage import StageError
from pipeline.stages.distill import DistillParams
from pipeline.training import StudentBatches, train
from preprocessing.apply import student_tensor
from preprocessing.contract import StudentInput

GIVEN = StudentInput(
    modality="optical",
    bands=(0, 1, 2),
    patch_hw=(4, 4),
    size_hw=(8, 8),
    interpolation="nearest",
    half_pixel_centers=False,
    device_resize=False,
    encoding="contract",
    grey_lo=(0.0,) * 3,
    grey_hi=(255.0,) * 3,
    mean=(100.0, 120.0, 90.0),
    std=(30.0, 40.0, 50.0),
    contract="0" * 64,
)


def split(count, seed):
    random = np.random.default_rng(seed)
    labels = np.arange(count) % 3
    centers = np.array([[60, 120, 180], [120, 180, 60], [180, 60, 120]])
    images = centers[labels][:, None, None] + random.normal(0, 25, (count, 4, 4, 3))
    return DatasetSplit(
        images=np.clip(images, 0, 255).astype(np.uint8), labels=labels, rows=np.arange(count)
    )


def network():
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3),
        torch.nn.BatchNorm2d(8),
        torch.nn.ReLU(),
        torch.nn.AdaptiveAvgPool2d(1),
        torch.nn.Flatten(),
        torch.nn.Linear(8, 3),
    )


def fit(folder, teacher=None, seed=0, **params):
    student = network()
    splits = {"train": split(90, 1), "val": split(30, 2)}
    logits = np.eye(3, dtype=np.float32)[splits["train"].labels] * 5 if teacher is None else teacher
    settings = DistillParams(**{"epochs": 6, "batch_size": 16, "learning_rate": 0.02, **params})
    facts = train(
        student,
        settings,
        GIVEN,
        splits,
        logits,
        seed=seed,
        folder=folder,
        progress=lambda what, total: tqdm(total=total, disable=True),
    )
    return student, facts


def weights(student):
    return torch.cat([p.detach().flatten() for p in student.parameters()])


def test_it_learns_and_keeps_the_best_epoch(tmp_path):
    student, facts = fit(tmp_path)
    val = split(30, 2)
    student.eval()
    with torch.no_grad():
        logits = student(torch.from_numpy(student_tensor(val.images, GIVEN)))
    assert (logits.argmax(dim=1).numpy() == val.labels).mean() > 0.9
    rows = list(csv.DictReader((tmp_path / "metrics.csv").read_text().splitlines()))
    curve = [float(row["val_top1"]) for row in rows if row["val_top1"]]
    assert len(curve) == 6
    assert facts["best_epoch"] == int(np.argmax(curve)) + 1
    assert {"loss", "hard_loss", "soft_loss"} <= set(rows[0])
    assert (tmp_path / "student.safetensors").exists()
    assert not list(tmp_path.glob("*.ckpt"))  # it would name folders of this machine


def test_the_logged_loss_is_the_weighted_sum_of_its_parts(tmp_path):
    _, facts = fit(tmp_path, hard_weight=0.2, soft_weight=1.5)
    losses = facts["losses"]
    total = 0.2 * losses["hard_loss"] + 1.5 * losses["soft_loss"]
    assert losses["loss"] == pytest.approx(total, rel=1e-5)


def test_the_same_seed_gives_the_same_weights(tmp_path):
    one, same, other = (
        weights(fit(tmp_path / str(i), seed=seed)[0]) for i, seed in enumerate((0, 0, 1))
    )
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_with_soft_weight_alone_labels_do_not_matter_and_a_wrong_teacher_does(tmp_path):
    wrong = np.roll(np.eye(3, dtype=np.float32)[split(90, 1).labels] * 5, 1, axis=1)
    student, _ = fit(tmp_path, teacher=wrong, hard_weight=0.0, soft_weight=1.0)
    val = split(30, 2)
    student.eval()
    with torch.no_grad():
        found = student(torch.from_numpy(student_tensor(val.images, GIVEN))).argmax(dim=1).numpy()
    assert (found == (val.labels + 1) % 3).mean() > 0.9


def test_a_loss_that_is_no_number_stops_with_advice(tmp_path):
    teacher = np.full((90, 3), np.nan, np.float32)
    with pytest.raises(
        StageError, match=r"loss became nan in epoch 0; lower distill\.learning_rate"
    ):
        fit(tmp_path, teacher=teacher)


def test_a_batch_is_tensor_label_and_the_teachers_row():
    data = split(12, 3)
    teacher = np.random.default_rng(0).normal(size=(12, 3)).astype(np.float32)
    tensor, labels, logits = StudentBatches(data, GIVEN, teacher)[[7, 2]]
    assert np.array_equal(tensor.numpy(), student_tensor(data.images[[7, 2]], GIVEN))
    assert labels.tolist() == data.labels[[7, 2]].tolist()
    assert np.array_equal(logits.numpy(), teacher[[7, 2]])
