"""Does somebody keep answers? The same sample again and again against samples never seen before.

The idea of MLPerf's TEST04: a system that remembers answers is fast where a query repeats, and only
there.
"""

from __future__ import annotations

import random
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from kdbench_instance import Instance

#: Repeated queries may be this many times faster. Source: MLPerf Inference, TEST04.
LIMIT = 1.1

#: Of eleven ratios, the second smallest and the second largest hold their median between them at
#: 98.8 % confidence, however the times are distributed.
ROUNDS = 11

#: Queries of one kind in a row: a memory of one answer knows two of them.
_ROW = 3

#: Cycles of a round; each is distinct, repeated, repeated, distinct, or the other way round, by
#: chance, so that neither a drift nor a load that comes and goes favours one kind.
_MOST_CYCLES = 16

#: All rounds together take about this long.
_SECONDS = 3.0


@dataclass(frozen=True)
class Repetition:
    """Times from tensor to logits in ns, (rounds, queries)."""

    distinct_ns: NDArray[np.int64]
    same_ns: NDArray[np.int64]


def repeat_samples(
    instance: Instance, groups: NDArray[np.float32], min_seconds: float
) -> Repetition:
    """Time both kinds of queries, by turns and in mirrored order.

    Args:
        instance: without double buffering.
        groups: float32, (queries, batch, C, H, W).
        min_seconds: of a scenario; a short run audits shortly, too.
    """
    fresh = _Fresh(groups)
    begin = time.perf_counter()
    for _ in range(_ROW):
        instance.query(fresh.next())
    pace = (time.perf_counter() - begin) / _ROW
    cycles = int(min(_SECONDS, min_seconds) / (ROUNDS * 4 * _ROW * pace))
    cycles = min(max(cycles, 1), _MOST_CYCLES)
    order = random.Random(0)
    times: dict[bool, list[list[int]]] = {False: [], True: []}
    for _ in range(ROUNDS):
        round_ns: dict[bool, list[int]] = {False: [], True: []}
        sample = fresh.next().copy()
        for _ in range(cycles):
            first = order.random() < 0.5
            for same in (first, not first, not first, first):
                for _ in range(_ROW):
                    # Written anew in both cases, so that the processor's caches help neither.
                    instance.query(fresh.next(like=sample if same else None))
                    round_ns[same].append(instance.all_ns)
        for same, block_ns in round_ns.items():
            times[same].append(block_ns)
    return Repetition(np.array(times[False]), np.array(times[True]))


class _Fresh:
    """Samples that no query had: the load's, with a number written into their first pixels."""

    def __init__(self, groups: NDArray[np.float32]) -> None:
        self._groups = groups
        self._levels = np.linspace(groups.min(), groups.max(), 16, dtype=np.float32)
        self._tensor: NDArray[np.float32] = np.empty_like(groups[0])
        self._number = 0

    def next(self, like: NDArray[np.float32] | None = None) -> NDArray[np.float32]:
        """The next one, or a copy, in the same buffer."""
        if like is not None:
            self._tensor[...] = like
            return self._tensor
        self._tensor[...] = self._groups[self._number % len(self._groups)]
        digits = [self._number >> 4 * place & 15 for place in range(4)]
        self._tensor[:, 0].reshape(len(self._tensor), -1)[:, :4] = self._levels[digits]
        self._number += 1
        return self._tensor


def caching(repetition: Repetition, measured_on: str) -> dict[str, Any]:
    """How many times faster the same sample is, per round, and what holds at 98.8 % confidence."""
    distinct, repeated = (
        np.median(ns, axis=1) for ns in (repetition.distinct_ns, repetition.same_ns)
    )
    ratios = np.sort(distinct / repeated)
    return {
        "scope": "tensor to logits, distinct samples / the same sample",
        "value": float(np.median(ratios)),
        "low": float(ratios[1]),
        "high": float(ratios[-2]),
        "limit": LIMIT,
        "unit": "ratio",
        "measured_on": measured_on,
        "n": int(repetition.same_ns.size),
    }


def caching_faults(figure: dict[str, Any]) -> list[str]:
    """Why the load's times mean nothing when answers are kept."""
    if figure["low"] <= figure["limit"]:
        return []
    return [
        f"the same sample again is answered {figure['value']:.3g} times faster than distinct ones "
        f"(at least {figure['low']:.3g}, limit {figure['limit']:g}): something keeps answers; "
        "switch that off in the runtime or its driver, and measure again"
    ]
