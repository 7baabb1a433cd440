"""Which real values the 256 codes of an activation stand for: observed in one pass, then chosen.

The state of an observer is a histogram of fixed size, so memory does not grow with the samples.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, Literal

import msgspec
import numpy as np

from metis.quantize.observers import Observations, find_range

if TYPE_CHECKING:
    from pathlib import Path


#: Ends of a range may not be larger: kernels multiply scales in float32.
_LARGEST = 1e18


class RangeError(ValueError):
    """A range is missing or impossible."""


def grid(lo: float, hi: float) -> tuple[np.float32, int]:
    """Scale and int8 zero point for the range lo..hi, which is widened to hold 0.

    `scale = (hi - lo) / 255`, `zero_point = round(-128 - lo / scale)`; code -128 is lo, 127 is hi.

    Raises:
        RangeError: the range is not finite, or too large for float32 kernels, or runs backwards.
    """
    if not -_LARGEST <= lo <= hi <= _LARGEST:
        raise RangeError(f"{lo:g} to {hi:g} is no range")
    lo, hi = min(lo, 0.0), max(hi, 0.0)
    scale = np.float32((hi - lo) / 255)
    if scale < np.finfo(np.float32).tiny:  # nothing but zeros was seen
        return np.float32(1.0), -128
    return scale, int(np.clip(np.rint(-128 - lo / float(scale)), -128, 127))


@dataclass(frozen=True)
class Range:
    """The real values that the codes of one tensor span."""

    lo: float
    hi: float
    observer: str  # a name in OBSERVERS, or "given"
    seen: tuple[float, float]  # extremes in the calibration set
    channels: tuple[tuple[float, float], ...] = ()  # (lo, hi) per channel: a depthwise input


@dataclass(frozen=True)
class Ranges:
    """ranges.json: what calibration chose; to be read, edited and used again."""

    samples: int
    tensors: Mapping[str, Range]

    def save(self, path: Path) -> None:
        """Write the file."""
        raw = {"schema": 1, **asdict(self)}
        path.write_text(json.dumps(raw, indent=1) + "\n")

    @staticmethod
    def load(path: Path) -> Ranges:
        """Read the file.

        Raises:
            RangeError: it is not such a file; says which tensor is wrong.
        """
        try:
            file = msgspec.convert(json.loads(path.read_text()), _File)
        except OSError as error:
            raise RangeError(f"{path.name} can't be read: {error.strerror or error}") from error
        except ValueError as error:  # of json and of msgspec
            raise RangeError(f"{path.name} is no file of ranges: {error}") from error
        tensors = {name: _range(name, entry) for name, entry in file.tensors.items()}
        return Ranges(samples=file.samples, tensors=tensors)

    def of(self, tensor: str) -> Range:
        """The range of one tensor.

        Raises:
            RangeError: it has none.
        """
        if tensor not in self.tensors:
            raise RangeError(f"no range for tensor {tensor!r}; is the file of another student?")
        return self.tensors[tensor]

    def check(self, observations: Observations) -> None:
        """Refuse ranges that are not those of a student.

        Raises:
            RangeError: a tensor lacks its range, or has another number of channels, or there is a
                range for a tensor that the student does not have.
        """
        for tensor in observations.histograms:
            ranges = len(self.of(tensor).channels)
            channels = len(observations.channel_lo.get(tensor, ()))
            if ranges not in (0, channels):
                raise RangeError(
                    f"tensor {tensor!r} has {channels} channels, the file gives ranges of {ranges}"
                )
        for tensor in self.tensors:
            if tensor not in observations.histograms:
                hint = _nearest(tensor, observations)
                raise RangeError(f"the student has no tensor {tensor!r}{hint}")


@dataclass(frozen=True)
class _File:
    schema: Literal[1]
    samples: int
    tensors: dict[str, Any]


def _range(name: str, raw: object) -> Range:
    try:
        span = msgspec.convert(raw, Range)
    except msgspec.ValidationError as error:
        raise RangeError(f"tensor {name!r}: {error}") from error
    for lo, hi in ((span.lo, span.hi), *span.channels):
        if not (-_LARGEST <= lo <= hi <= _LARGEST):
            raise RangeError(f"tensor {name!r}: lo {lo:g} and hi {hi:g} are no range")
    return span


def _nearest(name: str, observations: Observations) -> str:
    close = get_close_matches(name, observations.histograms, 1)
    return f"; did you mean {close[0]!r}?" if close else ""


def choose(
    observations: Observations,
    observer: str,
    overrides: Mapping[str, str | tuple[float, float]] | None = None,
) -> Ranges:
    """A range for every tensor whose values were counted.

    Args:
        observations: the pass over the samples.
        observer: a name in OBSERVERS.
        overrides: by tensor name or pattern (`*conv_dw*`): another observer, or (lo, hi). The
            last pattern that fits counts.

    Raises:
        RangeError: an override fits no tensor, or is no range.
    """
    unused = dict(overrides or {})
    tensors = {}
    for name, histogram in observations.histograms.items():
        choice: str | tuple[float, float] = observer
        for pattern, wanted in (overrides or {}).items():
            if fnmatchcase(name, pattern):
                choice = wanted
                unused.pop(pattern, None)
        lo, hi = find_range(choice, histogram) if isinstance(choice, str) else choice
        try:
            grid(lo, hi)
        except RangeError as error:
            raise RangeError(f"tensor {name!r}: {error}") from error
        extremes = (float(histogram.lo), float(histogram.hi))
        channels: tuple[tuple[float, float], ...] = ()
        # A given range is for all channels.
        if name in observations.channel_lo and isinstance(choice, str):
            pairs = zip(observations.channel_lo[name], observations.channel_hi[name], strict=True)
            channels = tuple((float(low), float(high)) for low, high in pairs)
        word = choice if isinstance(choice, str) else "given"
        tensors[name] = Range(float(lo), float(hi), word, extremes, channels)
    if unused:
        pattern = next(iter(unused))
        hint = _nearest(pattern, observations) or f"; it has {next(iter(tensors))!r} and others"
        raise RangeError(
            f"{pattern!r} fits no tensor of the student{hint} (ranges.json of calibrate lists all)"
        )
    return Ranges(samples=observations.samples, tensors=tensors)
