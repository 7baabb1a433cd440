"""How load comes: SingleStream and Offline, by the definitions of MLPerf Inference.

Every time is kept. Answers are kept of a random part of the queries, and compared after the
measurement with those of an instance that does nothing else (the idea of MLPerf's TEST01): an
answer that is late, mixed up or never computed makes the measurement worthless.
"""

from __future__ import annotations

import random
import threading
import time
from array import array
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from kdbench_instance import Instance

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from kdbench_bundle import Bundle
    from kdbench_runtime import Runtime

#: An idle device clocks its cores down after a second, so load precedes what counts.
WARM_UP_SECONDS = 1.0

#: Queries per kept answer, on average.
_KEEP_EVERY = 50

#: Kept answers per instance, at most.
_KEEP_MOST = 1000


@dataclass(frozen=True)
class Minima:
    """When a scenario may end: all three reached, or `max_seconds` over."""

    seconds: float
    queries: int  # of SingleStream
    samples: int  # of Offline
    max_seconds: float | None = None

    def are_reached(self, seconds: float, count: int, minimum: int) -> bool:
        """Whether to stop."""
        if self.max_seconds is not None and seconds >= self.max_seconds:
            return True
        return seconds >= self.seconds and count >= minimum


@dataclass
class Answers:
    """A random part of the answers, with the place of their tensors in the load."""

    seed: int
    kept: list[tuple[int, NDArray[np.float32]]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._random = random.Random(self.seed)
        self._next = self._random.randrange(_KEEP_EVERY)

    def offer(self, number: int, place: int, logits: NDArray[np.float32]) -> None:
        """Keep the answer to query `number` if its turn has come."""
        if number == self._next and len(self.kept) < _KEEP_MOST:
            self.kept.append((place, logits.copy()))
            self._next += 1 + self._random.randrange(2 * _KEEP_EVERY)

    def different(self, expected: NDArray[np.float32]) -> int:
        """How many kept answers are not the expected ones, bit for bit."""
        return sum(not np.array_equal(logits, expected[place]) for place, logits in self.kept)


@dataclass
class SingleStreamResult:
    """What SingleStream measured."""

    run_ns: NDArray[np.int64]  # per query
    all_ns: NDArray[np.int64]
    start_ns: int  # of time.perf_counter_ns
    seconds: float
    batch: int
    warm_up: int  # queries
    answers: Answers

    @property
    def frames(self) -> int:
        """Frames answered."""
        return len(self.all_ns) * self.batch


@dataclass
class OfflineResult:
    """What Offline measured."""

    done_ns: NDArray[np.int64]  # per call, since the start, in order
    start_ns: int  # of time.perf_counter_ns
    batch: int
    instances: int
    double_buffer: bool
    warm_up: int  # queries of all instances
    answers: list[Answers]

    @property
    def frames(self) -> int:
        """Frames answered."""
        return len(self.done_ns) * self.batch

    @property
    def seconds(self) -> float:
        """From the start to the last answer."""
        return float(self.done_ns[-1]) / 1e9


def single_stream(
    instance: Instance, groups: NDArray[np.float32], minima: Minima
) -> SingleStreamResult:
    """One query after the answer to the one before; latency.

    Args:
        instance: without double buffering.
        groups: float32, (queries, batch, C, H, W), taken in turn.
        minima: when to end.
    """
    warm_up = _warm_up(instance, groups, minima.seconds)
    answers = Answers(seed=0)
    run_ns, all_ns = array("q"), array("q")
    count = 0
    start_ns, start = time.perf_counter_ns(), time.perf_counter()
    while not minima.are_reached(time.perf_counter() - start, count, minima.queries):
        place = count % len(groups)
        logits = instance.query(groups[place])
        run_ns.append(instance.run_ns)
        all_ns.append(instance.all_ns)
        answers.offer(count, place, logits)
        count += 1
    seconds = time.perf_counter() - start
    return SingleStreamResult(
        run_ns=np.array(run_ns),
        all_ns=np.array(all_ns),
        start_ns=start_ns,
        seconds=seconds,
        batch=groups.shape[1],
        warm_up=warm_up,
        answers=answers,
    )


def _warm_up(instance: Instance, groups: NDArray[np.float32], seconds: float) -> int:
    """A second of load; less only where less is measured, too."""
    count = 0
    end = time.perf_counter() + min(WARM_UP_SECONDS, seconds)
    while time.perf_counter() < end or count <= instance.late:
        instance.query(groups[count % len(groups)])
        count += 1
    return count


class _Worker(threading.Thread):
    """One instance with its own thread and buffers."""

    def __init__(self, number: int, team: _Team) -> None:
        super().__init__(name=f"instance {number}", daemon=True)
        self._number, self._team = number, team
        self.done_ns = array("q")
        self.warm_up = 0
        self.answers = Answers(seed=number)

    def run(self) -> None:
        """Load, wait for the others, answer until told to stop."""
        team = self._team
        try:
            with Instance(team.bundle, team.runtime, double_buffer=team.double_buffer) as instance:
                self.warm_up = _warm_up(instance, team.groups, team.minima.seconds)
                team.begin.wait()
                self._answer(instance)
        except threading.BrokenBarrierError:
            pass  # another instance failed; its error is raised in the main thread
        except Exception as error:  # noqa: BLE001 - raised again in the main thread
            team.failures.append(error)
            team.begin.abort()

    def _answer(self, instance: Instance) -> None:
        """Query; a result that arrives `late` queries later belongs to the query of then."""
        groups, stop, start = self._team.groups, self._team.stop, self._team.start_ns
        late, pushed = instance.late, 0
        while not (pushed and stop.is_set()):
            place = (pushed + self._number) % len(groups)
            self._take(instance.query(groups[place]), pushed - late, start)
            pushed += 1
        for extra in range(late):  # what is still on its way; these queries themselves don't count
            self._take(instance.query(groups[0]), pushed + extra - late, start)

    def _take(self, logits: NDArray[np.float32], number: int, start: int) -> None:
        if number < 0:
            return  # an answer to the warm-up
        self.done_ns.append(time.perf_counter_ns() - start)
        self.answers.offer(number, (number + self._number) % len(self._team.groups), logits)


class _Team:
    """What the workers of one measurement share."""

    def __init__(
        self,
        bundle: Bundle,
        runtime: Runtime,
        groups: NDArray[np.float32],
        minima: Minima,
        double_buffer: bool,
    ) -> None:
        self.bundle, self.runtime, self.groups, self.minima = bundle, runtime, groups, minima
        self.double_buffer = double_buffer
        self.start_ns = 0
        self.begin = threading.Barrier(runtime.instances + 1, action=self._start)
        self.stop = threading.Event()
        self.failures: list[Exception] = []

    def _start(self) -> None:
        self.start_ns = time.perf_counter_ns()


def offline(
    bundle: Bundle,
    runtime: Runtime,
    groups: NDArray[np.float32],
    minima: Minima,
    *,
    double_buffer: bool,
    tick: Callable[[float, int], None] = lambda seconds, frames: None,
) -> OfflineResult:
    """All instances at once, each with its own thread and buffers; throughput.

    Args:
        bundle: the bundle.
        runtime: opened, with no instance.
        groups: float32, (queries, batch, C, H, W), taken in turn by every instance.
        minima: when to end.
        double_buffer: load the instances with it.
        tick: called about every 10 ms with seconds and frames so far.

    Raises:
        CheckError: an instance does not load or fails.
    """
    team = _Team(bundle, runtime, groups, minima, double_buffer)
    workers = [_Worker(number, team) for number in range(runtime.instances)]
    for worker in workers:
        worker.start()
    with suppress(threading.BrokenBarrierError):  # an instance failed; its error is raised below
        team.begin.wait()
    start = time.perf_counter()
    frames, seconds = 0, 0.0
    while not team.failures and not minima.are_reached(seconds, frames, minima.samples):
        time.sleep(0.01)
        seconds = time.perf_counter() - start
        frames = sum(len(worker.done_ns) for worker in workers) * bundle.batch
        tick(seconds, frames)
    team.stop.set()
    for worker in workers:
        worker.join()
    if team.failures:
        raise team.failures[0]
    done = np.sort(np.concatenate([np.array(worker.done_ns) for worker in workers]))
    return OfflineResult(
        done_ns=done,
        start_ns=team.start_ns,
        batch=bundle.batch,
        instances=runtime.instances,
        double_buffer=double_buffer,
        warm_up=sum(worker.warm_up for worker in workers),
        answers=[worker.answers for worker in workers],
    )
