"""Train a student: Lightning, resumed where a kill left it, in one process or several."""

from __future__ import annotations

import csv
import logging
import os
import pickle
import shutil
import signal
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any
from zipfile import BadZipFile

import lightning
import msgspec
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger
from msgspec.structs import replace
from safetensors.torch import save_file
from tqdm import tqdm

from pipeline.data.dataset import DatasetSplit
from pipeline.networks.build import build_student, checkpoint_gradients
from pipeline.params.distill import DistillParams
from pipeline.run.files import write_atomically
from pipeline.run.processes import announce
from pipeline.teachers.soft_targets import SoftTargets
from pipeline.training.batches import (
    InOrder,
    Order,
    StudentBatches,
    balanced_weights,
    class_shares,
    loader,
)
from pipeline.training.features import FeatureTaps
from pipeline.training.job import TrainingJob, TrainingOutcome
from pipeline.training.module import Distillation

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import nn
    from torch.utils.data import DataLoader

    from pipeline.training.batches import Batch


# Lightning prints through a handler of its own; kdpipe's log already has its words.
logging.getLogger("lightning").handlers.clear()


class _Bar(Callback):
    """Moves kdpipe's progress bar; Lightning's own writes to stdout, which belongs to programs."""

    def __init__(self, bar: tqdm[Any]) -> None:
        self._bar = bar

    def on_train_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> None:
        total = (trainer.max_epochs or 0) * trainer.num_training_batches
        self._bar.reset(total=int(total))
        self._bar.update(trainer.current_epoch * int(trainer.num_training_batches))

    def on_train_batch_end(self, *args: object, **kwargs: object) -> None:
        self._bar.update(1)


class _EarlyStopping(EarlyStopping):
    """Stops a training at once that had stopped before it was killed."""

    def on_train_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> None:
        trainer.should_stop = trainer.should_stop or self.wait_count >= self.patience


class _KeepHistory(Callback):
    """Writes the history as metrics.csv after every epoch."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def on_train_epoch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> None:
        if trainer.is_global_zero and isinstance(pl_module, Distillation):
            write_history(pl_module.history, self._path)


def write_history(history: Sequence[dict[str, float]], path: Path) -> None:
    """One row per epoch; columns are all names that occur."""
    names = list(dict.fromkeys(name for row in history for name in row))
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(history)


def train_all(
    jobs: Sequence[TrainingJob], folder: Path, progress: Callable[[str, int], tqdm[Any]]
) -> list[TrainingOutcome]:
    """Do several trainings one after the other, together with the processes that take part.

    Args:
        jobs: what to do.
        folder: of the run; followers find the jobs there.
        progress: makes a progress bar.

    Returns:
        What came of each, see `train`.
    """
    with announce(folder, msgspec.json.encode(list(jobs))):
        outcomes = [_train_once(job, progress) for job in jobs]
    return [outcome for outcome in outcomes if outcome is not None]


def take_part(file: Path) -> None:
    """Train along, as a process of higher rank, what a file describes."""
    for job in msgspec.json.decode(file.read_bytes(), type=list[TrainingJob]):
        _train_once(job, lambda what, total: tqdm(total=total, disable=True))


def _train_once(
    job: TrainingJob, progress: Callable[[str, int], tqdm[Any]]
) -> TrainingOutcome | None:
    """Train, or read what came of it, where a kill came in a later training of the stage."""
    file = Path(job.folder) / "checkpoints" / "facts.json"
    if file.exists():
        return msgspec.json.decode(file.read_bytes(), type=TrainingOutcome)
    outcome = train(job, progress)
    if outcome is not None:  # the first process writes
        file.parent.mkdir()
        write_atomically(file, msgspec.json.encode(outcome))
    return outcome


def train(job: TrainingJob, progress: Callable[[str, int], tqdm[Any]]) -> TrainingOutcome | None:
    """Train one student; `folder` gets student.safetensors, best-<k>.safetensors, metrics.csv.

    Args:
        job: what to do.
        progress: makes a progress bar.

    Returns:
        What came of it; None in a process of higher rank.

    Raises:
        InputError: a layer or tensor that features name is not there.
        StageError: the loss is no longer finite.
    """
    params, folder = job.params, Path(job.folder)
    folder.mkdir(parents=True, exist_ok=True)
    lightning.seed_everything(job.seed, verbose=False)
    student = job.network()
    if params.gradient_checkpointing:
        checkpoint_gradients(student, params.student)
    best, last = _checkpoints(job, folder)
    checkpoint = _resume_point(folder / "checkpoints")
    with progress(f"train {params.student}", 1) as bar:
        trainer = _trainer(job, [_KeepHistory(folder / "metrics.csv"), best, last, _Bar(bar)])
        module, batches = _module(job, student, trainer)
        _fit(trainer, module, batches, _val_batches(job), checkpoint, params.threads)
        _finish(trainer.loggers)
    if not trainer.is_global_zero:
        return None
    best_epoch = _keep_weights(best, module, folder)
    shutil.rmtree(folder / "checkpoints")  # they name folders of this machine; weights can travel
    write_history(module.history, folder / "metrics.csv")
    return TrainingOutcome(
        epochs=len(module.history),
        steps=trainer.global_step,
        best_epoch=best_epoch + 1,
        losses={n: v for n, v in module.history[-1].items() if n.endswith("loss")},
        threads=params.threads or torch.get_num_threads(),
        resumed_after_epoch=None if checkpoint is None else _epoch_of(checkpoint) + 1,
    )


def _module(
    job: TrainingJob, student: nn.Module, trainer: lightning.Trainer
) -> tuple[Distillation, DataLoader[Batch]]:
    """The student with its losses, and the batches that it learns from."""
    params = job.params
    teaching = SoftTargets(Path(job.teaching), Path(job.contract))
    by_ensemble = job.soft and params.teacher == "ensemble"
    data = StudentBatches(_splits(job), job.data.student_input, teaching, answers=by_ensemble)
    order = _order(job, data, teaching, trainer.world_size, trainer.global_rank)
    taps = _taps(job, student, data, teaching)
    student.train()  # Lightning leaves a module in the mode it finds it in
    module = Distillation(
        student,
        params if job.with_teacher else without_teacher(params),
        params.epochs * -(-len(order) // params.accumulate_batches),
        seed=job.seed,
        taps=taps,
        task=job.data.task,
        peer=_peer(job),
        class_weights=_class_weights(job, data),
    )
    return module, loader(data, order, params.workers)


def _val_batches(job: TrainingJob) -> DataLoader[Batch]:
    data = StudentBatches({"val": job.data.val}, job.data.student_input, None)
    return loader(data, InOrder(len(data), job.params.batch_size), job.params.workers)


def _checkpoints(job: TrainingJob, folder: Path) -> tuple[ModelCheckpoint, ModelCheckpoint]:
    """The best epochs' weights, and everything of the last epoch."""
    best = ModelCheckpoint(
        dirpath=folder / "checkpoints",
        filename="best-{epoch}",
        monitor=job.data.task.monitor,
        mode="max",
        save_top_k=job.params.keep_checkpoints,
        save_weights_only=True,
        save_on_train_epoch_end=True,
    )
    # Lightning writes the new file before it deletes the old one: there is always a whole one.
    last = ModelCheckpoint(
        dirpath=folder / "checkpoints",
        filename="last-{epoch}",
        monitor=None,
        save_top_k=1,
        save_on_train_epoch_end=True,
    )
    return best, last


