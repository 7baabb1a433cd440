"""The Lightning module around the losses, and the data that feeds it."""

from __future__ import annotations

import logging
import math
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning
import torch
from lightning.pytorch.callbacks import Callback, LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from safetensors.torch import save_file
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler, SequentialSampler

from pipeline.losses import hard_loss, soft_loss
from pipeline.stage import StageError
from preprocessing.apply import student_tensor

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor, nn
    from tqdm import tqdm

    from pipeline.splits import DatasetSplit
    from pipeline.stages.distill import DistillParams
    from preprocessing.contract import StudentInput

Batch = tuple["Tensor", "Tensor", "Tensor"]

# Lightning prints through a handler of its own; kdpipe's log already has its words.
logging.getLogger("lightning").handlers.clear()


class StudentBatches(Dataset[Batch]):
    """Whole batches of student tensors, labels and teacher logits, by lists of indices."""

    def __init__(
        self, split: DatasetSplit, given: StudentInput, teacher_logits: NDArray[np.float32] | None
    ) -> None:
        """Nothing is read before a batch is asked for; without teacher, its logits are empty."""
        self._split = split
        self._given = given
        self._teacher = teacher_logits

    def __len__(self) -> int:
        """The number of samples."""
        return len(self._split.labels)

    def __getitem__(self, indices: list[int]) -> Batch:
        """The batch of these samples: (N, C, H, W), (N,), (N, classes) or (N, 0)."""
        tensor = student_tensor(self._split.images[indices], self._given)
        labels = torch.from_numpy(self._split.labels[indices])
        if self._teacher is None:
            teacher = torch.empty(len(indices), 0)
        else:
            teacher = torch.from_numpy(self._teacher[indices])
        return torch.from_numpy(tensor), labels, teacher


class Distillation(lightning.LightningModule):
    """Trains a student on labels and teacher logits."""

    def __init__(self, student: nn.Module, params: DistillParams, steps: int) -> None:
        """Wrap the student; `steps` is the length of the learning-rate schedule."""
        super().__init__()
        self.student = student
        self._params = params
        self._steps = steps
        self._right = 0
        self._seen = 0

    def forward(self, tensor: Tensor) -> Tensor:
        """Logits of the student."""
        logits: Tensor = self.student(tensor)
        return logits

    def training_step(self, batch: Batch, batch_index: int) -> Tensor:
        """hard_weight * cross-entropy + soft_weight * T^2 * KL, each part logged."""
        tensor, labels, teacher = batch
        logits = self(tensor)
        hard = hard_loss(logits, labels)
        soft = soft_loss(logits, teacher, temperature=self._params.temperature)
        loss = self._params.hard_weight * hard + self._params.soft_weight * soft
        if not torch.isfinite(loss):
            raise StageError(
                f"the loss became {loss.item()} in epoch {self.current_epoch}; lower "
                "distill.learning_rate, or lengthen distill.warmup_epochs"
            )
        self.log_dict(
            {"loss": loss, "hard_loss": hard, "soft_loss": soft}, on_step=False, on_epoch=True
        )
        return loss

    def on_validation_epoch_start(self) -> None:
        """Count anew."""
        self._right = self._seen = 0

    def validation_step(self, batch: Batch, batch_index: int) -> None:
        """Count the right answers."""
        tensor, labels, _ = batch
        self._right += int((self(tensor).argmax(dim=1) == labels).sum())
        self._seen += len(labels)

    def on_validation_epoch_end(self) -> None:
        """Log top-1 over the whole validation split."""
        self.log("val_top1", self._right / max(1, self._seen))

    def configure_optimizers(self) -> Any:  # noqa: ANN401 - Lightning's own dictionary
        """AdamW; the learning rate warms up linearly, then follows a cosine to zero."""
        optimizer = torch.optim.AdamW(
            self.student.parameters(),
            lr=self._params.learning_rate,
            weight_decay=self._params.weight_decay,
        )
        warmup = max(1, round(self._steps * self._params.warmup_epochs / self._params.epochs))

        def factor(step: int) -> float:
            if step < warmup:
                return (step + 1) / warmup
            return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, self._steps - warmup)))

        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }


