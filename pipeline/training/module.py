"""The Lightning module around the losses: who teaches, what is added up, what is averaged."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import lightning
import numpy as np
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from pipeline.run.errors import StageError
from pipeline.tasks.task import DEFAULT_TASK, open_task
from pipeline.training.features import FeatureTaps
from pipeline.training.losses.hard import hard_loss, label_log_probabilities, mean_loss
from pipeline.training.losses.softening import loss_function
from preprocessing.scores import decide

if TYPE_CHECKING:
    from torch import Tensor

    from pipeline.params.distill import DistillParams
    from pipeline.tasks.task import Task
    from pipeline.training.batches import Batch


#: History of a run: one row per epoch, name -> value.
History = list[dict[str, float]]


class Distillation(lightning.LightningModule):
    """Trains a student on labels and on what its teacher says."""

    def __init__(
        self,
        student: nn.Module,
        params: DistillParams,
        steps: int,
        *,
        seed: int,
        taps: FeatureTaps | None = None,
        task: Task | None = None,
        peer: nn.Module | None = None,
        class_weights: Tensor | None = None,
    ) -> None:
        """Wrap the student.

        Args:
            student: the network.
            params: how.
            steps: optimizer steps of the whole training.
            seed: of everything random inside an epoch.
            taps: what to match between student and teachers.
            task: what a score is; None: the default.
            peer: second student of mutual distillation, of the same classes.
            class_weights: float32, (classes,), of the cross-entropy.
        """
        super().__init__()
        self.student = student
        self.peer = peer
        self.taps = taps
        self.history: History = []
        self._params = params
        self._soft_loss = loss_function(params.loss)
        self._steps = steps
        self._seed = seed
        self.class_weights: Tensor | None
        self.register_buffer("class_weights", class_weights, persistent=False)
        decay = params.ema_decay
        self.average = (
            AveragedModel(student, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)  # type: ignore[no-untyped-call]
            if decay is not None
            else None
        )
        if self.average is not None:  # else the optimizer and other processes wait for gradients
            self.average.requires_grad_(False)
        self._task = task or open_task(DEFAULT_TASK)
        self._metric = self._task.metric()
        self._label_log_probabilities: list[Tensor] = []  # of validation, block by block
        self._seen: dict[str, list[Tensor]] = {}  # name -> one value per step of this epoch

    @property
    def best(self) -> nn.Module:
        """The network that is validated and kept: the average of weights where there is one."""
        if self.average is not None and self._params.teacher != "ema":
            averaged: nn.Module = self.average.module
            return averaged
        return self.student

    def on_train_epoch_start(self) -> None:
        """Chance inside an epoch depends on its number alone, so that resuming changes nothing."""
        state = np.random.SeedSequence([self._seed, self.current_epoch, self.global_rank])
        torch.manual_seed(int(state.generate_state(1)[0]))
        self._seen = {}

    def training_step(self, batch: Batch, batch_index: int) -> Tensor:
        """The weighted sum of all losses, each kept by name."""
        logits = self.student(batch.tensor)
        parts = {"hard_loss": self._hard(logits, batch.labels)}
        loss = self._params.hard_weight * parts["hard_loss"]
        if self.peer is not None:
            peer = self.peer(batch.tensor)
            parts["soft_loss"] = self._soft(logits, peer, batch.labels)
            parts["peer_loss"] = self._params.hard_weight * self._hard(peer, batch.labels)
            parts["peer_loss"] += self._params.soft_weight * self._soft(peer, logits, batch.labels)
            loss = loss + self._params.soft_weight * parts["soft_loss"] + parts["peer_loss"]
        elif self._params.soft_weight:
            teacher = batch.logits if self._params.teacher == "ensemble" else self._average(batch)
            parts["soft_loss"] = self._soft(logits, teacher, batch.labels)
            loss = loss + self._params.soft_weight * parts["soft_loss"]
        if self.taps is not None:
            parts["feature_loss"] = self.taps.loss(batch.features)
            loss = loss + self._params.feature_weight * parts["feature_loss"]
        if not torch.isfinite(loss):
            raise StageError(
                f"the loss became {loss.item()} in epoch {self.current_epoch}; lower "
                "distill.learning_rate, lengthen distill.warmup_epochs, or use precision 32"
            )
        self._keep({"loss": loss, **parts})
        return loss

    def _keep(self, values: dict[str, Tensor]) -> None:
        """For the epoch's mean; Lightning's own takes a tenth of a small student's step."""
        for name, value in values.items():
            self._seen.setdefault(name, []).append(value.detach())

    def _average(self, batch: Batch) -> Tensor:
        assert self.average is not None
        self.average.eval()
        with torch.no_grad():
            logits: Tensor = self.average(batch.tensor)
        return logits

    def _hard(self, logits: Tensor, labels: Tensor) -> Tensor:
        return hard_loss(
            logits,
            labels,
            label_smoothing=self._params.label_smoothing,
            class_weights=self.class_weights,
        )

    def _soft(self, logits: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        return self._soft_loss(
            logits,
            teacher,
            labels,
            temperature=temperature_at(self.current_epoch, self._params),
            standardize=self._params.standardize_logits,
            **self._params.loss.weights,
        )

    def on_train_batch_end(self, outputs: object, batch: Batch, batch_index: int) -> None:
        """Move the average after every optimizer step."""
        last = batch_index + 1 == self.trainer.num_training_batches
        if self.average is not None and (
            last or (batch_index + 1) % self._params.accumulate_batches == 0
        ):
            self.average.update_parameters(self.student)

    def on_validation_epoch_start(self) -> None:
        """Start anew."""
        self._metric = self._task.metric()
        self._label_log_probabilities = []

    def validation_step(self, batch: Batch, batch_index: int) -> None:
        """Count the decisions, and keep how likely the labels were."""
        logits, labels = self.best(batch.tensor).float().cpu(), batch.labels.cpu()
        self._metric.add(decide(logits.numpy()), labels.numpy())
        self._label_log_probabilities.append(label_log_probabilities(logits, labels))

    def on_validation_epoch_end(self) -> None:
        """Log score and cross-entropy of the whole validation split, and end a row of history."""
        values = {
            self._task.monitor: self._metric.score().value,
            "val_loss": float(mean_loss(torch.cat(self._label_log_probabilities))),
        }
        # Every process has its own running means; the first one's student is what is kept.
        self.log_dict(self.trainer.strategy.broadcast(values))

    def on_train_epoch_end(self) -> None:
        """Log the means, and add this epoch to the history, which the checkpoints carry."""
        means = {name: torch.stack(values).mean() for name, values in self._seen.items()}
        self.log_dict(means, sync_dist=True)
        optimizer = self.optimizers(use_pl_optimizer=False)
        assert isinstance(optimizer, torch.optim.Optimizer)
        metrics = {name: float(value) for name, value in self.trainer.callback_metrics.items()}
        self.history.append(
            {"epoch": self.current_epoch, "lr": optimizer.param_groups[0]["lr"], **metrics}
        )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the history."""
        checkpoint["history"] = self.history

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take it back."""
        self.history = list(checkpoint["history"])

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip by norm, and log the norm before."""
        limit = self._params.gradient_clip or math.inf
        norm = nn.utils.clip_grad_norm_([p for p in self.parameters() if p.requires_grad], limit)
        self._keep({"grad_norm": norm})

    def optimizer_step(
        self,
        epoch: int,
        batch_idx: int,
        optimizer: Any,  # noqa: ANN401 - Lightning wraps it
        optimizer_closure: Any = None,  # noqa: ANN401 - likewise
    ) -> None:
        """Warm up before a plateau schedule too, which itself knows epochs only."""
        warmup = warmup_steps(self._steps, self._params)
        if self._params.schedule == "plateau" and self.global_step < warmup:
            factor = lr_factor(self.global_step, self._steps, self._params)
            for group in optimizer.param_groups:
                group["lr"] = factor * self._params.learning_rate
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)

    def configure_optimizers(self) -> Any:  # noqa: ANN401 - Lightning's own dictionary
        """The optimizer, and its learning rate over steps (plateau: over epochs)."""
        params = self._params
        parameters = [p for p in self.parameters() if p.requires_grad]
        optimizer: torch.optim.Optimizer
        if params.optimizer == "sgd":
            optimizer = torch.optim.SGD(
                parameters,
                lr=params.learning_rate,
                momentum=0.9,
                nesterov=True,
                weight_decay=params.weight_decay,
            )
        else:
            optimizer = torch.optim.AdamW(
                parameters, lr=params.learning_rate, weight_decay=params.weight_decay
            )
        if params.schedule == "plateau":
            plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(
                optimizer, mode="max", factor=params.lr_gamma, patience=params.lr_patience
            )
            monitored = {"scheduler": plateau, "interval": "epoch", "monitor": self._task.monitor}
            return {"optimizer": optimizer, "lr_scheduler": monitored}
        per_step = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: lr_factor(step, self._steps, params)
        )
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": per_step, "interval": "step"},
        }


def temperature_at(epoch: int, params: DistillParams) -> float:
    """The temperature of an epoch, from 0: linear, `temperature_end` in the last one."""
    start, end = params.temperature, params.temperature_end
    if end is None:
        return start
    return start + (end - start) * min(1.0, epoch / max(1, params.epochs - 1))


def warmup_steps(steps: int, params: DistillParams) -> int:
    """How many of the optimizer steps of the whole training warm up."""
    return round(steps * min(1.0, params.warmup_epochs / params.epochs))


def lr_factor(step: int, steps: int, params: DistillParams) -> float:
    """What the learning rate is multiplied with at an optimizer step.

    Linear warm-up; then a cosine to 0, or `lr_gamma` after every `lr_step_epochs` epochs, or 1.

    Args:
        step: from 0.
        steps: of the whole training.
        params: the section `distill`.
    """
    warmup = warmup_steps(steps, params)
    if step < warmup:
        return (step + 1) / warmup
    if params.schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warmup) / max(1, steps - warmup))))
    if params.schedule == "step":
        epoch = step * params.epochs // max(1, steps)
        return float(params.lr_gamma ** (epoch // params.lr_step_epochs))
    return 1.0
