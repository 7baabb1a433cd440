"""How a student is trained, as the section `distill` of kdpipe.yaml describes it."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from msgspec import Meta
from msgspec.structs import replace

from pipeline.params.losses import LOSSES, OLD_WEIGHTS, AnySoftLoss, Weight, gather_loss
from pipeline.run.parameters import PATH, UNKEYED, Params

Positive = Annotated[float, Meta(gt=0)]


class FeatureParams(Params, frozen=True):
    """A layer of the student that shall be like a tensor of a teacher."""

    student: str  # name of a module
    teacher: str  # name of the teacher / name of its tensor, one of ingest.teachers.features


class QuantizationAwareParams(Params, frozen=True):
    """The last epochs, trained on the int8 grid of the chip."""

    share: Annotated[float, Meta(ge=0, lt=1)] = 0.0  # of the epochs, at least one; 0: none
    learning_rate: Positive = 2e-4  # at its start; goes to 0
    control: bool = False  # trained too, for comparison: the same epochs in float


class DistillParams(Params, frozen=True):
    """How to train."""

    student: str = "resnet18"  # any network of timm, or mobilenetv4m, mobilenetv3s
    init: Annotated[str | None, PATH] = None  # file of weights to start from
    stem_stride: Annotated[int, Meta(ge=1, le=4)] | None = None  # of the first convolution
    teacher: Literal["ensemble", "ema", "mutual"] = "ensemble"  # who gives the soft targets
    peer: str | None = None  # second student of teacher: mutual; null: the same network
    epochs: Annotated[int, Meta(ge=1)] = 30
    batch_size: Annotated[int, Meta(ge=2)] = 128  # of one process
    optimizer: Literal["adamw", "sgd"] = "adamw"
    learning_rate: Positive = 1e-3
    weight_decay: Weight = 0.05
    schedule: Literal["cosine", "step", "plateau", "constant"] = "cosine"
    warmup_epochs: Weight = 1.0
    lr_gamma: Annotated[float, Meta(gt=0, le=1)] = 0.1  # factor of step and plateau
    lr_step_epochs: Annotated[int, Meta(ge=1)] = 10  # of schedule step
    lr_patience: Annotated[int, Meta(ge=0)] = 3  # epochs, of schedule plateau
    gradient_clip: Positive | None = 1.0  # norm
    gradient_checkpointing: bool = False  # less memory, more time: activations are computed twice
    accumulate_batches: Annotated[int, Meta(ge=1)] = 1
    precision: Literal["32", "bf16-mixed", "16-mixed"] = "32"
    early_stop_patience: Annotated[int, Meta(ge=1)] | None = None  # epochs without a better val
    keep_checkpoints: Annotated[int, Meta(ge=1)] = 3  # weights of so many best epochs
    ema_decay: Annotated[float, Meta(gt=0, lt=1)] | None = None  # average of weights
    hard_weight: Weight = 0.7  # of the cross-entropy with the labels
    soft_weight: Weight = 0.3  # of the soft loss
    feature_weight: Weight = 0.0  # of the mean squared error of features
    loss: AnySoftLoss = LOSSES["kl"]()
    standardize_logits: bool = False  # each row of logits to mean 0 and deviation 1 first
    temperature: Positive = 2.0
    temperature_end: Positive | None = None  # reached linearly in the last epoch; null: constant
    features: tuple[FeatureParams, ...] = ()
    quantization_aware: QuantizationAwareParams = QuantizationAwareParams()
    label_smoothing: Annotated[float, Meta(ge=0, lt=1)] = 0.0
    class_weights: Literal["none", "balanced"] = "none"  # of the cross-entropy
    sampling: Literal["uniform", "balanced"] = "uniform"  # balanced: every class equally often
    baselines: tuple[Literal["no_teacher"], ...] = ()  # trained too, for comparison
    accelerator: Literal["auto", "cpu", "gpu"] = "auto"
    threads: Annotated[int, Meta(ge=1)] | None = 1  # of torch on the CPU; null: torch's choice
    devices: Annotated[int, Meta(ge=1)] = 1
    num_nodes: Annotated[int, Meta(ge=1)] = 1
    strategy: str = "auto"  # of Lightning
    workers: Annotated[int, Meta(ge=0), UNKEYED] = 0  # processes that make batches
    loggers: Annotated[tuple[Literal["tensorboard", "wandb"], ...], UNKEYED] = ("tensorboard",)
    check_operators: Annotated[bool, UNKEYED] = True  # refuse a network that Metis can't run
    max_export_difference: Annotated[float, Meta(gt=0), UNKEYED] = 1e-3  # of logits

    @classmethod
    def translate(cls, section: dict[str, Any]) -> dict[str, Any]:
        """See `gather_loss`."""
        return gather_loss(section)

    def key_tree(self) -> dict[str, Any]:
        """The loss's weights beside its name, as earlier releases had them: their runs count."""
        old = {name: default for name, (_, default) in OLD_WEIGHTS.items()}
        return {**super().key_tree(), "loss": self.loss.name, **old, **self.loss.weights}


def float_phase(params: DistillParams) -> DistillParams:
    """The training without its last part on the int8 grid; its schedule ends with it."""
    share = params.quantization_aware.share
    last = max(1, round(share * params.epochs)) if share else 0
    return replace(params, epochs=params.epochs - last)


def describe_loss(params: DistillParams) -> str:
    """The loss as it is added up, such as 0.7 * CE + 0.3 * T^2 * KL, T = 2."""
    hard = "CE" if not params.label_smoothing else f"CE(smoothing {params.label_smoothing:g})"
    words = [f"{params.hard_weight:g} * {hard}"]
    temperature = f"{params.temperature:g}"
    if params.temperature_end is not None:
        temperature += f" to {params.temperature_end:g}"
    if params.soft_weight:
        source = {"ensemble": "", "ema": " (own average)", "mutual": " (peer)"}[params.teacher]
        words.append(f"{params.soft_weight:g} * {params.loss.term}{source}")
    if params.feature_weight:
        words.append(f"{params.feature_weight:g} * MSE of features")
    return " + ".join(words) + (f", T = {temperature}" if params.soft_weight else "")