def _trainer(job: TrainingJob, callbacks: list[Callback]) -> lightning.Trainer:
    params = job.params
    if params.early_stop_patience is not None:
        patience = params.early_stop_patience
        early = _EarlyStopping(
            job.data.task.monitor, mode="max", patience=patience, check_on_train_epoch_end=True
        )
        callbacks = [*callbacks, early]
    return lightning.Trainer(
        max_epochs=params.epochs,
        accelerator=params.accelerator,
        devices=params.devices,
        num_nodes=params.num_nodes,
        strategy=params.strategy,
        precision=params.precision,
        accumulate_grad_batches=params.accumulate_batches,
        logger=_loggers(params, Path(job.logs)),
        callbacks=callbacks,
        enable_progress_bar=False,
        enable_model_summary=False,
        gradient_clip_val=params.gradient_clip,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,  # Order divides the samples among the processes
        deterministic="warn",
        default_root_dir=Path(job.folder),
    )


def without_teacher(params: DistillParams) -> DistillParams:
    """The same training with the labels alone."""
    return replace(
        params,
        hard_weight=1.0,
        soft_weight=0.0,
        feature_weight=0.0,
        features=(),
        teacher="ensemble",
    )


def _splits(job: TrainingJob) -> dict[str, DatasetSplit]:
    splits = {"train": job.data.train}
    if job.soft and job.data.unlabeled is not None:
        splits["unlabeled"] = job.data.unlabeled
    return splits


