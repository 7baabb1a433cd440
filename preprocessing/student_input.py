"""What the student sees: which part of the contract, in which 8-bit encoding."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from preprocessing.contract import GREY_MAX, Channels, ContractError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path


@dataclass(frozen=True)
class StudentInput:
    """Which part of the contract the student sees, and how the device delivers it.

    The device receives an 8-bit image. Its grey level 0 stands for `grey_lo` and 255 for `grey_hi`
    contract units, linearly; `mean` and `std` are the z-score folded into grey levels, so that
    `(grey - mean) / std` is the student's tensor.
    """

    modality: str
    bands: tuple[int, ...]  # zero-based, in channel order
    patch_hw: tuple[int, int]  # size of the stored patches
    size_hw: tuple[int, int]  # size of the network's input
    interpolation: str  # "nearest" or "bilinear"
    half_pixel_centers: bool  # the SDK's switch between its two resize functions, see apply.resize
    device_resize: bool  # False: images are exported at the network's size
    encoding: str  # the rule that chose grey_lo and grey_hi: "contract" or "percentile"
    grey_lo: tuple[float, ...]  # contract units of grey level 0, per channel
    grey_hi: tuple[float, ...]  # contract units of grey level 255, per channel
    mean: tuple[float, ...]  # grey levels, per channel
    std: tuple[float, ...]  # grey levels, per channel
    contract: str  # sha256 of preprocessing.json

    def to_json(self) -> str:
        """The text of student_input.json."""
        return json.dumps(asdict(self), indent=1) + "\n"

    @staticmethod
    def load(path: Path) -> StudentInput:
        """Read student_input.json.

        Raises:
            ContractError: not a file that `to_json` wrote.
        """
        try:
            raw: dict[str, Any] = json.loads(path.read_text())
            fields: dict[str, Any] = {
                k: tuple(v) if isinstance(v, list) else v for k, v in raw.items()
            }
            return StudentInput(**fields)
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise ContractError(f"{path.name} is not a student input file: {error}") from error


def linear_encoding(
    ranges: Sequence[tuple[float, float]], channels: Channels
) -> dict[str, tuple[float, ...]]:
    """Fold the z-score into an 8-bit encoding: mean and std in grey levels.

    Args:
        ranges: per channel, the contract units of grey level 0 and of grey level 255.
        channels: the bands; where they are not z-scored, as if mu were 0 and sigma 1.

    Returns:
        The fields grey_lo, grey_hi, mean and std of `StudentInput`.
    """
    zscore = channels.zscore
    mu = zscore.mu if zscore else (0.0,) * len(ranges)
    sigma = zscore.sigma if zscore else (1.0,) * len(ranges)
    levels_per_unit = [GREY_MAX / (hi - lo) for lo, hi in ranges]
    return {
        "grey_lo": tuple(lo for lo, _ in ranges),
        "grey_hi": tuple(hi for _, hi in ranges),
        "mean": tuple(
            (m - lo) * levels
            for m, (lo, _), levels in zip(mu, ranges, levels_per_unit, strict=True)
        ),
        "std": tuple(s * levels for s, levels in zip(sigma, levels_per_unit, strict=True)),
    }
