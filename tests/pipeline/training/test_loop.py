import csv
from dataclasses import replace

import msgspec
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tqdm import tqdm

from pipeline.data.dataset import DatasetSplit
from pipeline.data.views import take_view
from pipeline.params.distill import DistillParams, FeatureParams, QuantizationAwareParams
from pipeline.params.losses import LOSSES
from pipeline.params.sources import TeacherParams, ViewParams
from pipeline.run.errors import InputError, StageError
from pipeline.teachers.ensemble import Ensemble, Member
from pipeline.teachers.soft_targets import (
    SoftTargets,
    SoftTargetWriter,
    write_ensemble,
    write_val_members,
)
from pipeline.training.batches import Order, StudentBatches, balanced_weights
from pipeline.training.job import TrainingJob
from pipeline.training.loop import train
from pipeline.training.module import Distillation, lr_factor
from preprocessing.apply import student_tensor
from preprocessing.student_input import StudentInput

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


def store(folder, found):
    folder.mkdir(parents=True)
    for name in ("images", "labels", "rows"):
        np.save(folder / f"{name}.npy", getattr(found, name))


def write_teaching(folder, answers, views=1, features=()):
    """As ingest would: per split logits (views, N, 3), and features."""
    params = TeacherParams(bands=(0, 1, 2), path="t.onnx", features=tuple(f for f, _ in features))
    member = Member("t", params, False, 1.0, 3)
    ensemble = Ensemble((member,), "mean_logits", ViewParams(count=views, shift=1), 5)
    write_val_members(folder, 30, [(slice(None), [np.zeros((30, 3), np.float32)])])
    write_ensemble(folder, "cached", ensemble)
    for name, logits in answers.items():
        writer = SoftTargetWriter(folder, name, ensemble, logits.shape[1])
        writer.add(slice(None), [[logits, *(values for _, values in features)]])


def job(
    folder,
    *,
    said=None,
    seed=0,
    unlabeled=None,
    views=1,
    teacher_features=(),
    with_teacher=True,
    size=8,
    **params,
):
    """A training on 90 patches of 3 classes, whose teacher is always right unless told."""
    train_split = split(90, 1)
    right = np.eye(3, dtype=np.float32)[train_split.labels][None].repeat(views, axis=0) * 5
    answers = {"train": right if said is None else said}
    store(folder / "dataset" / "train", train_split)
    store(folder / "dataset" / "val", split(30, 2))
    if unlabeled is not None:
        found = split(unlabeled, 3)
        store(
            folder / "dataset" / "unlabeled",
            DatasetSplit(found.images, found.labels * 0 - 1, found.rows),
        )
        answers["unlabeled"] = (
            np.eye(3, dtype=np.float32)[found.labels][None].repeat(views, axis=0) * 5
        )
    write_teaching(folder / "teaching", answers, views, teacher_features)
    (folder / "dataset" / "dataset.json").write_text("{}")
    (folder / "given.json").write_text(replace(GIVEN, size_hw=(size, size)).to_json())
    settings = {
        "student": "test_byobnet",
        "epochs": 4,
        "batch_size": 16,
        "learning_rate": 0.01,
        "loggers": (),
        **params,
    }
    return TrainingJob(
        params=DistillParams(**settings),
        dataset=str(folder / "dataset"),
        teaching=str(folder / "teaching"),
        contract=str(folder / "no-contract"),
        student_input=str(folder / "given.json"),
        init=None,
        classes=3,
        seed=seed,
        with_teacher=with_teacher,
        folder=str(folder / "out"),
        logs=str(folder / "logs"),
    )


def quiet(what, total):
    return tqdm(total=total, disable=True)


def fit(folder, **options):
    given = job(folder, **options)
    facts = train(given, quiet)
    return given.load_trained(), facts, rows_of(folder)


def rows_of(folder):
    text = (folder / "out" / "metrics.csv").read_text()
    return [{k: float(v) for k, v in row.items()} for row in csv.DictReader(text.splitlines())]


def weights(student):
    return torch.cat([p.detach().flatten() for p in student.parameters()])


def answers_of(student, found):
    with torch.no_grad():
        logits = student(torch.from_numpy(student_tensor(found.images, GIVEN)))
    return logits.argmax(dim=1).numpy()


