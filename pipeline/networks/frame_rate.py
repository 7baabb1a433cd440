"""How fast a graph, or a network of timm, would run on a card: what `kdpipe estimate` prints."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from metis.estimate.cost_model import Published, Settings, published_row
from metis.estimate.estimator import Estimate, estimate
from pipeline.networks.chip_check import check
from pipeline.networks.names import ALIASES

if TYPE_CHECKING:
    from collections.abc import Iterator


@dataclass(frozen=True)
class FrameRate:
    """An estimate, beside what the vendor published of the same network."""

    model: str  # file or name
    estimate: Estimate
    published: Published | None  # None: nothing

    def document(self, layers: int | None) -> dict[str, Any]:
        """For programs, with the slowest layers; None: all."""
        return {
            "model": self.model,
            "estimate": self.estimate.facts(layers),
            "published": self.published.facts() if self.published else None,
        }

    def lines(self, layers: int | None) -> Iterator[str]:
        """For people, with the slowest layers; None: all."""
        yield from self.estimate.lines(layers)
        if self.published:
            yield self.published.line()


def estimate_frame_rate(
    model: str, *, size: int | None, channels: int, aipu_cores: int, replication: bool
) -> FrameRate:
    """Estimate from the graph alone; nothing is measured.

    Args:
        model: an ONNX file, or a network's name.
        size: side of a network's input; None: that of an alias, else 224.
        channels: of a network's input.
        aipu_cores: of one compiled model, 1 to 4; also the frames of one call.
        replication: whether the compiler may use its enable_icr.

    Raises:
        as `pipeline.networks.chip_check.check`.
    """
    legalized = check(model, size=size, channels=channels)
    return FrameRate(
        model,
        estimate(legalized.model, Settings(aipu_cores, replication)),
        published_row(ALIASES.get(model, (model, size))[0]),
    )