def _order(
    job: TrainingJob, data: StudentBatches, teaching: SoftTargets, processes: int, rank: int
) -> Order:
    """The batches of an epoch; a training without teacher takes as many steps as one with."""
    params = job.params
    weights = (
        balanced_weights(data.labels(), job.classes) if params.sampling == "balanced" else None
    )
    steps = None
    if not job.soft and job.data.unlabeled is not None:
        samples = len(data) + len(job.data.unlabeled)
        steps = max(1, samples // (params.batch_size * processes))
    return Order(
        len(data),
        params.batch_size,
        seed=job.seed,
        views=teaching.ensemble.views.count,
        steps=steps,
        weights=weights,
        first_epoch=job.first_epoch,
        rank=rank,
        processes=processes,
    )


def _taps(
    job: TrainingJob, student: nn.Module, data: StudentBatches, teaching: SoftTargets
) -> FeatureTaps | None:
    if not job.with_teacher or not job.params.features:
        return None
    batch = data[(0, [0, 1])]
    names = teaching.ensemble.feature_names
    return FeatureTaps(student, job.params.features, names, batch.tensor, batch.features)


def _peer(job: TrainingJob) -> nn.Module | None:
    if not job.with_teacher or job.params.teacher != "mutual":
        return None
    name = job.params.peer or job.params.student
    peer = build_student(
        name,
        job.data.student_input,
        job.classes,
        seed=job.seed + 1,
        stem_stride=job.params.stem_stride,
    )
    if job.params.gradient_checkpointing:
        checkpoint_gradients(peer, name)
    return peer.train()


def _class_weights(job: TrainingJob, data: StudentBatches) -> torch.Tensor | None:
    if job.params.class_weights == "none":
        return None
    shares = class_shares(data.labels(), job.classes)
    present = shares > 0
    weights = np.zeros(job.classes, np.float32)
    weights[present] = 1 / (present.sum() * shares[present])  # their mean over the samples is 1
    return torch.from_numpy(weights)


def _loggers(params: DistillParams, folder: Path) -> list[Logger]:
    loggers: list[Logger] = []
    if "tensorboard" in params.loggers:
        loggers.append(TensorBoardLogger(folder, name="", version=""))
    if "wandb" in params.loggers:
        loggers.append(WandbLogger(save_dir=folder, offline="WANDB_API_KEY" not in os.environ))
    return loggers


def _finish(loggers: Sequence[Logger]) -> None:
    """Else a second training of this process would be logged as the first one going on."""
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            logger.experiment.finish()


def _resume_point(folder: Path) -> Path | None:
    """The checkpoint of the last epoch that was written whole."""
    checkpoints = sorted(folder.glob("last-epoch=*.ckpt"), key=_epoch_of, reverse=True)
    for path in checkpoints:
        try:
            torch.load(path, weights_only=False, map_location="cpu", mmap=True)
        except (RuntimeError, EOFError, OSError, BadZipFile, pickle.UnpicklingError):
            path.unlink()  # a kill came while it was written
            continue
        return path
    return None


def _epoch_of(checkpoint: Path) -> int:
    return int(checkpoint.stem.rpartition("=")[2])


def _keep_weights(best: ModelCheckpoint, module: Distillation, folder: Path) -> int:
    """Write the weights of the best epochs, best first; leave the best in the module."""
    ranked = sorted(best.best_k_models.items(), key=lambda item: -float(item[1]))
    best_epoch = -1
    for place, (path, _) in reversed(list(enumerate(ranked, start=1))):
        saved = torch.load(path, weights_only=True, map_location="cpu")
        module.cpu().load_state_dict(saved["state_dict"])
        save_file(module.best.state_dict(), folder / f"best-{place}.safetensors")
        best_epoch = int(saved["epoch"])
    shutil.copyfile(folder / "best-1.safetensors", folder / "student.safetensors")
    return best_epoch


def _fit(
    trainer: lightning.Trainer,
    module: Distillation,
    train_batches: Any,  # noqa: ANN401 - a DataLoader
    val_batches: Any,  # noqa: ANN401 - likewise
    resumed: Path | None,
    threads: int | None,
) -> None:
    """Fit, on so many threads; an interruption comes out as the interruption it was.

    Lightning turns Ctrl-C into SystemExit(1) and leaves SIGINT ignored.
    """
    on_interrupt = signal.getsignal(signal.SIGINT)
    threads_before = torch.get_num_threads()
    torch.set_num_threads(threads or threads_before)
    try:
        with warnings.catch_warnings():
            # A training that goes on finds its checkpoints there, as it should.
            warnings.filterwarnings("ignore", "Checkpoint directory .* exists and is not empty")
            trainer.fit(module, train_batches, val_batches, ckpt_path=resumed)
    except SystemExit as error:
        if isinstance(error.__context__, KeyboardInterrupt):
            raise error.__context__ from None
        raise
    finally:
        signal.signal(signal.SIGINT, on_interrupt)
        torch.set_num_threads(threads_before)
        if trainer.is_global_zero:
            _take_host_from_names(trainer.loggers)


def _take_host_from_names(loggers: list[Logger]) -> None:
    """TensorBoard calls its files after the host; a run folder names none."""
    for logger in loggers:
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.close()
            for path in Path(logger.log_dir).glob("*.tfevents.*"):
                kind, _, rest = path.name.partition(".tfevents.")
                path.rename(path.with_name(f"{kind}.tfevents.{rest.partition('.')[0]}"))