def test_it_learns_and_keeps_the_best_epochs(tmp_path):
    student, facts, rows = fit(tmp_path, keep_checkpoints=2)
    val = split(30, 2)
    assert (answers_of(student, val) == val.labels).mean() > 0.9
    curve = [row["val_top1"] for row in rows]
    assert len(curve) == 4
    assert curve[facts.best_epoch - 1] == max(curve)
    assert {"loss", "hard_loss", "soft_loss", "grad_norm", "lr", "val_loss"} <= set(rows[0])
    files = sorted(p.name for p in (tmp_path / "out").iterdir())
    # Checkpoints would name folders of this machine.
    assert files == [
        "best-1.safetensors",
        "best-2.safetensors",
        "metrics.csv",
        "student.safetensors",
    ]
    for name, score in zip(("best-1", "best-2"), sorted(curve, reverse=True), strict=False):
        student.load_state_dict(load_file(tmp_path / "out" / f"{name}.safetensors"))
        assert (answers_of(student, val) == val.labels).mean() == pytest.approx(score)


def test_the_logged_loss_is_the_weighted_sum_of_its_parts(tmp_path):
    _, facts, _ = fit(tmp_path, hard_weight=0.2, soft_weight=1.5)
    losses = facts.losses
    total = 0.2 * losses["hard_loss"] + 1.5 * losses["soft_loss"]
    assert losses["loss"] == pytest.approx(total, rel=1e-4)


def test_the_same_seed_gives_the_same_weights(tmp_path):
    one, same, other = (
        weights(fit(tmp_path / str(i), seed=seed, epochs=2)[0]) for i, seed in enumerate((0, 0, 1))
    )
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


@pytest.mark.slow
def test_the_threads_that_torch_is_given_elsewhere_change_nothing(tmp_path):
    before = torch.get_num_threads()
    found = []
    try:
        for outside, inside in ((1, 1), (2, 1), (2, None)):
            torch.set_num_threads(outside)
            student, facts, _ = fit(tmp_path / f"{outside}-{inside}", threads=inside, epochs=2)
            assert facts.threads == (inside or outside)
            assert torch.get_num_threads() == outside
            found.append(weights(student))
    finally:
        torch.set_num_threads(before)
    one, other, two = found
    assert torch.equal(one, other)
    assert not torch.equal(one, two), "if so, the default need not be fixed"


def test_with_soft_weight_alone_labels_do_not_matter_and_a_wrong_teacher_does(tmp_path):
    wrong = np.roll(np.eye(3, dtype=np.float32)[split(90, 1).labels] * 5, 1, axis=1)[None]
    student, _, _ = fit(tmp_path, said=wrong, hard_weight=0.0, soft_weight=1.0, epochs=6)
    val = split(30, 2)
    # The best epoch on val is the worst pupil of this teacher: look at the last one.
    rows = rows_of(tmp_path)
    assert rows[-1]["val_top1"] < 0.2
    assert (answers_of(student, val) == val.labels).mean() == max(r["val_top1"] for r in rows)


def test_a_loss_that_is_no_number_stops_with_advice(tmp_path):
    with pytest.raises(
        StageError, match=r"loss became nan in epoch 0; lower distill\.learning_rate"
    ):
        fit(tmp_path, said=np.full((1, 90, 3), np.nan, np.float32))


