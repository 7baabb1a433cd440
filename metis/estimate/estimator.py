"""How fast a graph would run on a Metis card: an estimate, made without one.

Counted by metis/workload.py, priced by metis/cost_model.py, explained layer by layer.
Nothing here was measured on a device, and no figure of this file may be shown as one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import onnx

from metis.estimate.advice import advise
from metis.estimate.cost_model import (
    BOARDS,
    CORES,
    Board,
    CostModel,
    Settings,
    frame_ms,
    load_cost_model,
    published_rows,
    two_times,
)
from metis.estimate.workload import Layer, UnpricedError, Workload, read_workload

BOARD_NAMES: Mapping[Board, str] = {"pcie": "PCIe", "m2": "M.2"}

TERMS = ("matrix", "weights", "depthwise", "operators", "memory")

#: Layers that are named in facts and on the terminal, unless more are asked for.
TOP = 5


@dataclass(frozen=True)
class LayerTime:
    """What one layer adds to the time of a frame; the layers of a graph sum up to it."""

    layer: Layer
    parts: tuple[float, ...]  # ms, in the order of TERMS
    streams_weights: bool  # its traffic to external memory is weights more than maps

    @property
    def ms(self) -> float:
        """Of one frame."""
        return sum(self.parts)

    @property
    def term(self) -> str:
        """Which of TERMS is largest."""
        return TERMS[self.parts.index(max(self.parts))]


@dataclass(frozen=True)
class Figure:
    """A number with its band; None where the model has nothing to say."""

    value: float | None
    unit: str
    scope: str
    low: float | None = None
    high: float | None = None

    def facts(self) -> dict[str, Any]:
        """For manifests and reports."""
        return {
            "value": self.value,
            "unit": self.unit,
            "measured_on": "estimate",
            "scope": self.scope,
            "low": self.low,
            "high": self.high,
        }


@dataclass(frozen=True)
class BoardEstimate:
    """Estimates for one kind of card."""

    throughput: Figure  # frames/s
    latency: Figure  # ms
    layers: tuple[LayerTime, ...]  # in the order of the graph

    def shares(self) -> dict[str, float]:
        """Share of a frame's time by term, 0..1."""
        total = sum(time.ms for time in self.layers)
        columns = zip(*(time.parts for time in self.layers), strict=True)
        return {term: sum(c) / total for term, c in zip(TERMS, columns, strict=True)}

    def slowest(self, top: int | None) -> list[LayerTime]:
        """The layers that take most; None: all of them."""
        return sorted(self.layers, key=lambda time: -time.ms)[:top]


@dataclass(frozen=True)
class Estimate:
    """What is expected of a graph on Metis cards. Never a measurement."""

    settings: Settings
    fitted_on: str
    boards: Mapping[Board, BoardEstimate]
    by_cores: Mapping[int, Mapping[Board, Figure]]  # throughput with other settings
    misses: tuple[str, ...] = ()  # why the error band does not hold
    obstacle: str = ""  # why there is no figure

    def facts(self, top: int | None = TOP) -> dict[str, Any]:
        """For manifests and reports; every figure says measured_on: estimate."""
        return {
            "measured_on": "estimate",
            "fitted_on": self.fitted_on,
            "settings": {
                "aipu_cores": self.settings.aipu_cores,
                "replication": self.settings.replication,
            },
            "obstacle": self.obstacle or None,
            "misses": list(self.misses),
            "boards": {
                board: _board_facts(estimate, top) for board, estimate in self.boards.items()
            },
            "by_aipu_cores": {
                str(cores): {board: figure.facts() for board, figure in figures.items()}
                for cores, figures in self.by_cores.items()
            },
        }

    def lines(self, top: int | None = TOP) -> Iterator[str]:
        """For a terminal."""
        yield f"estimate, not measured; constants from {self.fitted_on}"
        if self.obstacle:
            yield f"no figure: {self.obstacle}"
            return
        words = f"aipu_cores {self.settings.aipu_cores}"
        yield words + ("" if self.settings.replication else ", no replication")
        for board, estimate in self.boards.items():
            fps, ms = estimate.throughput, estimate.latency
            yield (
                f"  {BOARD_NAMES[board]:<5} {fps.value:>7.0f} frames/s {_band(fps, '.0f')}"
                f"   latency {ms.value:.2f} ms {_band(ms, '.2f')}  [estimate]"
            )
        for miss in self.misses:
            yield f"no error band: {miss}"
        for cores, figures in self.by_cores.items():
            values = " / ".join(f"{figures[board].value:.0f}" for board in BOARDS)
            yield f"  with aipu_cores {cores}: {values} frames/s (PCIe / M.2)  [estimate]"
        for board, estimate in self.boards.items():
            parts = ", ".join(f"{t} {100 * s:.0f} %" for t, s in estimate.shares().items())
            yield f"  time on {BOARD_NAMES[board]}: {parts}"
        kinds = Counter(time.layer.op_type for time in self.boards["pcie"].layers)
        yield "  operators: " + ", ".join(f"{n} {kind}" for kind, n in kinds.most_common())
        yield f"{'ms/frame':>10} {'share':>6}  {'dominant':<10} layer (PCIe)"
        estimate = self.boards["pcie"]
        total = sum(time.ms for time in estimate.layers)
        for time in estimate.slowest(top):
            yield (
                f"{time.ms:>10.4f} {100 * time.ms / total:>5.1f}%  {time.term:<10} "
                f"{time.layer.name} ({time.layer.op_type}): {_advice(time)}"
            )