class _Bar(Callback):
    """Moves kdpipe's progress bar; Lightning's own writes to stdout, which belongs to programs."""

    def __init__(self, bar: tqdm[Any]) -> None:
        self._bar = bar

    def on_train_batch_end(self, *args: object, **kwargs: object) -> None:
        self._bar.update(1)


def train(
    student: nn.Module,
    params: DistillParams,
    given: StudentInput,
    splits: dict[str, DatasetSplit],
    teacher_logits: NDArray[np.float32],
    *,
    seed: int,
    folder: Path,
    progress: Callable[[str, int], tqdm[Any]],
) -> dict[str, Any]:
    """Train the student in place and leave it with the weights of its best validation epoch.

    Args:
        student: the network.
        params: how.
        given: the student's input.
        splits: "train" and "val".
        teacher_logits: float32, (N, classes), in the order of the training split.
        seed: of everything random.
        folder: gets student.safetensors (the best weights) and metrics.csv.
        progress: makes a progress bar.

    Returns:
        Facts: epochs, best epoch, its validation top-1, the last losses.

    Raises:
        StageError: the loss is no longer finite.
    """
    lightning.seed_everything(seed, verbose=False)
    train_batches = _loader(StudentBatches(splits["train"], given, teacher_logits), params, True)
    val_batches = _loader(StudentBatches(splits["val"], given, None), params, False)
    student.train()  # Lightning leaves a module in the mode it finds it in
    steps = params.epochs * len(train_batches)
    module = Distillation(student, params, steps)
    best = ModelCheckpoint(
        dirpath=folder, filename="best", monitor="val_top1", mode="max", save_weights_only=True
    )
    with progress(f"train {params.student}", steps) as bar:
        trainer = lightning.Trainer(
            max_epochs=params.epochs,
            accelerator=params.accelerator,
            devices=1,
            logger=CSVLogger(folder, name="", version=""),
            callbacks=[best, LearningRateMonitor("epoch"), _Bar(bar)],
            enable_progress_bar=False,
            enable_model_summary=False,
            gradient_clip_val=params.gradient_clip,
            log_every_n_steps=1,
            num_sanity_val_steps=0,
            deterministic="warn",
            default_root_dir=folder,
        )
        _fit(trainer, module, train_batches, val_batches)
    saved = torch.load(best.best_model_path, weights_only=True, map_location="cpu")
    module.load_state_dict(saved["state_dict"])
    module.cpu()
    # Lightning's checkpoint names folders of this machine; the weights alone can travel.
    Path(best.best_model_path).unlink()
    save_file(module.student.state_dict(), folder / "student.safetensors")
    return {
        "epochs": trainer.current_epoch,
        "best_epoch": int(saved["epoch"]) + 1,
        "losses": {
            name: float(trainer.callback_metrics[name])
            for name in ("loss", "hard_loss", "soft_loss")
        },
    }


def _fit(
    trainer: lightning.Trainer,
    module: Distillation,
    train_batches: DataLoader[Batch],
    val_batches: DataLoader[Batch],
) -> None:
    """Fit; an interruption comes out as the interruption it was.

    Lightning turns Ctrl-C into SystemExit(1) and leaves SIGINT ignored.
    """
    on_interrupt = signal.getsignal(signal.SIGINT)
    try:
        trainer.fit(module, train_batches, val_batches)
    except SystemExit as error:
        if isinstance(error.__context__, KeyboardInterrupt):
            raise error.__context__ from None
        raise
    finally:
        signal.signal(signal.SIGINT, on_interrupt)


def _loader(data: StudentBatches, params: DistillParams, shuffle: bool) -> DataLoader[Batch]:
    sampler = RandomSampler(data) if shuffle else SequentialSampler(data)
    # The last, short batch of an epoch is left out: batch normalization needs more than one sample.
    drop_last = shuffle and len(data) >= params.batch_size
    return DataLoader(
        data,
        batch_size=None,
        sampler=BatchSampler(sampler, params.batch_size, drop_last=drop_last),
    )