def test_unlabeled_patches_add_to_the_soft_loss_alone(tmp_path):
    given = job(tmp_path, unlabeled=30)
    splits = {n: DatasetSplit.load(tmp_path / "dataset" / n) for n in ("train", "unlabeled")}
    teaching = SoftTargets(tmp_path / "teaching", tmp_path / "none")
    data = StudentBatches(splits, GIVEN, teaching)
    assert len(data) == 120
    batch = data[(0, [3, 95, 88, 119])]
    assert batch.labels.tolist() == [0, 1, -1, -1]
    assert batch.logits.argmax(dim=1).tolist() == [0, 1, 5 % 3, 29 % 3]
    facts = train(given, quiet)
    assert facts.steps == 4 * (120 // 16)


def test_without_teacher_the_steps_stay_the_same_and_only_labelled_patches_are_seen(tmp_path):
    given = {"unlabeled": 300, "epochs": 1}
    taught = train(job(tmp_path / "a", **given), quiet)
    alone = job(tmp_path / "b", **given, with_teacher=False)
    facts = train(alone, quiet)
    assert facts.steps == taught.steps == 390 // 16
    assert "soft_loss" not in facts.losses
    # A teacher without weight is none: patches without labels would only be empty places.
    weightless, _, _ = fit(tmp_path / "c", **given, hard_weight=1.0, soft_weight=0.0)
    assert torch.equal(weights(weightless), weights(alone.load_trained()))


@pytest.mark.parametrize("given", [{"teacher": "ema", "ema_decay": 0.5}, {"teacher": "mutual"}])
def test_without_an_ensemble_patches_without_labels_teach_too(tmp_path, given):
    _, facts, _ = fit(tmp_path, unlabeled=70, epochs=1, **given)
    assert facts.steps == 160 // 16
    assert facts.losses["soft_loss"] > 0


def test_every_epoch_takes_its_view_of_images_and_answers_alike(tmp_path):
    teacher = np.random.default_rng(0).normal(size=(3, 90, 3)).astype(np.float32)
    job(tmp_path, said=teacher, views=3)
    found = DatasetSplit.load(tmp_path / "dataset" / "train")
    teaching = SoftTargets(tmp_path / "teaching", tmp_path / "none")
    data = StudentBatches({"train": found}, GIVEN, teaching)
    order = Order(90, 16, seed=0, views=3)
    for epoch in range(5):
        order.set_epoch(epoch)
        view, indices = next(iter(order))
        assert view == epoch % 3
        batch = data[(view, indices)]
        indices = np.sort(indices)
        seen = take_view(
            found.images[indices], found.rows[indices], view, teaching.ensemble.views, 5
        )
        assert np.array_equal(batch.tensor.numpy(), student_tensor(seen, GIVEN))
        assert np.array_equal(batch.logits.numpy(), teacher[view, indices])


class Killed(BaseException):
    """Stands for SIGKILL: nothing gets to clean up."""


def test_a_training_that_was_killed_goes_on_as_if_nothing_had_happened(tmp_path):
    whole = train(job(tmp_path / "whole", ema_decay=0.9), quiet)
    given = job(tmp_path / "killed", ema_decay=0.9)

    class Bar:
        """Kills in the middle of the third epoch."""

        steps = 0

        def __enter__(self):
            return self

        def __exit__(self, *error):
            return None

        def reset(self, total):
            self.steps = 0

        def update(self, n):
            self.steps += n
            if self.steps == 2 * 5 + 3:
                raise Killed

    with pytest.raises(Killed):
        train(given, lambda what, total: Bar())
    # A kill may also have come while a checkpoint was written.
    (tmp_path / "killed" / "out" / "checkpoints" / "last-epoch=7.ckpt").write_bytes(b"PK\3\4half")
    facts = train(given, quiet)
    assert facts.resumed_after_epoch == 2
    assert rows_of(tmp_path / "killed") == rows_of(tmp_path / "whole")
    other = replace(given, folder=str(tmp_path / "whole" / "out"))
    assert torch.equal(weights(given.load_trained()), weights(other.load_trained()))
    assert msgspec.structs.replace(facts, resumed_after_epoch=None) == whole


def test_other_processes_read_the_jobs_as_they_were_written(tmp_path):
    params = {
        "loss": LOSSES["dist"](intra_weight=0.5),
        "features": (FeatureParams("stages.1", "t/map"),),
        "quantization_aware": QuantizationAwareParams(share=0.5),
    }
    jobs = [job(tmp_path / "a"), job(tmp_path / "b", **params)]
    document = msgspec.json.encode(jobs)
    assert msgspec.json.decode(document, type=list[TrainingJob]) == jobs


def test_features_of_other_widths_and_sizes_are_matched_through_adapters(tmp_path):
    maps = np.random.default_rng(0).normal(size=(1, 90, 7, 2, 2)).astype(np.float32)
    vectors = np.random.default_rng(1).normal(size=(1, 90, 5)).astype(np.float32)
    pairs = (
        FeatureParams("stages.1", "t/map"),
        FeatureParams("final_conv", "t/vector"),
    )
    _, facts, rows = fit(
        tmp_path,
        teacher_features=(("map", maps), ("vector", vectors)),
        features=pairs,
        feature_weight=2.0,
    )
    losses = facts.losses
    total = sum(
        weight * losses[f"{name}_loss"]
        for name, weight in (("hard", 0.7), ("soft", 0.3), ("feature", 2.0))
    )
    assert losses["loss"] == pytest.approx(total, rel=1e-4)
    assert rows[-1]["feature_loss"] < rows[0]["feature_loss"]


@pytest.mark.parametrize(
    ("pair", "words"),
    [
        (FeatureParams("stage.1", "t/map"), r"student: there is no 'stage\.1'; near are stages"),
        (FeatureParams("stages.1", "t/mop"), r"teacher: there is no 't/mop'; near are t/map"),
    ],
)
def test_features_that_are_not_there_are_refused_with_near_names(tmp_path, pair, words):
    maps = np.zeros((1, 90, 7, 2, 2), np.float32)
    with pytest.raises(InputError, match=words):
        fit(tmp_path, teacher_features=(("map", maps),), features=(pair,), feature_weight=1.0)


def test_an_average_that_teaches_or_is_kept_follows_its_recurrence(tmp_path):
    _, _, rows = fit(tmp_path / "self", teacher="ema", ema_decay=0.9, epochs=2)
    assert rows[-1]["soft_loss"] > 0
    averaged, _, _ = fit(tmp_path / "kept", ema_decay=0.999, epochs=1)
    plain, _, _ = fit(tmp_path / "plain", epochs=1)
    start = job(tmp_path / "start").network()
    # The average begins after the first of five steps and then hardly moves.
    gone = (weights(averaged) - weights(start)).norm() / (weights(plain) - weights(start)).norm()
    assert 0 < gone < 0.3


def test_the_average_is_the_exponential_one(tmp_path):
    given = job(tmp_path)
    student = given.network()
    module = Distillation(student, msgspec.structs.replace(given.params, ema_decay=0.8), 10, seed=0)
    expected = None
    for step in range(4):
        with torch.no_grad():
            for parameter in student.parameters():
                parameter.add_(step + 1.0)
        module.average.update_parameters(student)
        now = weights(student)
        expected = now if expected is None else 0.8 * expected + 0.2 * now
    assert weights(module.best) == pytest.approx(expected, abs=1e-5)


def test_two_students_teach_each_other(tmp_path):
    _, facts, rows = fit(tmp_path, teacher="mutual", peer="test_resnet", epochs=2)
    assert {"soft_loss", "peer_loss"} <= set(facts.losses)
    total = 0.7 * rows[-1]["hard_loss"] + 0.3 * rows[-1]["soft_loss"] + rows[-1]["peer_loss"]
    assert rows[-1]["loss"] == pytest.approx(total, rel=1e-4)


@pytest.mark.parametrize(
    "params",
    [
        {"loss": LOSSES["dkd"](), "optimizer": "sgd"},
        {"loss": LOSSES["dist"](), "standardize_logits": True},
        {"schedule": "plateau", "class_weights": "balanced"},
        {"schedule": "step", "lr_step_epochs": 1, "sampling": "balanced"},
        {"gradient_checkpointing": True, "teacher": "mutual"},
        {"accumulate_batches": 2, "temperature_end": 1.0, "label_smoothing": 0.1},
        {"precision": "bf16-mixed", "student": "test_resnet", "workers": 1, "size": 32},
    ],
)
def test_every_way_to_train_learns(tmp_path, params):
    _, _, rows = fit(tmp_path, **params)
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert max(row["val_top1"] for row in rows) > 0.6


PLAIN = {"schedule": "constant", "warmup_epochs": 0, "weight_decay": 0.0, "epochs": 1}


def test_two_batches_accumulated_are_one_of_twice_the_size(tmp_path):
    """On a network without batch normalization, which would see the halves one by one."""
    given = {**PLAIN, "student": "test_convnext", "size": 32, "optimizer": "sgd"}
    one, _, _ = fit(tmp_path / "one", batch_size=30, **given)
    two, facts, _ = fit(tmp_path / "two", batch_size=15, accumulate_batches=2, **given)
    assert facts.steps == 3
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in one.modules())
    torch.testing.assert_close(weights(two), weights(one), atol=1e-5, rtol=0)


