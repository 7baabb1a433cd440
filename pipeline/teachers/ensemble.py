"""Several teachers as one: temperatures, weights, how answers combine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax, softmax

from pipeline.data.blocks import BLOCK
from pipeline.params.sources import Rule, TeacherParams, ViewParams

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray


#: Probabilities are taken as at least this before their logarithm; float32 holds no less.
SMALLEST_PROBABILITY = float(np.finfo(np.float32).tiny)


def gives_probabilities(outputs: NDArray[np.float32]) -> bool:
    """Whether outputs (N, classes, ...) look like those of a softmax.

    None is below 0, and those of a position sum to 1 within 1e-3.
    """
    return bool((outputs >= 0).all() and np.allclose(outputs.sum(axis=1), 1, atol=1e-3))


def to_logits(outputs: NDArray[np.float32], probabilities: bool) -> NDArray[np.float32]:
    """Outputs (N, classes, ...) as logits.

    The logarithm of softmax(z) is z minus one number per row, and softmax(z / T) does not change
    when such a number is taken off: for every temperature it is as good as z.
    """
    if not probabilities:
        return outputs
    return np.log(np.maximum(outputs, SMALLEST_PROBABILITY))


def combine(
    members: Sequence[NDArray[np.float32]],
    weights: Sequence[float],
    rule: Rule = "mean_logits",
    temperatures: Sequence[float] | None = None,
) -> NDArray[np.float32]:
    """One set of logits from those of several teachers.

    Args:
        members: logits, each (N, classes, ...).
        weights: of the members; they are divided by their sum.
        rule: the weighted mean of logits, or the logarithm of the weighted mean of probabilities.
        temperatures: each member's logits are divided by its own first; None: by 1.

    Returns:
        float32, (N, classes, ...).
    """
    total = sum(weights)
    mean = np.zeros_like(members[0], dtype=np.float64)
    for i, (logits, weight) in enumerate(zip(members, weights, strict=True)):
        scaled = logits.astype(np.float64) / (temperatures[i] if temperatures else 1.0)
        mean += (weight / total) * (scaled if rule == "mean_logits" else softmax(scaled, axis=1))
    if rule == "mean_probabilities":
        mean = np.log(np.maximum(mean, SMALLEST_PROBABILITY))
    return mean.astype(np.float32)


def fit_temperature(logits: NDArray[np.float32], labels: NDArray[np.int64]) -> float:
    """The temperature that makes a teacher's probabilities most likely, between 0.05 and 20.

    Args:
        logits: (N, classes), perhaps memory-mapped: they are read block by block.
        labels: (N,), class indices.

    Source:
        Guo, Pleiss, Sun, Weinberger 2017, temperature scaling. The negative log-likelihood has one
        minimum in 1 / T.
    """

    def loss(log_t: float) -> float:
        parts = []
        for start in range(0, len(labels), BLOCK):
            rows = slice(start, start + BLOCK)
            exact = logits[rows].astype(np.float64) / np.exp(log_t)
            n = len(exact)
            parts.append(log_softmax(exact, axis=1)[np.arange(n), labels[rows]])
        return -float(np.concatenate(parts).mean())

    minimum = minimize_scalar(loss, bounds=(np.log(0.05), np.log(20.0)), method="bounded")
    return float(np.exp(minimum.x))


@dataclass(frozen=True)
class Member:
    """One teacher of an ensemble."""

    name: str
    params: TeacherParams
    probabilities: bool  # whether its outputs are
    temperature: float  # its logits are divided by this
    bands_in_data: int  # of its modality


@dataclass(frozen=True)
class Ensemble:
    """How the outputs of several teachers become one set of logits."""

    members: tuple[Member, ...]
    rule: Rule
    views: ViewParams
    seed: int  # of the views

    def logits(self, outputs: Sequence[NDArray[np.float32]]) -> NDArray[np.float32]:
        """Logits (N, classes, ...) from the final output of each member, same shape."""
        return combine(
            [to_logits(o, m.probabilities) for o, m in zip(outputs, self.members, strict=True)],
            [m.params.weight for m in self.members],
            self.rule,
            [m.temperature for m in self.members],
        )

    @property
    def feature_names(self) -> list[str]:
        """Of all members, as `teacher/tensor`."""
        return [f"{m.name}/{feature}" for m in self.members for feature in m.params.features]
