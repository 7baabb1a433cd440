"""Mean and std as the device pipe keeps them: three decimals, in units of full scale.

Source: Voyager SDK 1.2.5 and 1.5.2, the GStreamer normalize operator prints mean and std with three
decimals in 0..1 units, whatever the pipeline YAML says (small std lose percents, tiny ones vanish).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

GREY_MAX = 255

DECIMALS = 3

_STEPS = 10**DECIMALS

#: Rounding noise of the search below, in steps of the last decimal.
_SLACK = 1e-9


@dataclass(frozen=True)
class ConstantError:
    """What three decimals do to one channel."""

    mean: float  # grey levels, as given
    std: float  # grey levels, as given
    mean_kept: float  # grey levels, as the device pipe keeps it
    std_kept: float
    scale_error: float | None  # std / std_kept - 1; None when std vanishes
    worst: float | None  # of the tensor for |z| <= 3, in standard deviations; likewise


def constant_error(mean: float, std: float) -> ConstantError:
    """The error of one channel's constants, given in grey levels."""
    mean_kept = round(mean / GREY_MAX, DECIMALS) * GREY_MAX
    std_kept = round(std / GREY_MAX, DECIMALS) * GREY_MAX
    if std_kept == 0:
        return ConstantError(mean, std, mean_kept, std_kept, None, None)
    # z' = (grey - mean_kept) / std_kept with grey = mean + z std, at z = -3 and z = 3.
    errors = [abs((mean + z * std - mean_kept) / std_kept - z) for z in (-3.0, 3.0)]
    return ConstantError(mean, std, mean_kept, std_kept, std / std_kept - 1, max(errors))


def exact_range(mu: float, sigma: float, low: float, high: float) -> tuple[float, float]:
    """The narrowest range around [low, high] whose mean and std survive three decimals exactly.

    With grey level 0 at `lo` and 255 at `hi`, the constants in units of full scale are
    (mu - lo) / (hi - lo) and sigma / (hi - lo); both become multiples of 0.001.

    Args:
        mu: mean in contract units.
        sigma: standard deviation in contract units, above 0.
        low: lower end that must be covered, in contract units.
        high: upper end that must be covered, above `low`.

    Returns:
        (lo, hi), lo <= low and hi >= high up to rounding of float64.

    Raises:
        ValueError: the range is over a thousand sigma wide, so std would be below 0.001.
    """
    for std_steps in range(math.floor(_STEPS * sigma / (high - low)), 0, -1):
        step = sigma / std_steps  # contract units per 0.001 of full scale
        mean_steps = math.ceil((mu - low) / step - _SLACK)
        if (high - mu) / step <= _STEPS - mean_steps + _SLACK:
            lo = mu - mean_steps * step
            return lo, lo + _STEPS * step
    raise ValueError(
        f"the range [{low:g}, {high:g}] is over {_STEPS} standard deviations of {sigma:g} wide"
    )