def test_gradients_are_clipped_to_their_norm_and_logged_before(tmp_path):
    clip = 0.01
    start = weights(job(tmp_path / "start").network())
    given = {**PLAIN, "batch_size": 90, "optimizer": "sgd", "gradient_clip": clip}
    student, _, rows = fit(tmp_path / "one", **given)  # one step; Nesterov makes it 1.9 times
    assert rows[0]["grad_norm"] > 10 * clip
    assert (weights(student) - start).norm().item() == pytest.approx(0.01 * 1.9 * clip, rel=0.01)


@pytest.mark.filterwarnings("ignore:The number of training batches")
def test_every_training_is_a_run_of_its_own_in_weights_and_biases(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    for name in ("student", "no_teacher"):
        given = job(tmp_path / name, loggers=("wandb",), epochs=1, with_teacher=name == "student")
        train(given, quiet)
        assert len(list((tmp_path / name / "logs" / "wandb").glob("offline-run-*"))) == 1


def test_early_stopping_waits_for_its_patience_and_a_kill_then_changes_nothing(
    tmp_path, monkeypatch
):
    given = {"learning_rate": 1e-9, "epochs": 8, "early_stop_patience": 2}
    _, facts, rows = fit(tmp_path / "whole", **given)
    assert len(rows) == facts.epochs == facts.best_epoch + 2 < 8

    def killed(*words):
        raise Killed

    monkeypatch.setattr("pipeline.training.loop._keep_weights", killed)
    late = job(tmp_path / "killed", **given)
    with pytest.raises(Killed):
        train(late, quiet)
    monkeypatch.undo()
    resumed = train(late, quiet)
    assert msgspec.structs.replace(resumed, resumed_after_epoch=None) == facts
    assert rows_of(tmp_path / "killed") == rows


def test_plateau_warms_up_to_the_full_rate_and_falls_when_nothing_gets_better(tmp_path):
    given = {"warmup_epochs": 2, "lr_patience": 0, "lr_gamma": 0.5, "epochs": 10}
    _, _, rows = fit(tmp_path, schedule="plateau", batch_size=90, **given)  # a step is an epoch
    expected, best, rate = [], -1.0, 1.0
    for row in rows:
        expected.append(0.005 if not expected else 0.01 * rate)
        rate *= 1.0 if row["val_top1"] > best else 0.5
        best = max(best, row["val_top1"])
    assert [row["lr"] for row in rows] == pytest.approx(expected)
    assert expected[1] == 0.01 > expected[-1]


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        ({"schedule": "constant"}, [0.25, 0.5, 0.75, 1, 1, 1, 1, 1, 1, 1, 1, 1]),
        (
            {"schedule": "step", "lr_step_epochs": 1, "lr_gamma": 0.1},
            [0.25, 0.5, 0.75, 1, 0.1, 0.1, 0.1, 0.1, 0.01, 0.01, 0.01, 0.01],
        ),
        (
            {"schedule": "cosine"},
            [0.25, 0.5, 0.75, 1, *(0.5 * (1 + np.cos(np.pi * k / 8)) for k in range(8))],
        ),
    ],
)
def test_the_learning_rate_follows_its_table(params, expected):
    given = DistillParams(epochs=3, warmup_epochs=1.0, **params)
    steps = 12
    found = [lr_factor(step, steps, given) for step in range(steps)]
    if params["schedule"] == "cosine":  # the peak is reached at the end of the warm-up
        expected = expected[:4] + expected[4:]
    assert found == pytest.approx(expected)


