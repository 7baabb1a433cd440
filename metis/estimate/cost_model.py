"""The constants that price a graph on Metis, and the vendor's figures that they come from.

Five constants, fitted by benchmarks/estimator.py to published frame rates, price what
metis/workload.py counts. With t in ms per frame, all four cores working:

    core   = tiles * a + weights * b + depthwise taps * c + operators * d
    memory = (weights beyond the L2 share + maps beyond L1 + long Concats) / bandwidth
    t      = (core^2.5 + memory^2.5)^(1/2.5)
"""

from __future__ import annotations

import csv
import json
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from collections.abc import Mapping

    from metis.estimate.workload import Layer


Board = Literal["pcie", "m2"]

BOARDS: tuple[Board, ...] = ("pcie", "m2")

CORES = 4


@dataclass(frozen=True)
class Settings:
    """The settings of the compiler that the cost model knows."""

    aipu_cores: int = 1  # of one compiled model, 1..4; also the frames of one call
    replication: bool = True  # narrow layers lie in the matrix several times (the SDK's default)

    @property
    def busy(self) -> int:
        """Cores that work when as many copies are loaded as fit; three leave one idle."""
        return CORES // self.aipu_cores * self.aipu_cores


@dataclass(frozen=True)
class CostModel:
    """The constants; ms of one frame with four cores working together."""

    tiles: float  # ms per million matrix tiles
    weights: float  # ms per MB
    taps: float  # ms per million taps of depthwise convolutions
    operators: float  # ms per thousand operators
    bandwidth: float  # MB per ms of external memory, M.2
    pcie_bandwidth: float  # times that of M.2
    l2: float  # MB for all four cores
    exponent: float
    error_factor: Mapping[Board, float]  # nine tenths of new families lie within
    max_input: int  # pixels; above, published networks were missed by a factor of two
    doubtful_spill: float  # MB of maps beyond L1, from which on errors grow
    max_spill: float  # MB, above which published networks were missed by a factor of two
    fitted_on: str

    def layer_ms(self, layer: Layer, settings: Settings) -> tuple[float, float, float, float]:
        """Time on the cores: matrix, weights, depthwise, operator."""
        tiles = layer.copied_tiles if settings.replication else layer.tiles
        scale = CORES / settings.busy
        return (
            scale * self.tiles * tiles / 1e6,
            scale * self.weights * layer.weight_bytes / 1e6,
            scale * self.taps * layer.taps / 1e6,
            scale * self.operators * layer.operators / 1e3,
        )

    def streamed_share(self, weight_bytes: int, settings: Settings) -> float:
        """Share of a graph's weights that has no room on the chip: read for every frame, 0..1."""
        room = self.l2 * settings.aipu_cores / CORES
        return max(0.0, 1 - room / (weight_bytes / 1e6)) if weight_bytes else 0.0

    def memory_ms(self, megabytes: float, board: Board) -> float:
        """Time of external memory."""
        return megabytes / (self.bandwidth * (self.pcie_bandwidth if board == "pcie" else 1))

    def combine(self, core: float, memory: float) -> float:
        """Time of two things that overlap, but not quite."""
        if not core and not memory:
            return 0.0
        longer, shorter = max(core, memory), min(core, memory)
        return float(longer * (1 + (shorter / longer) ** self.exponent) ** (1 / self.exponent))


@cache
def load_cost_model() -> CostModel:
    """The committed constants, metis/estimator.json."""
    constants = json.loads(files("metis.estimate").joinpath("estimator.json").read_text())
    return CostModel(
        **constants["fitted"],
        **constants["fixed"],
        error_factor=constants["error_factor"],
        fitted_on=constants["fitted_on"],
    )


def frame_ms(total: Layer, settings: Settings, costs: CostModel, board: Board) -> float:
    """Time per frame, ms, when every core is kept busy: the reciprocal of the throughput."""
    return costs.combine(*two_times(total, settings, costs, board))


def two_times(
    total: Layer, settings: Settings, costs: CostModel, board: Board
) -> tuple[float, float]:
    """Time of the cores and time of external memory, ms per frame."""
    streamed_bytes = costs.streamed_share(total.weight_bytes, settings) * total.weight_bytes
    traffic = (streamed_bytes + total.spill_bytes + total.concat_bytes) / 1e6
    return sum(costs.layer_ms(total, settings)), costs.memory_ms(traffic, board)


@dataclass(frozen=True)
class Published:
    """A frame rate that the vendor measured, and how the network was compiled for it."""

    network: str  # its name in `package`
    package: str  # timm or torchvision
    family: str
    size: int  # side of the input, pixels
    aipu_cores: int
    replication: bool
    fps: Mapping[Board, float]  # frames/s

    def facts(self) -> dict[str, Any]:
        """For reports, beside an estimate; every figure says measured_on: published."""
        scope = "host, 720p video through GStreamer"
        return {
            "source": "Voyager SDK 1.8.0, model zoo",
            "size": self.size,
            "settings": {"aipu_cores": self.aipu_cores, "replication": self.replication},
            "boards": {
                board: {
                    "value": fps,
                    "unit": "frames/s",
                    "measured_on": "published",
                    "scope": scope,
                }
                for board, fps in self.fps.items()
            },
        }

    def line(self) -> str:
        """For a terminal."""
        values = " / ".join(f"{self.fps[board]:.0f}" for board in BOARDS)
        words = f"aipu_cores {self.aipu_cores}" + ("" if self.replication else ", no replication")
        return (
            f"  the vendor's figure at {self.size}x{self.size} with {words}: {values} frames/s "
            "(PCIe / M.2)  [published]"
        )


@cache
def published_rows() -> tuple[Published, ...]:
    """The vendor's table, metis/published_fps.csv."""
    text = files("metis.estimate").joinpath("published_fps.csv").read_text()
    lines = (line for line in text.splitlines() if not line.startswith("#"))
    return tuple(
        Published(
            row["network"],
            row["package"],
            row["family"],
            int(row["size"]),
            int(row["aipu_cores"]),
            row["replication"] == "on",
            {board: float(row[f"fps_{board}"]) for board in BOARDS},
        )
        for row in csv.DictReader(lines)
    )


def published_row(network: str) -> Published | None:
    """The vendor's row of a network, if there is one."""
    return next((row for row in published_rows() if row.network == network), None)
