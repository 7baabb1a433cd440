"""The student's 8-bit encoding: chosen and judged."""

from __future__ import annotations

from dataclasses import astuple, dataclass
from typing import TYPE_CHECKING

import numpy as np

from metis.voyager.device_constants import exact_range
from pipeline.facts import EncodingFacts
from pipeline.params.ingest import StudentParams
from pipeline.run.errors import InputError
from pipeline.run.stage import Job
from preprocessing.student_input import StudentInput, linear_encoding

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from pipeline.data.survey import BandStatistics
    from preprocessing.contract import Channels


#: An encoding that gives the middle 98 % of a band fewer grey levels than this, or less than this
#: many dB, costs accuracy; `percentile` is recommended instead.
FEW_LEVELS = 48

LOW_SQNR_DB = 30.0


def make_student_input(
    params: StudentParams,
    channels: Channels,
    patch_hw: tuple[int, int],
    ranges: Sequence[tuple[float, float]],
    contract_sha256: str,
) -> StudentInput:
    """What the student sees, from its parameters and the range of each channel.

    Args:
        params: the section `ingest.student`.
        channels: its bands.
        patch_hw: size of the stored patches.
        ranges: per channel, the contract units of grey level 0 and of grey level 255.
        contract_sha256: of preprocessing.json.
    """
    bilinear = params.interpolation == "bilinear"
    same_size = patch_hw == (params.size, params.size)
    return StudentInput(
        modality=params.modality,
        bands=params.bands,
        patch_hw=patch_hw,
        size_hw=(params.size, params.size),
        interpolation=params.interpolation,
        half_pixel_centers=bilinear
        if params.half_pixel_centers is None
        else params.half_pixel_centers,
        device_resize=not same_size
        and (params.device_resize == "device" or (params.device_resize == "auto" and bilinear)),
        encoding=params.encoding,
        contract=contract_sha256,
        **linear_encoding(ranges, channels),
    )


def fit_ranges(
    params: StudentParams, channels: Channels, statistics: BandStatistics
) -> list[tuple[float, float]]:
    """Per band, percentiles of the training split, widened so that the device's constants fit.

    Raises:
        InputError: the percentiles of a band are equal.
    """
    ranges = []
    zscore = channels.zscore
    for i, (band, sample) in enumerate(_samples(channels, statistics)):
        low, high = (float(v) for v in np.percentile(sample, params.percentiles))
        if low >= high:
            raise InputError(
                f"ingest.student.percentiles: {params.percentiles} of {params.modality} band "
                f"{band} are both {low:g}; widen them"
            )
        # Without z-score the network sees contract units: mean 0, standard deviation 1.
        mu, sigma = (zscore.mu[i], zscore.sigma[i]) if zscore else (0.0, 1.0)
        ranges.append(exact_range(mu, sigma, low, high))
    return ranges


def judge_encoding(
    job: Job, student: StudentInput, channels: Channels, statistics: BandStatistics
) -> tuple[EncodingFacts, ...]:
    """How well the 8-bit encoding carries each band; warns where it does so badly."""
    quality = []
    ends = zip(student.grey_lo, student.grey_hi, strict=True)
    for (band, sample), (lo, hi) in zip(_samples(channels, statistics), ends, strict=True):
        figures = encoding_quality(sample, lo, hi)
        levels, sqnr = figures.levels98, figures.sqnr_db
        quality.append(EncodingFacts(band, lo, hi, *astuple(figures)))
        low = sqnr is not None and (levels < FEW_LEVELS or sqnr < LOW_SQNR_DB)
        if student.encoding == "contract" and low:
            job.warn(
                f"8-bit encoding: the middle 98 % of {student.modality} band {band} use "
                f"{levels:.0f} grey levels ({sqnr:.1f} dB); ingest.student.encoding: percentile "
                "would use most of 256"
            )
    return tuple(quality)


def _samples(
    channels: Channels, statistics: BandStatistics
) -> list[tuple[int, NDArray[np.float32]]]:
    """Each band with its sample, in contract units, (values,)."""
    return [(b, statistics.sample[:, statistics.bands.index(b)]) for b in channels.bands]


@dataclass(frozen=True)
class EncodingQuality:
    """How well an 8-bit encoding carries one band."""

    levels98: float  # grey levels between the 1st and the 99th percentile
    sqnr_db: float | None  # variance over the mean square of the encoding's error; None: no error
    clipped: float  # fraction of values beyond the ends


def encoding_quality(
    sample: NDArray[np.float32], lo: float, hi: float, grey_max: int = 255
) -> EncodingQuality:
    """Judge the encoding lo..hi of a band from a sample of its values, (N,) in contract units."""
    values = sample.astype(np.float64)
    step = (hi - lo) / grey_max
    grey = np.clip(np.rint((values - lo) / step), 0, grey_max)
    noise = np.square(grey * step + lo - values).mean()
    low, high = np.quantile(values, [0.01, 0.99])
    inside = np.clip([low, high], lo, hi)
    return EncodingQuality(
        levels98=float((inside[1] - inside[0]) / step),
        sqnr_db=float(10 * np.log10(values.var() / noise)) if noise > 0 else None,
        clipped=float(((values < lo - step / 2) | (values > hi + step / 2)).mean()),
    )