def test_an_order_shows_every_sample_once_and_each_process_its_part():
    orders = [Order(90, 8, seed=1, rank=rank, processes=2) for rank in (0, 1)]
    seen = [index for order in orders for _, batch in order for index in batch]
    assert len(seen) == len(set(seen)) == 80
    again = [index for order in orders for _, batch in order for index in batch]
    assert again == seen
    for order in orders:
        order.set_epoch(1)
    assert [index for order in orders for _, batch in order for index in batch] != seen


def test_an_order_that_goes_on_takes_the_next_epochs():
    whole, rest = Order(90, 8, seed=1, views=3), Order(90, 8, seed=1, views=3, first_epoch=5)
    for epoch in range(2):
        whole.set_epoch(5 + epoch)
        rest.set_epoch(epoch)
        assert list(rest) == list(whole)


def test_balanced_sampling_makes_classes_equally_frequent():
    labels = np.array([0] * 80 + [1] * 15 + [2] * 5 + [-1] * 50)
    weights = balanced_weights(labels, 4)
    shares = [weights[labels == c].sum() / weights.sum() for c in (0, 1, 2, -1)]
    assert shares == pytest.approx([2 / 9, 2 / 9, 2 / 9, 1 / 3])
    order = Order(150, 50, seed=0, weights=weights, steps=60)
    drawn = labels[[index for _, batch in order for index in batch]]
    assert np.bincount(drawn + 1) / 3000 == pytest.approx([1 / 3, 2 / 9, 2 / 9, 2 / 9], abs=0.03)
