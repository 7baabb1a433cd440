"""Is this the teacher that was trained? Its figures, and what it says under other conventions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.data.blocks import BLOCK
from pipeline.facts import RuleFacts
from pipeline.params.sources import RULES
from pipeline.tasks.task import DEFAULT_TASK, open_task
from pipeline.teachers.ensemble import combine
from preprocessing.apply import scale, teacher_tensor, to_nchw
from preprocessing.contract import GREY_MAX
from preprocessing.resize import resize_float
from preprocessing.scores import decide, mean_and_std

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from numpy.typing import NDArray

    from pipeline.params.sources import Rule
    from pipeline.tasks.task import Table, Task
    from pipeline.teachers.teacher import Teacher

    Prepare = Callable[[NDArray[np.generic]], NDArray[np.float32]]


@dataclass(frozen=True)
class RecordMismatch:
    """A figure of a teacher that is not what was recorded when it was trained."""

    figure: str
    recorded: float
    measured: float
    limit: float

    def __str__(self) -> str:
        return (
            f"{self.figure} {self.measured:.4g}, recorded {self.recorded:.4g} "
            f"(limit {self.limit:g})"
        )


@dataclass(frozen=True)
class TeacherFigures:
    """What one teacher says on the validation split."""

    score: float  # fraction
    ece_val: float  # expected calibration error
    logit_mean: float
    logit_std: float
    input_min: float  # of the tensor that the network sees
    input_max: float


def describe_member(
    teacher: Teacher,
    logits: NDArray[np.float32],
    labels: NDArray[np.int64],
    sample: NDArray[Any],
    task: Task | None = None,
) -> TeacherFigures:
    """Figures of one teacher on the validation split.

    Args:
        teacher: the teacher.
        logits: (N, classes, ...), perhaps memory-mapped: they are read block by block.
        labels: (N, ...).
        sample: some stored patches of its bands.
        task: what a score is; None: the default.
    """
    tensor = teacher.prepare(sample)
    score, calibration_error = _score(
        ((rows, logits[rows]) for rows in row_blocks(labels)), labels, task
    )
    mean, std = mean_and_std(lambda: (logits[rows] for rows in row_blocks(labels)))
    return TeacherFigures(
        score=score,
        ece_val=calibration_error,
        logit_mean=mean,
        logit_std=std,
        input_min=float(tensor.min()),
        input_max=float(tensor.max()),
    )


def describe_ensemble(
    members: Sequence[NDArray[np.float32]],
    weights: Sequence[float],
    temperatures: Sequence[float],
    labels: NDArray[np.int64],
    task: Task | None = None,
) -> tuple[dict[str, RuleFacts], tuple[tuple[float, ...], ...]]:
    """Score and calibration error under both rules, and how often members agree.

    Args:
        members: logits, each (N, classes, ...), perhaps memory-mapped.
        weights: of the members.
        temperatures: of the members.
        labels: (N, ...).
        task: what a score is; None: the default.
    """

    def blocks(rule: Rule) -> Iterator[tuple[slice, NDArray[np.float32]]]:
        for rows in row_blocks(labels):
            yield rows, combine([m[rows] for m in members], weights, rule, temperatures)

    rules = {rule: RuleFacts(*_score(blocks(rule), labels, task)) for rule in RULES}
    classes = [np.concatenate([decide(m[rows]) for rows in row_blocks(labels)]) for m in members]
    return rules, tuple(
        tuple(float((row == column).mean()) for column in classes) for row in classes
    )


def _score(
    blocks: Iterable[tuple[slice, NDArray[np.float32]]],
    labels: NDArray[np.int64],
    task: Task | None,
) -> tuple[float, float]:
    """Score and calibration error."""
    table: Table | None = None
    for rows, logits in blocks:
        table = table or (task or open_task(DEFAULT_TASK)).table(logits.shape[1])
        table.add(logits, labels[rows])
    assert table is not None, "a split has patches"
    figures = table.figures()
    return figures["score"], figures["ece"]


def row_blocks(labels: NDArray[np.int64]) -> Iterator[slice]:
    """The positions of a split, some at a time."""
    return (slice(start, start + BLOCK) for start in range(0, len(labels), BLOCK))


def check_records(
    teacher: Teacher,
    figures: TeacherFigures,
    max_score: float,
    max_logits: float,
    *,
    probabilities: bool = False,
) -> list[RecordMismatch]:
    """Which recorded figures a teacher does not reproduce.

    Args:
        teacher: with `params.recorded_...`.
        figures: of `describe_member`.
        max_score: how far the score may be off.
        max_logits: how far mean and standard deviation of the logits may be off, as a share of
            the recorded standard deviation.
        probabilities: the teacher gives these; its logits are known but for one number per patch,
            and what was recorded of them can't be compared.
    """
    params = teacher.params
    spread = params.recorded_logit_std or figures.logit_std or 1.0
    checks = (
        ("top-1", params.recorded_score, figures.score, max_score),
        ("mean logit", params.recorded_logit_mean, figures.logit_mean, max_logits * spread),
        ("logit std", params.recorded_logit_std, figures.logit_std, max_logits * spread),
    )
    return [
        RecordMismatch(figure, recorded, measured, limit)
        for figure, recorded, measured, limit in checks
        if recorded is not None
        and not (probabilities and "logit" in figure)
        and not abs(measured - recorded) <= limit
    ]


def try_conventions(
    teacher: Teacher, patches: NDArray[Any], labels: NDArray[np.int64]
) -> dict[str, float]:
    """Top-1 of a teacher on some labeled patches, under every convention met in the wild.

    Args:
        teacher: the teacher.
        patches: stored values of its bands, in its order, (N, H, W, C).
        labels: (N,).

    Returns:
        Fraction by convention; the contract's own is the first. Nothing is switched by it.
    """
    return {
        name: _score([(slice(None), teacher.outputs(patches, prepare)[0])], labels, None)[0]
        for name, prepare in _conventions(teacher).items()
    }


def _conventions(teacher: Teacher) -> dict[str, Prepare]:
    scaling, zscore = teacher.channels.scaling, teacher.channels.zscore
    first_bands = teacher.channels.take(range(len(teacher.bands)))
    interpolation = teacher.params.resize

    def resize_values(values: NDArray[np.float32]) -> NDArray[np.float32]:
        return to_nchw(resize_float(values, teacher.size_hw, interpolation))

    def scale_only(divisor: float) -> Prepare:
        return lambda patches: resize_values(scale(patches, scaling) / np.float32(divisor))

    conventions: dict[str, Prepare] = {
        "the contract": teacher.prepare,
        "no z-score (as if the graph did it)": scale_only(1.0),
        "divided by 255, no z-score": scale_only(GREY_MAX),
        "stored values as they are": lambda patches: resize_values(patches.astype(np.float32)),
        "bands reversed": lambda patches: np.ascontiguousarray(teacher.prepare(patches)[:, ::-1]),
    }
    if zscore is not None:
        mu, sigma = (np.array(v, np.float32) for v in (zscore.mu, zscore.sigma))

        def divide_first(patches: NDArray[np.generic]) -> NDArray[np.float32]:
            return resize_values((scale(patches, scaling) / np.float32(GREY_MAX) - mu) / sigma)

        conventions["divided by 255 before the z-score"] = divide_first
        conventions["mu and sigma of the first bands"] = lambda patches: teacher_tensor(
            patches, first_bands, teacher.size_hw, interpolation=interpolation
        )
    return conventions
