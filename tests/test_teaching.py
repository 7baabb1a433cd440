"""From teachers to a student: what users do with kdpipe run, label, and several processes."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from tiny_project import TEACHER_ROUNDING, make_teacher

from pipeline.data.dataset import DatasetSplit
from pipeline.teachers.ensemble import combine
from pipeline.teachers.soft_targets import SoftTargets
from pipeline.training.losses.kl import kl_loss


def facts(project, stage):
    return project.manifest["stages"][stage]["facts"]


def teaching_of(project):
    return SoftTargets(project.artifact("teaching"), project.artifact("contract"))


def test_live_teachers_say_for_every_view_what_was_cached(project):
    project.edit("ingest", "views", to={"count": 3})
    project.edit("ingest", "teachers", 0, "features", to=["pooled"])
    project.edit("ingest", "data", "unlabeled", to={"fraction": 0.2})
    answers = {}
    for mode in ("cached", "live"):
        project.edit("ingest", "teacher_mode", to=mode)
        result = project.kdpipe("run", "--stage", "ingest")
        assert result.returncode == 0, result.stderr
        indices = np.array([3, 7, 20])
        for split in ("train", "unlabeled"):
            for view in range(3):
                answers[mode, split, view] = teaching_of(project).outputs(split, indices, view)
    student = torch.zeros(3, 3)
    for split in ("train", "unlabeled"):
        for view in range(3):
            cached, live = (answers[mode, split, view] for mode in ("cached", "live"))
            assert cached.logits == pytest.approx(live.logits, abs=TEACHER_ROUNDING)
            assert cached.features[0] == pytest.approx(live.features[0], abs=TEACHER_ROUNDING)
            losses = [
                kl_loss(student, torch.tensor(a.logits), None, temperature=2.0).item()
                for a in (cached, live)
            ]
            # Its slope is T * p * (log(p / q) - KL): at T = 2, and for 3 classes, below 5 in all.
            assert losses[0] == pytest.approx(losses[1], abs=5 * TEACHER_ROUNDING)
        assert not np.allclose(
            answers["cached", split, 0].logits, answers["cached", split, 1].logits
        )
    assert project.kdpipe("run", "--stage", "distill").returncode == 0  # live


def test_unlabeled_patches_and_a_baseline(project):
    project.edit("ingest", "data", "unlabeled", to={"fraction": 0.5})
    project.edit("distill", "baselines", to=["no_teacher"])
    result = project.kdpipe("run", "--to", "distill")
    assert result.returncode == 0, result.stderr
    unlabeled = DatasetSplit.load(project.artifact("dataset") / "unlabeled")
    assert set(unlabeled.labels.tolist()) == {-1}
    distill = facts(project, "distill")
    assert distill["baselines"]["no_teacher"]["steps"] == distill["steps"]
    training = project.artifact("training")
    assert (training / "no_teacher.onnx").exists()
    assert (training / "no_teacher-metrics.csv").exists()
    columns = (training / "no_teacher-metrics.csv").read_text().splitlines()[0]
    assert "soft_loss" not in columns


def test_a_teacher_that_is_not_the_recorded_one_is_refused_before_training(project):
    project.edit("ingest", "teachers", 1, "recorded_top1", to=1.0)
    assert project.kdpipe("run", "--stage", "ingest").returncode == 0
    wrong = json.loads(json.dumps(project.contract))
    wrong["zscore"]["mu"] = [255 * v for v in wrong["zscore"]["mu"]]
    wrong["zscore"]["sigma"] = [255 * v for v in wrong["zscore"]["sigma"]]
    make_teacher(project.root / "teachers" / "dense_b.onnx", (3, 2, 1), wrong)
    result = project.kdpipe("run", "--to", "distill")
    assert result.returncode == 3
    assert "dense_b is not the teacher that was recorded: on validation top-1 0." in result.stderr
    assert "The seed draws val: if they were recorded on other patches, widen" in result.stderr
    assert "recorded 1 (limit 0.005)" in result.stderr
    assert "divided by 255 before the z-score 1.000" in result.stderr
    assert "distill" not in project.manifest["stages"]


def test_a_doubtful_teacher_is_pointed_out_and_nothing_is_switched(project):
    # Bands swapped in the config: every class but one is mistaken.
    project.edit("ingest", "teachers", 1, "bands", to=[1, 2, 3])
    project.edit("ingest", "doubtful_top1", to=1.0)
    result = project.kdpipe("run", "--stage", "ingest")
    assert result.returncode == 0
    assert "dense_b: top-1 on 60 validation patches by convention: the contract" in result.stderr
    member = facts(project, "ingest")["teachers"]["members"][1]
    assert member["conventions"]["the contract"] == pytest.approx(member["top1_val"])
    assert member["bands"] == [1, 2, 3]


def test_an_ensemble_of_probabilities_with_own_temperatures(project):
    project.edit("ingest", "combine", to="mean_probabilities")
    project.edit("ingest", "calibrate_temperatures", to=True)
    assert project.kdpipe("run", "--stage", "ingest").returncode == 0
    found = facts(project, "ingest")["teachers"]
    temperatures = [m["temperature"] for m in found["members"]]
    assert all(t != 1.0 for t in temperatures)
    teaching = teaching_of(project)
    assert teaching.val_members().shape == (2, 60, 3)
    val = combine(list(teaching.val_members()), [1, 1], "mean_probabilities", temperatures)
    labels = DatasetSplit.load(project.artifact("dataset") / "val").labels
    assert found["top1_val"] == pytest.approx((val.argmax(axis=1) == labels).mean())


@pytest.mark.parametrize("suffix", ["safetensors", pytest.param("pth", marks=pytest.mark.slow)])
def test_a_torch_teacher_with_local_weights(project, suffix):
    torch.manual_seed(0)
    network = timm.create_model("test_byobnet", num_classes=3, in_chans=2)
    path = project.root / "teachers" / f"torch.{suffix}"
    if suffix == "pth":
        torch.save({"state_dict": network.state_dict()}, path)
    else:
        save_file(network.state_dict(), path)
    given = {"path": f"teachers/torch.{suffix}", "timm": "test_byobnet", "bands": [0, 2]}
    project.edit("ingest", "teachers", 1, to={**given, "features": ["stages.1"]})
    result = project.kdpipe("run", "--to", "distill")
    assert result.returncode == 0, result.stderr
    member = facts(project, "ingest")["teachers"]["members"][1]
    assert (member["name"], member["opset"]) == ("torch", None)
    answer = teaching_of(project).outputs("train", np.arange(4), 0)
    assert answer.features[0].shape[0] == 4
    assert answer.features[0].ndim == 4
    if suffix == "pth":
        row = project.kdpipe("compare", "tiny").stdout.split("teacher torch |")[1].split("|")
        count = sum(parameter.numel() for parameter in network.parameters())
        assert row[1].strip() == f"{count:,}"
        assert int(row[2].replace(",", "")) > 1e5  # MACs
    (project.root / "teachers" / f"torch.{suffix}").write_bytes(b"nothing")
    result = project.kdpipe("run", "--stage", "ingest")
    assert result.returncode == 3
    assert f"torch.{suffix} is not a readable file of weights" in result.stderr


def test_a_torch_teacher_from_a_hub_needs_a_network_and_a_head_of_its_own(project, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    project.edit("ingest", "teachers", 1, to={"timm": "resnet18", "bands": [0, 1, 2]})
    result = project.kdpipe("run", "--stage", "ingest")
    assert result.returncode == 3
    assert "the weights of resnet18 can't be fetched (no network?)" in result.stderr


def test_shards_are_found_by_the_run(project):
    for name in ("train.npz", "test.npz"):
        with np.load(project.root / name) as archive:
            np.savez(project.root / name, **archive, other=archive["images"][::-1])
    check = project.kdpipe("label", "--check")
    assert check.returncode == 3
    assert "2 blocks are missing" in check.stderr
    for shard in ("1/2", "2/2"):
        assert project.kdpipe("label", "--shard", shard).returncode == 0
    check = project.kdpipe("label", "--check")
    assert (check.returncode, check.stdout) == (
        0,
        "val        1 of 1 blocks are there\ntrain      1 of 1 blocks are there\n",
    )
    blocks = list((project.root / "runs" / ".cache" / "labels").rglob("*.npz"))
    before = {path: path.stat().st_mtime_ns for path in blocks}
    assert len(before) == 4
    assert project.kdpipe("run", "--stage", "ingest").returncode == 0
    assert {path: path.stat().st_mtime_ns for path in blocks} == before
    assert project.kdpipe("label", "--shard", "3/2").returncode == 2
    project.edit("ingest", "data", "modalities", to={"optical": "other"})
    assert "2 blocks are missing" in project.kdpipe("label", "--check").stderr


@pytest.mark.slow
def test_two_processes_train_one_student(finished):
    result = finished.kdpipe(
        "run",
        "--stage",
        "distill",
        "--set",
        "distill.devices=2",
        "--set",
        "distill.accelerator=cpu",
        "--set",
        "distill.ema_decay=0.5",  # its weights get no gradients, which nobody must wait for
    )
    assert result.returncode == 0, result.stderr
    distill = facts(finished, "distill")
    assert distill["epochs"] == 2
    assert distill["steps"] == 2 * (180 // 64)  # a batch of 32 in each process
    assert distill["export"]["top1_agreement"] == 1.0
    assert not list((finished.folder / "scratch").iterdir())


@pytest.mark.slow
def test_torchrun_starts_the_processes_itself(finished):
    torchrun = Path(sys.executable).parent / "torchrun"
    command = [torchrun, "--nproc-per-node=2", "--no-python", torchrun.with_name("kdpipe"), "run"]
    options = ["distill.devices=2", "distill.accelerator=cpu", "distill.baselines=[no_teacher]"]
    words = [word for option in options for word in ("--set", option)]
    result = subprocess.run(
        [*command, "--stage", "distill", *words],
        cwd=finished.root,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert facts(finished, "distill")["steps"] == 2 * (180 // 64)


@pytest.mark.slow
def test_a_killed_training_goes_on_and_ends_as_if_it_had_not_been(finished):
    """SIGKILL in the middle, through the command line."""
    finished.edit("distill", "epochs", to=6)
    command = [Path(sys.executable).parent / "kdpipe", "run", "--stage", "distill"]
    child = subprocess.Popen(
        command, cwd=finished.root, stderr=subprocess.DEVNULL, start_new_session=True
    )
    deadline = time.monotonic() + 120
    while not list(finished.folder.glob("scratch/distill-*/student/checkpoints/last-epoch=2.ckpt")):
        assert time.monotonic() < deadline
        assert child.poll() is None
        time.sleep(0.02)
    os.killpg(child.pid, signal.SIGKILL)
    child.wait()
    assert finished.kdpipe("run", "--stage", "distill").returncode == 0
    resumed = (finished.artifact("training") / "metrics.csv").read_text()
    assert facts(finished, "distill")["resumed_after_epoch"] >= 3
    digest = finished.manifest["artifacts"]["student"]["sha256"]
    assert finished.kdpipe("run", "--stage", "distill", "--force").returncode == 0
    assert facts(finished, "distill")["resumed_after_epoch"] is None
    assert (finished.artifact("training") / "metrics.csv").read_text() == resumed
    assert finished.manifest["artifacts"]["student"]["sha256"] == digest


def test_kept_answers_and_copies_belong_to_the_array_that_they_came_from(project):
    for name in ("train", "test"):
        with np.load(project.root / f"{name}.npz") as file:
            images, labels = file["images"], file["labels"]
        others = np.roll(images, 3, axis=0)  # other patches of the same classes
        np.savez(project.root / f"{name}.npz", images=images, others=others, labels=labels)
    answers = {}
    for array in ("images", "others", "images"):
        words = ("--set", f"ingest.data.modalities={{optical: {array}}}")
        result = project.kdpipe("run", "--to", "ingest", "--set", "ingest.data.cache=true", *words)
        assert result.returncode == 0, result.stderr
        found = np.load(project.artifact("teaching") / "train-logits.npy")
        assert np.array_equal(answers.setdefault(array, found), found)
    assert not np.allclose(answers["images"], answers["others"])