def estimate(
    model: onnx.ModelProto, settings: Settings | None = None, costs: CostModel | None = None
) -> Estimate:
    """Predict throughput and latency of a float or QDQ-free graph on Metis PCIe and M.2.

    Args:
        model: opset 14 to 17, one input (1, C, H, W), normalizations folded.
        settings: of the compiler; default: one core per copy, replication on.
        costs: constants; default: the committed ones.
    """
    settings = settings or Settings()
    costs = costs or load_cost_model()
    try:
        workload = read_workload(model)
    except UnpricedError as error:
        return _without_figures(settings, costs, str(error))
    obstacle = _obstacle(workload, costs)
    if obstacle:
        return _without_figures(settings, costs, obstacle)
    misses = (*workload.misses, *_doubts(workload, settings, costs))
    choices = (Settings(cores, settings.replication) for cores in (1, 2, CORES))
    return Estimate(
        settings,
        costs.fitted_on,
        {board: _on_board(workload, settings, costs, board, not misses) for board in BOARDS},
        {
            choice.aipu_cores: {
                board: _throughput(workload, choice, costs, board, not misses) for board in BOARDS
            }
            for choice in choices
            if choice != settings
        },
        misses,
    )


def _on_board(
    workload: Workload, settings: Settings, costs: CostModel, board: Board, has_band: bool
) -> BoardEstimate:
    core, memory = two_times(workload.total, settings, costs, board)
    # One copy works alone: each of its cores takes one frame, and the memory is theirs.
    call = costs.combine(core * settings.busy, memory * settings.aipu_cores)
    frames = "one frame" if settings.aipu_cores == 1 else f"{settings.aipu_cores} frames"
    return BoardEstimate(
        _throughput(workload, settings, costs, board, has_band),
        _figure(
            call,
            "ms",
            f"one call of {frames} alone on the card, without the host; the band is the "
            "throughput's, as no latency is published",
            costs.error_factor[board] if has_band else None,
        ),
        tuple(_layer_times(workload, settings, costs, board)),
    )


def _throughput(
    workload: Workload, settings: Settings, costs: CostModel, board: Board, has_band: bool
) -> Figure:
    value = 1000 / frame_ms(workload.total, settings, costs, board)
    factor = costs.error_factor[board] if has_band else None
    return _figure(value, "frames/s", "all cores busy, host and video as published", factor)


def _figure(value: float, unit: str, scope: str, factor: float | None) -> Figure:
    if factor is None:
        return Figure(value, unit, scope)
    return Figure(value, unit, scope, value / factor, value * factor)


def _layer_times(
    workload: Workload, settings: Settings, costs: CostModel, board: Board
) -> Iterator[LayerTime]:
    """Split a frame's time over layers and terms.

    t is homogeneous of degree one in core and memory time, so by Euler's theorem the parts times
    the derivatives sum up to t; dt/dcore = (core / t)^(p - 1).
    """
    total = workload.total
    core, memory = two_times(total, settings, costs, board)
    t = costs.combine(core, memory)
    on_core, on_memory = ((part / t) ** (costs.exponent - 1) for part in (core, memory))
    share = costs.streamed_share(total.weight_bytes, settings)
    for layer in workload.layers:
        streamed_bytes = share * layer.weight_bytes
        map_bytes = layer.spill_bytes + layer.concat_bytes
        parts = [on_core * ms for ms in costs.layer_ms(layer, settings)]
        parts.append(on_memory * costs.memory_ms((streamed_bytes + map_bytes) / 1e6, board))
        yield LayerTime(layer, tuple(parts), streams_weights=streamed_bytes > map_bytes)


def _obstacle(workload: Workload, costs: CostModel) -> str:
    if max(workload.input_hw) > costs.max_input:
        height, width = workload.input_hw
        return (
            f"the input is {height}x{width}; above {costs.max_input} pixels published networks "
            "were over-predicted up to 2.1 times"
        )
    spill = workload.total.spill_bytes / 1e6
    if spill > costs.max_spill:
        return (
            f"{spill:.0f} MB of maps per frame do not fit on the chip; above "
            f"{costs.max_spill:.0f} MB published networks were over-predicted up to 2.1 times"
        )
    return ""


def _doubts(workload: Workload, settings: Settings, costs: CostModel) -> Iterator[str]:
    fastest = max(row.fps["pcie"] for row in published_rows())
    if 1000 / frame_ms(workload.total, settings, costs, "pcie") > fastest:
        yield f"no published network is faster than {fastest:.0f} frames/s; the host may be slower"
    spill = workload.total.spill_bytes / 1e6
    if spill > costs.doubtful_spill:
        yield (
            f"{spill:.0f} MB of maps per frame do not fit on the chip; published networks of "
            "that kind (YOLO at 640) are over-predicted, by up to 73 % on M.2"
        )


def _without_figures(settings: Settings, costs: CostModel, obstacle: str) -> Estimate:
    return Estimate(settings, costs.fitted_on, {}, {}, (), obstacle)


def _board_facts(estimate: BoardEstimate, top: int | None) -> dict[str, Any]:
    return {
        "throughput": estimate.throughput.facts(),
        "latency": estimate.latency.facts(),
        "shares": estimate.shares(),
        "slowest": [
            {
                "name": time.layer.name,
                "op_type": time.layer.op_type,
                "value": time.ms,
                "unit": "ms/frame",
                "measured_on": "estimate",
                "term": time.term,
                "advice": _advice(time),
            }
            for time in estimate.slowest(top)
        ],
    }


def _advice(time: LayerTime) -> str:
    return advise(time.layer, time.term, streams_weights=time.streams_weights)


def _band(figure: Figure, form: str) -> str:
    if figure.low is None or figure.high is None:
        return "(no band)"
    return f"({figure.low:{form}} to {figure.high:{form}})"
